"""Measurements of models that read images: one file each, registered in the catalog as kind 'measurement'."""
