"""Growth: one checkpoint to a larger one, by one file per operator, and when to grow by how much."""
