"""The kinds of artifact: one table, and the files of an artifact that belong to it."""
