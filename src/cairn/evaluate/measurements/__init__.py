"""Measurements: one file each."""
