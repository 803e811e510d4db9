"""Studies of pretraining runs."""
