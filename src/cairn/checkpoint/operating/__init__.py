"""Operations: checkpoints in, one new checkpoint out, a few tensors in memory at a time."""
