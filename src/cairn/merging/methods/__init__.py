"""One file for each merging method."""
