"""The few kernels in C, each beside the torch path that it replaces."""
