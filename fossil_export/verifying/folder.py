"""The folder as a whole: does its config describe its tensors, and was it made from this base and adapter?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fossil_export.adapters import Adapter
from fossil_export.checkpoints.checkpoint import Checkpoint, identity, sha256
from fossil_export.merging.ties import declared_tie, embedding_tensor, is_head


def check_folder(
    artifact: Checkpoint, base: Checkpoint, adapter: Adapter, record: Mapping[str, Any] | None, untie: bool
) -> Iterator[str]:
    """What is wrong with `artifact` beyond single tensors, one line each.

    `record` is its provenance file, if it has one; `untie` says that training parted head and embedding.
    """
    yield from _record(base, adapter, record)
    if artifact.config is None:
        if base.config is not None:
            yield "config.json is missing from the artifact"
        return
    yield from _ties(artifact, base, untie)
    embedding = embedding_tensor(artifact.tensors)
    vocabulary = _text(artifact.config).get("vocab_size")
    if embedding is not None and isinstance(vocabulary, int):
        rows = artifact.tensors[embedding].shape[0]
        if rows != vocabulary:
            yield f"config.json says vocab_size {vocabulary}, but {embedding} has {rows} rows"


def _record(base: Checkpoint, adapter: Adapter, record: Mapping[str, Any] | None) -> Iterator[str]:
    if record is None:
        return
    recorded = {entry["file"]: entry for entry in record.get("base", {}).get("weights", ())}
    for entry in identity(base):
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
    elif untie and head is None:
        yield "config.json parts head and embedding, but no head is stored"
    elif not untie and declared_tie(base.config) is True and tied is False and head is None:
        yield "config.json parts head and embedding, but no head is stored; the base's are tied"


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    text = config.get("text_config")
    return text if isinstance(text, dict) and "vocab_size" in text else config
