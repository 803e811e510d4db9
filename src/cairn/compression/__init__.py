"""Compression: operations that make a checkpoint sparser or smaller. One file per method in `methods/`."""
