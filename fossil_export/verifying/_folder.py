"""The folder as a whole: does its config describe its tensors, and was it made from this base and adapter?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fossil_export.adapters import Adapter
from fossil_export.checkpoints._checkpoint import Checkpoint, identity, sha256
from fossil_export.checkpoints._companions import is_weights
from fossil_export.errors import listed
from fossil_export.merging._guess import declared_tie, embedding_tensor
from fossil_export.merging._look import look
from fossil_export.merging._naming import naming_of
from fossil_export.merging._plan import MergePlan
from fossil_export.merging._provenance import recorded_adapters
from fossil_export.verifying._fields import changed_fields


def check_folder(
    artifact: Checkpoint, base: Checkpoint, record: Mapping[str, Any] | None, plan: MergePlan
) -> Iterator[str]:
    """What is wrong with `artifact` beyond single tensors, one line each.

    `record` is its provenance file, if it has one; `plan` is what merging the adapters into the base asks for.
    """
    yield from check_record(base, plan.adapters, record)
    if artifact.folder is not None:
        names = {header.path.name for header in artifact.files}
        for name in artifact.home.root_names():
            is_index = artifact.index_path is not None and name == artifact.index_path.name
            if is_weights(name) and name not in names and not is_index:
                yield f"{name} holds other weights, which a loader may take instead; remove it"
    if artifact.config is None:
        if base.config is not None:
            yield "config.json is missing from the artifact"
        return
    yield from _ties(artifact.config, plan)
    embedding = _embedding(plan.adapters, base, artifact)
    vocabulary = _text(artifact.config).get("vocab_size")
    if embedding is not None and isinstance(vocabulary, int):
        rows = artifact.tensors[embedding].shape[0]
        of_base = base.tensors.get(embedding)
        more = of_base.shape[0] - _text(base.config or {}).get("vocab_size", 0) if of_base is not None else 0
        if rows - vocabulary not in (0, more):  # some models have more rows than that, for other tokens
            yield f"config.json says vocab_size {vocabulary}, but {embedding} has {rows} rows"
    gone = {name for name, value in plan.config_edits.items() if value is None}
    wanted = {**(base.config or {}), **plan.config_edits}
    if changed := changed_fields(artifact.config, {name: wanted[name] for name in wanted if name not in gone}):
        yield f"config.json has another {listed(changed)} than base and adapter ask for"
    # What is missing or too much among the tensors is told of each by itself.
    yield from look(plan.adapters, base, {tensor.name: tensor.shape for tensor in plan.tensors}, artifact.config)


def check_record(base: Checkpoint, adapters: Sequence[Adapter], record: Mapping[str, Any] | None) -> Iterator[str]:
    """Was the artifact made from this base and these adapters, as far as its provenance file tells?"""
    if record is None:
        return
    recorded = {entry["file"]: entry for entry in record.get("base", {}).get("weights", ())}
    for entry in identity(base) if recorded else ():
        known = recorded.get(entry["file"])
        if known is None or (known["size"], known["header_sha256"]) != (entry["size"], entry["header_sha256"]):
            yield f"the artifact was made from another base than {base.location}: its record differs in {entry['file']}"
            break
    for adapter, known in zip(adapters, recorded_adapters(record), strict=False):
        digests = {entry["file"]: entry["sha256"] for entry in known.get("files", ())}
        for path in adapter.files:
            if digests.get(path.name) not in (None, sha256(path)):
                yield (
                    f"the artifact was made from another adapter than {adapter.path}: its record differs in {path.name}"
                )
                break


def _ties(config: Mapping[str, Any], plan: MergePlan) -> Iterator[str]:
    untied = plan.config_edits.get("tie_word_embeddings") is False
    if untied and declared_tie(config) is not False:
        yield "config.json ties tensors that training parted; loaders may drop the trained one"
    elif not untied and (before := declared_tie(plan.base.config)) is not None and declared_tie(config) != before:
        yield f"config.json says tie_word_embeddings {declared_tie(config)}, and the base's says {before}"


def _embedding(adapters: Sequence[Adapter], base: Checkpoint, artifact: Checkpoint) -> str | None:
    """The name of the input embedding among the artifact's tensors."""
    namings = [naming_of(adapter, base) for adapter in adapters]
    known = [naming for naming in namings if naming.known and naming.model.embedding is not None]
    if not known:
        return embedding_tensor(artifact.tensors)
    names = [naming.names.whole.get(f"{naming.model.embedding}.weight") for naming in known]
    return next((name for name in names if name in artifact.tensors), None)


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    text = config.get("text_config")
    return text if isinstance(text, dict) and "vocab_size" in text else config
