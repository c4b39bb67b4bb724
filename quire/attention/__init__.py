"""Attention over segments of the prefix tree."""
