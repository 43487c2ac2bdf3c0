"""A cache as a file."""
