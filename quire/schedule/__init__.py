"""Planner and policies: pure functions over state."""
