"""Studies of measurements: whether they can be trusted."""
