"""Comparisons of methods, the demo, and the pictures of the documentation."""
