"""Which base truth and trainer run on: the one that training saw."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fossil_export._answers import FOUR_BITS, INTO, KINDS, UNQUANTIZED
from fossil_export.adapters._quantized import quantized_training
from fossil_export.checkpoints._checkpoint import Checkpoint
from fossil_export.checkpoints._dtypes import BY_TORCH_NAME
from fossil_export.checkpoints.quantized._trained_on import TrainedOn
from fossil_export.errors import MergeError
from fossil_export.merging._seen_weights import as_trained, with_tensors
from fossil_export.merging._trained_on import Seen, seen_base
from fossil_export.verifying._sum import Sum

if TYPE_CHECKING:
    Asked = str | Mapping[str, Any] | TrainedOn


@dataclass(frozen=True)
class Training:
    """What is known of it: what it `seen` of the base, which base the updates of the artifact were added `into`
    (`INTO`), and the format that the base is `stored_as`, if that is a quantized one. `doubt` is what says that the
    base was quantized, if it was not found out how."""

    seen: Seen = field(default_factory=Seen)
    into: str = "trained"
    stored_as: str | None = None
    doubt: str | None = None

    @property
    def told(self) -> str:
        """ "nf4 with double quantization"; for a base that training quantized."""
        how = self.seen.how
        assert how is not None
        double = f" with{'' if how.double_quant else 'out'} double quantization" if how.kind in FOUR_BITS else ""
        return f"{how.kind}{double}"

    @property
    def quantized(self) -> bool:
        """Whether training quantized the base, which is stored otherwise."""
        return self.seen.how is not None and self.stored_as is None

    @property
    def is_other(self) -> bool:
        """Whether the updates were added to another base than training saw."""
        return self.quantized and self.into == "original"

    @property
    def base_weights(self) -> str:
        """For the certificate, whose truth is the adapter on these."""
        return "as trained" if self.quantized else "as stored" if self.stored_as is None else "dequantized"

    @property
    def base(self) -> str:
        """The base of truth and trainer, in words."""
        if self.quantized:
            return f"the base as training saw it ({self.told})"
        stored = "" if self.stored_as is None else f", dequantized ({self.stored_as})"
        doubt = self.doubt and f"; trained over quantized weights, it seems ({self.doubt}), it is another model there"
        return f"the base as it is stored{stored}{doubt or ''}"

    def explained(self, problem: str | None) -> tuple[str | None, str | None]:
        """What is wrong with the answers, and what is to be known of them; `problem` is what the forward level says of
        them."""
        if self.is_other:
            made = f"it was merged into the original weights, and training saw them as {self.told}"
            if problem is None:
                return None, f"{made}; its answers are no further from the trained model's than rounding takes them"
            return f"{made}: {problem}", None
        if problem is not None and self.quantized:
            problem += f"; training saw the base as {self.told}, and what is made of the original weights is far off so"
        return problem, None

    @property
    def elsewhere(self) -> str | None:
        """What is wrong if the base is stored quantized, and otherwise than training saw it."""
        if self.seen.other is None:
            return None
        return f"its base is stored as {self.stored_as}; training saw {self.seen.other}: not the model that was trained"

    @property
    def untold(self) -> str | None:
        """What is wrong if the artifact was not run."""
        if not self.is_other:
            return None
        return (
            f"it was merged into the original weights, and training saw them as {self.told}: not the model that was "
            "trained; --level forward says how far its answers are from that one's"
        )


def training_of(
    added: Sum, base: Checkpoint, record: Mapping[str, Any] | None, asked: Asked, *, base_is_named: bool
) -> tuple[Training, Checkpoint]:
    """What is known of the training, and the base as that saw it: as `asked`, else as the artifact's `record` has it,
    else as the adapters' files tell. Raises MergeError if that base cannot be made and is needed."""
    record = record or {}
    into = str(record.get("into", "trained"))
    if asked == "auto" and record.get("trained_on") == UNQUANTIZED:
        # Who merged it says so; what the adapter's files say is told beside.
        seen = Seen(denied=True)
    elif asked == "auto" and record.get("trained_on") is not None:
        seen = _recorded(record["trained_on"], added, base, into)
    else:
        # A merge into a base that is stored otherwise has its verdict all the same.
        stored = into if base.quantized is None else "original"
        seen = seen_base(added.adapters, base, asked, stored, base_is_named=base_is_named)
    signs = [sign for one in added.adapters if (sign := quantized_training(one))]
    known = asked != "auto" or seen.how is not None or (base.quantized is not None and not seen.warnings)
    found = Training(
        seen,
        into,
        base.quantized.format if base.quantized is not None else None,
        None if known or not signs else signs[0],
    )
    return found, with_tensors(base, seen.tensors) if seen.tensors else base


def _recorded(entry: Mapping[str, Any], added: Sum, base: Checkpoint, into: str) -> Seen:
    """What a record says (`Seen.record`), which is more than may be asked for."""
    how = _how(entry)
    skip = None if entry["skip_modules"] is None else tuple(entry["skip_modules"])
    seen = Seen(how, skip, entry["found_in"])
    if base.quantized is not None:
        return seen
    try:
        return Seen(how, skip, entry["found_in"], as_trained(added.adapters[0], base, how, skip))
    except MergeError as problem:
        if into == "trained":
            raise
        return Seen(how, skip, entry["found_in"], {}, (str(problem),))


def _how(entry: Mapping[str, Any]) -> TrainedOn:
    four = {name: entry[name] for name in ("block_size", "double_quant") if name in entry}
    return TrainedOn(entry["kind"], compute_dtype=BY_TORCH_NAME[entry["compute_dtype"]], **four)


def is_sound(record: Mapping[str, Any]) -> bool:
    """Whether a record tells of the training in the form that is read here; may raise KeyError or TypeError if not."""
    if record.get("into", "trained") not in INTO:
        return False
    entry = record.get("trained_on")
    if entry is None or entry == UNQUANTIZED:
        return True
    how, skip = _how(entry), entry["skip_modules"]
    sound = (
        how.kind in KINDS and isinstance(how.double_quant, bool) and isinstance(entry["found_in"], (str, type(None)))
    )
    sound &= type(how.block_size) is int and 0 < how.block_size <= 1 << 16
    return sound and (skip is None or (isinstance(skip, list) and all(isinstance(one, str) for one in skip)))
