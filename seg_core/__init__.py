"""The library: imagery, models and tables. It knows nothing of Ray."""
