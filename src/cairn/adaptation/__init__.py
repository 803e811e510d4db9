"""Adaptation: what is done with adapters once they are trained. They themselves live in `cairn.models.adapters`."""
