"""Data preparation: checks, splits and packing."""
