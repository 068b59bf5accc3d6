"""Results that are written to an object store, or to any other file system that fsspec knows."""
