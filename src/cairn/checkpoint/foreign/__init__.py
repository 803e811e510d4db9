"""Checkpoints of other programs: how they are laid out, imported and exported."""
