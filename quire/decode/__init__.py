"""Sampling and stopping."""
