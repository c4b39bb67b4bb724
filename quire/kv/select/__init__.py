"""Which entries a sequence keeps: one file a method; see `quire.kv.method.Select`."""
