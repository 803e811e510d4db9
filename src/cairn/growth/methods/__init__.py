"""One file for each growth method."""
