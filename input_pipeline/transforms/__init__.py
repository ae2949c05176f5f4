"""Random transforms of one record."""
