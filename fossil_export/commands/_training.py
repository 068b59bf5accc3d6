"""Options that say how the base was quantized while the adapter was trained."""

from __future__ import annotations

import re
from typing import Any

import click

from fossil_export._answers import BLOCK_SIZES, INTO, TRAINED_ON
from fossil_export.checkpoints._dtypes import BY_TORCH_NAME
from fossil_export.commands._command import option
from fossil_export.commands._types import Spelled

QUANTIZED = "Quantized bases"

trained_on = option(
    "--trained-on",
    group=QUANTIZED,
    type=click.Choice(TRAINED_ON),
    default="auto",
    show_default=True,
    help="What training quantized the base to as it was loaded (QLoRA); auto: what the files say.",
)
double_quant = option(
    "--bnb-4bit-use-double-quant/--no-bnb-4bit-use-double-quant",
    "double_quant",
    group=QUANTIZED,
    default=None,
    help="For nf4 and fp4: the scales were quantized, too.  [default: what the files say]",
)
compute_dtype = option(
    "--bnb-4bit-compute-dtype",
    "compute_dtype",
    group=QUANTIZED,
    type=Spelled([name for name in BY_TORCH_NAME if name != "float64"]),
    help="What training computed in, and, if it has 16 bits, loaded the model in.  [default: what the files say]",
)
block_size = option(
    "--bnb-4bit-blocksize",
    "block_size",
    group=QUANTIZED,
    type=click.Choice(BLOCK_SIZES),
    metavar="N",
    help=f"For nf4 and fp4: weights with one scale ({BLOCK_SIZES[0]}, {BLOCK_SIZES[1]} … {BLOCK_SIZES[-1]}).  "
    "[default: 64]",
)
skip_modules = option(
    "--llm-int8-skip-modules",
    "skip_modules",
    group=QUANTIZED,
    metavar="NAMES",
    help="Modules that were not quantized, e.g. lm_head,router.  [default: the head, and what is tied to it]",
)
into = option(
    "--into",
    group=QUANTIZED,
    type=click.Choice(INTO),
    default="trained",
    show_default=True,
    help="Add the update to the weights that training saw, or to the original ones (another model).",
)


def settings(
    kind: str,
    double_quant: bool | None = None,
    compute_dtype: str | None = None,
    block_size: str | None = None,
    skip_modules: str | None = None,
) -> str | dict[str, Any]:
    """The options as BitsAndBytesConfig has them. Raises click.UsageError for those that do not go together."""
    four = {"bnb_4bit_use_double_quant": double_quant, "bnb_4bit_blocksize": block_size and int(block_size)}
    both = {
        "bnb_4bit_compute_dtype": compute_dtype,
        "llm_int8_skip_modules": None if skip_modules is None else _names(skip_modules),
    }
    given = {key: value for key, value in (four | both).items() if value is not None}
    if kind in ("auto", "unquantized"):
        if given:
            raise click.UsageError("--bnb-4bit-… and --llm-int8-skip-modules want --trained-on nf4, fp4 or int8.")
        return kind
    if kind == "fp8":
        if given:
            raise click.UsageError("--trained-on fp8 takes no --bnb-4bit-… and --llm-int8-skip-modules.")
        return kind
    if kind == "int8":
        if given.keys() & four.keys():
            raise click.UsageError("--trained-on int8 has no blocks, and no double quantization.")
        return {"load_in_8bit": True, **given}
    return {"load_in_4bit": True, "bnb_4bit_quant_type": kind, **given}


def _names(given: str) -> list[str]:
    names = [one.strip() for one in given.split(",") if one.strip()]
    if odd := [one for one in names if re.fullmatch(r"[\w.-]+", one) is None]:
        raise click.UsageError(
            f"--llm-int8-skip-modules has {odd[0]!r}, which is no name of a module; write names with commas between "
            "them, e.g. lm_head,router."
        )
    return names
