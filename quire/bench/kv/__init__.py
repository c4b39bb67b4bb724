"""The judge of KV methods: shared-context tasks, fidelity, bytes and speed of every recipe."""
