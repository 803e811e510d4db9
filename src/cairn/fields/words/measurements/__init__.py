"""Measurements of models that read words: one file each, registered in the catalog as kind 'measurement'."""
