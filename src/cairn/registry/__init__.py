"""The registry: what every checkpoint is, where it came from, what was claimed of it and what was measured. Directories are the truth, the index is a copy."""
