"""Families of models: one file each, registered in the catalog as kind 'architecture'."""
