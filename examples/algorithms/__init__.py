"""Algorithms of one's own, see docs/algorithms.md."""
