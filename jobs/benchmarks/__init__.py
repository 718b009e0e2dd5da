"""What `seg bench` measures."""
