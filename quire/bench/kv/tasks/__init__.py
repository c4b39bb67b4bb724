"""Tasks on a shared context: one file a family. Pure text from seeded random numbers."""
