"""Breaks a running service, piece by piece, and proves that nothing was lost."""
