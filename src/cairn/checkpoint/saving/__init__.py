"""Writing checkpoints: from any number of processes, in the background, all or nothing."""
