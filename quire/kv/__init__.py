"""KV memory: pages, prefix tree, arena."""
