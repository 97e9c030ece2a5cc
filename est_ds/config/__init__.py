"""What is asked: the settings of a run, and the reader of run files."""
