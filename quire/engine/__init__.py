"""The step loop, where the other rooms meet."""
