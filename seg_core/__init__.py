"""The library: imagery, models and tables. It knows nothing of Ray."""

__version__ = "0.1.0"
