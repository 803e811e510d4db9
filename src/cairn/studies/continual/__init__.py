"""Studies of continued pretraining, of mixtures and of synthetic data."""
