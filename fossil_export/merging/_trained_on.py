"""Which base training saw, and the base as training saw it.

Most QLoRA runs quantize an unquantized base while it is loaded. The adapter then fits dequantized(quantized(W)), of
which here each weight that training quantized has the coding (`_seen_weights`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fossil_export._answers import BLOCK_SIZES, FOUR_BITS, INTO, KINDS, TRAINED_ON, UNQUANTIZED
from fossil_export._spellings import expected
from fossil_export.adapters import Adapter
from fossil_export.adapters._quantized import Sign, agreed, of_settings, settings_at, signs
from fossil_export.checkpoints._checkpoint import Checkpoint
from fossil_export.checkpoints._dtypes import BY_TORCH_NAME, FLOATS, TORCH_NAME
from fossil_export.checkpoints._header import TensorInfo
from fossil_export.checkpoints.quantized._format import float_dtype
from fossil_export.checkpoints.quantized._trained_on import TrainedOn
from fossil_export.errors import MergeError, listed
from fossil_export.merging._seen_weights import as_trained, experts
from fossil_export.storage import at_hand

_COARSER = (("F32", "BF16"), ("F32", "F16"), ("F16", "BF16"))
# Dtypes as stored and as loaded, between which a weight is rounded before it is quantized.


@dataclass(frozen=True)
class Seen:
    """What is known of the base that training saw.

    `how` is None if training saw the base as it is stored, or if nobody knows; `skip_modules` are those that the
    settings left unquantized (None: the ones that transformers chooses), `where` says where it was found. `tensors` are
    the base's quantized weights by name, as training saw them; none if the base is stored so.
    """

    how: TrainedOn | None = None
    skip_modules: tuple[str, ...] | None = None
    where: str | None = None
    tensors: Mapping[str, TensorInfo] = field(default_factory=dict, repr=False)
    warnings: tuple[str, ...] = ()
    denied: bool = False
    """Whether the user says that it was not quantized."""
    other: str | None = None
    """What it surely saw, if that is not what the base is stored as; in words."""

    @property
    def told(self) -> str:
        """ "nf4 with double quantization"; only if it is known."""
        assert self.how is not None
        double = {True: " with double quantization", False: ""}
        return f"{self.how.kind}{double[self.how.double_quant]} ({self.where})"

    def record(self) -> dict[str, Any] | str | None:
        """As the provenance file has it."""
        if self.how is None:
            return UNQUANTIZED if self.denied else None
        four = self.how.kind in FOUR_BITS
        return {
            "kind": self.how.kind,
            **({"block_size": self.how.block_size, "double_quant": self.how.double_quant} if four else {}),
            "compute_dtype": TORCH_NAME[self.how.compute_dtype],
            "skip_modules": None if self.skip_modules is None else list(self.skip_modules),
            "found_in": self.where,
        }


def seen_base(
    adapters: Sequence[Adapter],
    base: Checkpoint,
    asked: str | Mapping[str, Any] | TrainedOn,
    into: str,
    *,
    base_is_named: bool,
) -> Seen:
    """What training saw of `base`: as `asked`, or as the adapters' files tell.

    With `base_is_named` the base is the one that the adapters name. Raises MergeError, AdapterError.
    """
    if into not in INTO:
        raise MergeError(f"into is {into!r}, expected {' or '.join(INTO)}")
    if isinstance(asked, str) and asked not in TRAINED_ON:
        raise MergeError(
            f"trained_on is {asked!r}, expected {', '.join(TRAINED_ON)}, or the settings of a quantization"
        )
    if asked == UNQUANTIZED or (isinstance(asked, TrainedOn) and asked.kind == UNQUANTIZED):
        return Seen(denied=True)
    answer = None if asked == "auto" else _answer(asked)
    found = [_sign(adapter, base_is_named, strict=answer is None) for adapter in adapters]
    sign = _together(adapters, found) if answer is None else _filled(answer, found)
    if sign is None:
        return Seen()
    if base.quantized is not None:
        return _stored_so(sign, base, answer is not None, into)
    if answer is None and (not sign.is_certain or (base.config or {}).get("model_type") in sign.apart):
        return Seen(warnings=tuple(_doubt(adapter, one) for adapter, one in zip(adapters, found, strict=True) if one))
    if sign.kind not in KINDS:
        raise MergeError(
            f"{base.location}: training saw it as {sign.kind}, which cannot be made from the stored weights here; name "
            "the quantized model with --base, or choose --into original"
        )
    how = asked if isinstance(asked, TrainedOn) else _how(sign, base, asked)
    silent = [adapter.name for adapter, one in zip(adapters, found, strict=True) if one is None]
    warnings = (f"{listed(silent)}: nothing says that it was trained on {sign.told}; it is taken to be",)
    told: tuple[str, ...] = warnings if answer is None and silent else ()
    own = float_dtype(base.config or {}, _commonest(base))
    if answer is None and (own, how.compute_dtype) in _COARSER:
        stored, loaded = TORCH_NAME[own], TORCH_NAME[how.compute_dtype]
        told += (
            f"{base.location}: is stored as {stored}, and taken to have been loaded as {loaded}, which training "
            f"computed in; if it was loaded as it is stored: --trained-on {sign.kind} --bnb-4bit-compute-dtype float32",
        )
    if into == "original":
        told += (
            f"{listed([adapter.name for adapter in adapters])}: was trained over quantized weights ({sign.told}, "
            f"{sign.where}); added to the original ones it is another model",
        )
    try:
        tensors = as_trained(adapters[0], base, how, sign.skip_modules)
    except MergeError:
        if into == "trained":
            raise
        tensors = {}  # nothing but the measure of what was quantized is lost
    if any(info.name not in tensors for info in experts(adapters[0], base)):
        told += (
            f"{base.location}: its experts are taken to be as they are stored, since transformers 5 leaves them so; a "
            "training with transformers 4 quantized these, too",
        )
    return Seen(how, sign.skip_modules, sign.where, tensors, told)


def _answer(asked: str | Mapping[str, Any] | TrainedOn) -> Sign:
    """What the user says, as a sign."""
    if isinstance(asked, TrainedOn):
        return Sign("as was said", asked.kind, asked.double_quant, TORCH_NAME.get(asked.compute_dtype))
    if isinstance(asked, str):
        return Sign("as was said", asked)
    sign = of_settings(asked, "as was said")
    if sign is None or sign.kind is None:
        raise MergeError(f"trained_on is {dict(asked)!r}, which does not say how the base was quantized")
    given = asked.get("bnb_4bit_compute_dtype")
    if given is not None and sign.compute_dtype is None:
        raise MergeError(f"bnb_4bit_compute_dtype is {str(given)!r}, {expected(('float32', 'float16', 'bfloat16'))}")
    return sign


def _filled(answer: Sign, found: Sequence[Sign | None]) -> Sign:
    """The user's answer, with what was found of what it leaves open."""
    for one in found:
        if one is not None and one.kind == answer.kind:
            answer = replace(
                answer,
                double_quant=one.double_quant if answer.double_quant is None else answer.double_quant,
                compute_dtype=answer.compute_dtype or one.compute_dtype,
                skip_modules=one.skip_modules if answer.skip_modules is None else answer.skip_modules,
            )
    if answer.kind in FOUR_BITS and not answer.is_certain:
        raise MergeError(
            f"--trained-on {answer.kind}: whether its scales were quantized too (double quantization) was not found; "
            "say --bnb-4bit-use-double-quant or --no-bnb-4bit-use-double-quant"
        )
    return answer


