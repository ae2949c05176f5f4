"""One training step and its state, built from a configuration without data."""
