"""Which entries a sequence keeps: one file a method; see `quire.kv.method.Select`.

What methods share is in budget.py, merging.py and fixed_point.py.
"""
