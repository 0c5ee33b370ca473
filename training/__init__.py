"""Data -> weights: what the starter models are trained by (torch)."""
