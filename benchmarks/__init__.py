"""Scripts that print a table."""
