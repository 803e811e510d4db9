"""Studies of merging and averaging."""
