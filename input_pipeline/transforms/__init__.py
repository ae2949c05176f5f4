"""Random transforms of a record."""
