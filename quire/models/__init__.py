"""Architectures, checkpoints, tokenizer and chat template."""
