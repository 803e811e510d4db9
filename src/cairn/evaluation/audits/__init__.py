"""Audits: what a score hides, what an update breaks, and how steadily a run trained."""
