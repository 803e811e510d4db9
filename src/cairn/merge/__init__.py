"""Merging: operations that combine checkpoints of one architecture into one."""
