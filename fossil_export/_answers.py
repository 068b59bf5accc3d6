"""What may be said of the base that training saw; the words of commands and functions alike."""

from __future__ import annotations

FOUR_BITS = ("nf4", "fp4")
KINDS = (*FOUR_BITS, "int8", "fp8")
"""What bitsandbytes, and transformers' FineGrainedFP8Config with its blocks of 128 × 128, quantize to while a model is
loaded: the same each time, from the weights alone."""

UNQUANTIZED = "unquantized"

TRAINED_ON = ("auto", UNQUANTIZED, *KINDS)
"""What `trained_on` may be, besides all settings."""

BLOCK_SIZES = ("32", "64", "128", "256", "512", "1024", "2048", "4096")
"""Elements that share a scale in nf4 and fp4; bitsandbytes takes 64, but on some GPUs of AMD 128."""

INTO = ("trained", "original")
"""What updates are added to: the base as training saw it, or as it is stored."""
