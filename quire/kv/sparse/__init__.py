"""Which keys a prompt's chunk reads: one file a method; see `quire.kv.method.Sparse`."""
