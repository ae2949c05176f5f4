"""Everything that reads or writes the work directory of a run."""
