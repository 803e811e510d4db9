"""Data: where documents come from, how they become tokens, and in which order a model reads them."""
