"""Which entries a query reads: one file a method; see `quire.kv.method.Fetch`."""
