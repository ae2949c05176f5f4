"""Comparisons of methods, the demonstration and the pictures of the documentation."""
