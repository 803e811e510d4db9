"""Continual pretraining: going on with new data, branches for use, plans of data, and generations of synthetic data."""