def _sign(adapter: Adapter, base_is_named: bool, strict: bool) -> Sign | None:
    """What its files say, and the quantized base that it names, if that is another one and at hand."""
    found = signs(adapter)
    if adapter.base_model is not None and not base_is_named:
        path = at_hand(adapter.base_model, adapter.base_revision, "config.json")
        settings = settings_at(path.parent) if path is not None else None
        named = of_settings(settings, f"{adapter.base_shown} is quantized") if settings is not None else None
        found = (named, *found) if named is not None else found
        found = tuple(sorted(found, key=lambda sign: not sign.is_certain))
    if not strict:
        return found[0] if found else None
    return agreed(found, adapter.name)


def _together(adapters: Sequence[Adapter], found: Sequence[Sign | None]) -> Sign | None:
    """What is known of the one base of all adapters. Raises MergeError if they saw different ones."""
    known = [(adapter, sign) for adapter, sign in zip(adapters, found, strict=True) if sign is not None]
    known.sort(key=lambda pair: not pair[1].is_certain)
    for adapter, sign in known[1:]:
        first, other = known[0]
        if sign.kind is not None and (sign.kind, sign.double_quant) != (other.kind, other.double_quant):
            raise MergeError(
                f"{first.name} was trained on {other.told}, {adapter.name} on {sign.told}; no base is both, so merge "
                "with --into original, or say with --trained-on which to take"
            )
    return known[0][1] if known else None


