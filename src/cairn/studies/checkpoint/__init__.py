"""Studies of checkpoints."""
