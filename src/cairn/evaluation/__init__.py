"""Evaluation: measurements of checkpoints, the engine that scores requests, and the statistics that make figures honest."""
