"""Inference: the key-value cache and sampling."""
