"""The global order: which sample stands at each position, as pure functions."""
