"""What runs on Ray, and the command line."""
