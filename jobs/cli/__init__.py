"""The command line `seg`."""
