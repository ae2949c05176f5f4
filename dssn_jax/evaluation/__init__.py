"""Everything that uses a trained network."""
