"""How entries are represented: one file a method; see `quire.kv.method.Store`."""
