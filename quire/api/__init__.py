"""The public face: `LLM` and what it returns."""