def _stored_so(sign: Sign, base: Checkpoint, asked: bool, into: str) -> Seen:
    """A base that is stored quantized: is it what training saw?"""
    assert base.quantized is not None
    own = of_settings(base.quantized.settings, "as it is stored") or Sign("as it is stored")
    kind = own.kind or base.quantized.format
    agrees = sign.kind is None or sign.kind == kind
    if own.double_quant is not None and sign.double_quant is not None:
        agrees = agrees and own.double_quant == sign.double_quant
    if not agrees and (asked or sign.is_certain) and into == "trained":
        raise MergeError(
            f"{base.location}: is stored as {kind if own.kind is None else own.told}, and training saw {sign.told} "
            f"({sign.where}); name the unquantized base with --base, or choose --into original"
        )
    if not agrees:
        other = f"{sign.told} ({sign.where})" if asked or sign.is_certain else None
        told = f"{base.location}: is stored as {kind}, and training saw {sign.told} ({sign.where})"
        return Seen(warnings=(told,), other=other)
    if sign.is_certain and own.is_certain and sign.kind in KINDS:
        return Seen(_how(sign, base, None), sign.skip_modules, sign.where)
    return Seen()


def _how(sign: Sign, base: Checkpoint, asked: Any) -> TrainedOn:
    """A model is loaded in the dtype that is computed in, if that has 16 bits, else in its own (`dtype="auto"`)."""
    dtype = float_dtype(base.config or {}, _commonest(base))
    if sign.compute_dtype in ("bfloat16", "float16"):
        dtype = BY_TORCH_NAME[sign.compute_dtype]
    block = asked.get("bnb_4bit_blocksize", 64) if isinstance(asked, Mapping) else 64
    if str(block) not in BLOCK_SIZES:
        raise MergeError(f"trained_on has blocks of {block!r}, expected {', '.join(BLOCK_SIZES)}")
    return TrainedOn(str(sign.kind), int(block), bool(sign.double_quant), dtype)


def _commonest(base: Checkpoint) -> str:
    counts: dict[str, int] = {}
    for info in base.tensors.values():
        counts[info.dtype] = counts.get(info.dtype, 0) + 1
    return max((dtype for dtype in counts if dtype in FLOATS), key=lambda dtype: counts[dtype], default="BF16")


def _doubt(adapter: Adapter, sign: Sign) -> str:
    return (
        f"{adapter.path}: was trained over quantized weights, it seems ({sign.where}); merged into unquantized ones it "
        "is another model, unless those are the quantized weights dequantized; if bitsandbytes quantized this base for "
        "training, say how with --trained-on"
    )
