"""Several adapters, each at its weight, from the command line and as pairs."""

from __future__ import annotations
