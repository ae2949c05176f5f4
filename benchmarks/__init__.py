"""Scripts that measure times, bytes and memory, and print a table."""
