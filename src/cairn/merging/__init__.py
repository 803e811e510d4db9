"""Merging: operations that combine checkpoints of one architecture into one.

The functions are in `combine`: here, `average` is the module of that method.
"""
