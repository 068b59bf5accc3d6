"""The folder as a whole: does its config describe its tensors, and was it made from this base and adapter?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fossil_export.adapters import Adapter
from fossil_export.checkpoints._checkpoint import Checkpoint, identity, sha256
from fossil_export.checkpoints._companions import is_weights
from fossil_export.errors import listed
from fossil_export.merging._config import difference
from fossil_export.merging._plan import MergePlan
from fossil_export.merging._ties import declared_tie, embedding_tensor, is_head


def check_folder(
    artifact: Checkpoint, base: Checkpoint, adapter: Adapter, record: Mapping[str, Any] | None, plan: MergePlan
) -> Iterator[str]:
    """What is wrong with `artifact` beyond single tensors, one line each.

    `record` is its provenance file, if it has one; `plan` is what merging the adapter into the base asks for.
    """
    yield from check_record(base, adapter, record)
    if artifact.folder is not None:
        names = {header.path.name for header in artifact.files}
        for path in sorted(artifact.folder.iterdir()):
            is_index = artifact.index_path is not None and path.name == artifact.index_path.name
            if is_weights(path.name) and path.name not in names and not is_index:
                yield f"{path.name} holds other weights, which a loader may take instead; remove it"
    if artifact.config is None:
        if base.config is not None:
            yield "config.json is missing from the artifact"
        return
    yield from _ties(artifact, base, plan.config_edits.get("tie_word_embeddings") is False)
    embedding = embedding_tensor(artifact.tensors)
    vocabulary = _text(artifact.config).get("vocab_size")
    if embedding is not None and isinstance(vocabulary, int):
        rows = artifact.tensors[embedding].shape[0]
        if rows != vocabulary:
            yield f"config.json says vocab_size {vocabulary}, but {embedding} has {rows} rows"
    wanted = {**(base.config or {}), **plan.config_edits}
    changed = [key for key in difference(artifact.config, wanted) if key in _MEANING]
    if changed:
        yield f"config.json has another {listed(changed)} than base and adapter ask for"


_MEANING = (
    "architectures", "head_dim", "hidden_act", "hidden_size", "id2label", "intermediate_size", "model_type",
    "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "rope_parameters",
    "rope_scaling", "rope_theta", "sliding_window",
)  # fmt: skip
# What decides how the weights are used; ties and vocabulary are looked at on their own.


def check_record(base: Checkpoint, adapter: Adapter, record: Mapping[str, Any] | None) -> Iterator[str]:
    """Was the artifact made from this base and this adapter, as far as its provenance file tells?"""
    if record is None:
        return
    recorded = {entry["file"]: entry for entry in record.get("base", {}).get("weights", ())}
    for entry in identity(base) if recorded else ():
        known = recorded.get(entry["file"])
        if known is None or (known["size"], known["header_sha256"]) != (entry["size"], entry["header_sha256"]):
            yield f"the artifact was made from another base than {base.location}: its record differs in {entry['file']}"
            break
    digests = {entry["file"]: entry["sha256"] for entry in record.get("adapter", {}).get("files", ())}
    for path in adapter.files:
        if digests.get(path.name) not in (None, sha256(path)):
            yield f"the artifact was made from another adapter than {adapter.path}: its record differs in {path.name}"
            break


def _ties(artifact: Checkpoint, base: Checkpoint, untie: bool) -> Iterator[str]:
    head = next((name for name in artifact.tensors if name.endswith(".weight") and is_head(name[:-7])), None)
    tied = declared_tie(artifact.config)
    if untie and tied is not False:
        yield "config.json ties head and embedding, but training parted them; loaders may drop the trained head"
    elif tied is True and not untie and head is not None and declared_tie(base.config) is not True:
        yield f"config.json ties head and embedding, but {head} is stored beside it; loaders may drop it"
    elif untie and head is None:
        yield "config.json parts head and embedding, but no head is stored"
    elif not untie and declared_tie(base.config) is True and tied is False and head is None:
        yield "config.json parts head and embedding, but no head is stored; the base's are tied"


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    text = config.get("text_config")
    return text if isinstance(text, dict) and "vocab_size" in text else config
