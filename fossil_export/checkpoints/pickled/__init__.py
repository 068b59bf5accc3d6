"""Weights files of PyTorch (`torch.save`): read without PyTorch, and without running anything that is in them."""

from __future__ import annotations

from fossil_export.checkpoints.pickled._archive import parse_pickle_header, read_pickle_header

__all__ = ["parse_pickle_header", "read_pickle_header"]
