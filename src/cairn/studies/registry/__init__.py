"""Studies of the registry: what it must find, and what it must not."""
