"""The newest states of a run in shared memory: kept by a process of its own beside each trainer, with parity across nodes."""
