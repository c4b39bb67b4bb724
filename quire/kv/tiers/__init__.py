"""Slower memory for packed entries that are read rarely."""
