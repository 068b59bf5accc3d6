"""`verify`: the levels in turn, one verdict, and the certificate beside the artifact."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fossil_export._extras import FORWARD, Need, need, of_base, require
from fossil_export._foreign import newer_note, trusting
from fossil_export._log import log
from fossil_export._progress import Shown, reporting
from fossil_export._spellings import device_named
from fossil_export.adapters import Adapter, load_adapter
from fossil_export.artifacts._kinds import kind_of_file
from fossil_export.checkpoints._checkpoint import Checkpoint
from fossil_export.checkpoints._choice import choose
from fossil_export.checkpoints._companions import CERTIFICATE, PROVENANCE, is_weights
from fossil_export.checkpoints._dtypes import BY_TORCH_NAME
from fossil_export.checkpoints._jsonfile import read_json
from fossil_export.checkpoints._source import by_address, is_read_in_place, shown
from fossil_export.checkpoints._stamp import Stamp, check_stamp, stamps_of
from fossil_export.errors import AdapterError, CheckpointError, FossilExportError, MergeError, listed, reason, remedy
from fossil_export.merging._given import AnyGiven, with_weights
from fossil_export.merging._planning import plan_merge
from fossil_export.merging._provenance import recorded_adapters
from fossil_export.storage import Needed, Origin, fetch, find_origin, pinned
from fossil_export.verifying._forward import check_forward
from fossil_export.verifying._levels import LEVELS, Level
from fossil_export.verifying._models import check_device, tokenize
from fossil_export.verifying._onnx_folder import OnnxFolder
from fossil_export.verifying._opening import open_any
from fossil_export.verifying._prompts import PROMPTS, read_prompts
from fossil_export.verifying._seen import plain_base
from fossil_export.verifying._sum import Sum
from fossil_export.verifying._training import is_sound, training_of
from fossil_export.verifying._verdict import Verification, certificate_file, device_name
from fossil_export.writing._single_file import write_file

if TYPE_CHECKING:
    from fossil_export.verifying._training import Asked

SWAPPED = 2
"""Prompts that are asked before, with and after an adapter that can be swapped."""


@reporting
def verify(
    artifact: str | Path,
    *,
    base: str | Path | None = None,
    adapter: AnyGiven | None = None,
    level: Level = "all",
    device: str = "cpu",
    prompts: str | Path | None = None,
    report: str | Path | None = None,
    trained_on: Asked = "auto",
    trust_remote_code: bool = False,
    progress: Shown = False,
) -> Verification:
    """Is an artifact what was trained? Compare its weights and its answers with the adapter on its base.

    Writes the certificate `fossil_parity.json` beside the weights; for an artifact on the Hub `publish_certificate`
    does.

    Args:
        artifact: A folder or file that `merge`, `export_onnx` or `convert` wrote, or its id on the Hub.
        base: The base model: a folder, an address or an id on the Hub. Default: what the artifact's fossil_export.json
            names.
        adapter: As for `merge`: one, several, or pairs with weights. Default: what fossil_export.json names, at the
            recorded weights.
        level: "weights" (every tensor, streamed, no model is run), "forward" (logits and continuations against the
            trainer, which needs the extra `peft`) or "all" (default).
        device: Where the forward level runs models: "cpu" (default), "cuda", "cuda:1".
        prompts: A text file of prompts, one a line. Default: 16 that are built in; they are run too if the file's have
            fewer positions and the trainer runs in 16 bits.
        report: An HTML file to write. Default: none.
        trained_on: As for `merge`. Default: as the artifact's record says, else as the adapter's files do.
        trust_remote_code: True runs the Python code that a model's config names in its `auto_map`, as transformers does
            of that name. False (default) refuses such a model.
        progress: True shows a bar for each step: a widget in a notebook, else a line on stderr. A function is called
            with a `Progress`, one call at a time, maybe from another thread; what it raises stops the work, leaves
            nothing half-written, and comes out of this call as it is. False (default) is silent.

    Returns:
        Verification: `parity` (bool), `verdict` (words), `problems` (the reasons against parity, the first one first),
            `warnings`, `survived` (share of the update in the weights), `tensors`, `forward`, and `to_dict()`.

    Raises:
        FossilExportError: If something cannot be read or run; a difference is no error but a verdict.
        TypeError: If `progress` is neither a bool nor a function.

    Example:
        >>> import fossil_export
        >>> found = fossil_export.verify("merged", level="weights")  # doctest: +SKIP
        >>> found.parity  # doctest: +SKIP
        True
    """
    if level not in LEVELS:
        raise FossilExportError(f"level is {level!r}, expected {', '.join(LEVELS)}")
    origin = find_origin(artifact, CheckpointError, "artifact")
    with origin.by_name(), trusting(trust_remote_code):
        result, check = _verified(origin, base, adapter, level, device, prompts, report, trained_on)
        if origin.is_path:
            try:
                certificate = certificate_file(result)
                check()  # it has been read once more
                _write(result.artifact / CERTIFICATE, certificate)
            except CheckpointError:
                raise
            except FossilExportError as problem:  # an artifact that may only be read has its verdict all the same
                result = replace(result, warnings=(*result.warnings, str(problem)))
    if report is not None:
        from fossil_export.verifying._report import html

        _write(Path(report), html(result).encode())
    return result


def _verified(
    origin: Origin,
    base: str | Path | None,
    adapter: AnyGiven | None,
    level: Level,
    device: str,
    prompts: str | Path | None,
    report: str | Path | None,
    trained_on: Asked,
) -> tuple[Verification, Callable[[], None]]:
    """The verdict, and what raises where a file that it was reached on is another one by now; nothing is written."""
    started = time.perf_counter()
    if not origin.folder.is_here:  # before what may be many GB
        graphs = any(name.endswith(".onnx") for name in origin.folder.names())
        _check_packages(level, graphs, of_base(base))
    in_place = _fetch_artifact(origin, level)
    folder = origin.path
    seen = _stamps(folder)
    if origin.file is None and not folder.is_dir():
        names = origin.folder.root_names()
        held = f" (only {listed(names)})" if names else ""
        raise CheckpointError(f"{folder}: holds no model, LoRA or ONNX graph{held}; name what is to be verified")
    if kind_of_file(folder) is None and not folder.is_dir():
        if folder.suffix == ".onnx_adapter":
            raise CheckpointError(f"{folder}: is an adapter alone; name the swappable folder that was made with it")
        raise CheckpointError(f"{folder}: is no model folder; name the folder that the file lies in")
    record = _read_record(folder)
    found = open_any(folder, origin.folder if in_place else None)
    added = _added(adapter, record, folder)
    found_base = find_origin(
        _named(base, (record or {}).get("base", {}), "base", folder), CheckpointError, "base model"
    )
    of_weights = of_base(found_base.file or choose(found_base.folder)[1])
    _check_packages(level, isinstance(found, OnnxFolder), of_weights)
    fetch(*(one.needed for one in added.adapters))
    base_checkpoint = _whole(found_base, added, level)
    named = base is None or found_base.name in {one.base_model for one in added.adapters}
    with found_base.by_name():
        training, trained = training_of(added, base_checkpoint, record, trained_on, base_is_named=named)
    seen |= base_checkpoint.stamps
    seen |= {header.path: header.stamp for header in base_checkpoint.files if header.stamp is not None}

    def check() -> None:
        for path, stamp in seen.items():
            check_stamp(path, stamp)
        for one in added.adapters:
            one.check()

    base_name = str(base_checkpoint.location) if found_base.is_path else pinned(found_base.name, found_base.revision)
    texts = read_prompts(prompts) if prompts is not None else PROMPTS
    device = device_named(device)
    if level != "weights":
        check_device(device)
    else:
        device = "cpu"  # this level runs no model
    if report is not None and not Path(report).expanduser().absolute().parent.is_dir():
        raise FossilExportError(f"{report}: cannot be written: its folder does not exist; make it first")

    if level == "weights" and (why := found.incomparable()):
        raise FossilExportError(f"{folder}: {why}")
    problems: list[str] = []
    tensors = forward = None
    together = True
    notes: list[str] = []
    requantized = getattr(found, "requantized", None)
    if level in ("weights", "all"):
        try:
            changed = base_checkpoint if training.into == "original" else trained
            with by_address(base_checkpoint.home):
                tensors, problems = found.weights(changed, added, record)
                problems = [shown(problem, base_checkpoint.home) for problem in problems]
            log.info("compared the weights: %.2f s after the start", time.perf_counter() - started)
        except MergeError as problem:  # adapter and base do not go together: nothing made of them can be right
            problems.append(str(problem))
            together = False
    if level in ("forward", "all") and together:
        try:
            if training.quantized and not training.seen.tensors:
                raise CheckpointError(f"{folder}: cannot be run beside its trainer; {training.seen.warnings[-1]}")
            with plain_base(trained) as plain, found.runnable() as running:
                subject = running.subject(plain, added, device)
                # A GGUF file has no dtype of its own: the trainer has the result's.
                dtype = running.dtype(getattr(running, "checkpoint", plain) if base_checkpoint.made_of else plain)
                parameters = running.parameters(plain)
                forward = check_forward(subject, plain.location, added, dtype, parameters, texts, device)
                log.info("ran the models on %s: %.2f s after the start", device, time.perf_counter() - started)
                problems += subject.problems
                notes += newer_note(base_checkpoint.location)
                wrong, note = training.explained(forward.problem)
                problems += [wrong] if wrong else []
                notes += [note] if note else []
                if wrong and requantized:
                    problems[-1] += f"; it was quantized again ({requantized}), which makes another model of it"
                problems += running.afterwards(tokenize(subject.described_by, texts[:SWAPPED]), device)
        except FossilExportError:
            raise
        except Exception as problem:  # whatever a model's own code raises on weights that are not its
            check()
            what = f"cannot be run: {next(iter(str(problem).splitlines()), type(problem).__name__)}"
            if not problems:
                alone = "" if found.incomparable() else "; its tensors alone are checked with --level weights"
                raise CheckpointError(f"{folder}: {what}{alone}") from problem
            problems.append(f"the artifact {what}")  # what is wrong with its weights may be why
    if forward is None and training.untold:
        problems.append(training.untold)
    if forward is None and requantized:
        notes.append(
            f"it was quantized again ({requantized}), which makes another model of it; --level forward says how far "
            "its answers are from the trained model's"
        )
    if training.elsewhere:
        problems.append(training.elsewhere)
    check()
    result = Verification(
        origin=origin,
        artifact=folder,
        base=base_checkpoint,
        base_name=base_name,
        added=added,
        problems=tuple(map(origin.shown, problems)),
        tensors=tensors,
        forward=forward,
        device=device_name(device),
        seconds=time.perf_counter() - started,
        warnings=origin.notes
        + found_base.notes
        + tuple(note for one in added.adapters for note in one.notes)
        + training.seen.warnings
        + tuple(notes),
        training=training,
        requantized=requantized,
    )
    return result, check


def _stamps(artifact: Path) -> dict[Path, Stamp]:
    """Of what is compared or run of an artifact, a file or a folder."""
    if not artifact.is_dir():  # a file, or a folder elsewhere of which nothing was fetched
        return stamps_of([artifact])
    files = [path for path in artifact.iterdir() if path.name not in (CERTIFICATE, "README.md")]
    return stamps_of(files) | stamps_of((path for path in files if ".onnx" in path.name), linked=True)


def _read_record(folder: Path) -> dict[str, Any] | None:
    """The artifact's provenance file, None without one; checked for what is used of it."""
    path = folder / PROVENANCE
    if not path.is_file():
        return None
    record = read_json(path, CheckpointError)
    try:
        adapters = recorded_adapters(record)
        files = [entry for adapter in adapters for entry in adapter["files"]]
        sound = bool(adapters) and record["dtype"] in ("auto", *BY_TORCH_NAME)
        sound &= all(isinstance(part["name"], str) for part in (record["base"], *adapters))
        sound &= all(math.isfinite(adapter.get("weight", 1.0)) for adapter in adapters)
        sound &= all(isinstance(e["size"], int) and e["header_sha256"] for e in record["base"]["weights"])
        sound &= all(e["sha256"] for e in files)
        sound &= is_sound(record)
        sound &= all(isinstance(e["file"], str) and e["file"] for e in [*record["base"]["weights"], *files])
    except (KeyError, TypeError, AttributeError, OverflowError):
        sound = False
    if not sound:
        raise CheckpointError(f"{path}: is damaged; remove it and name --base and --adapter")
    return record


def _added(given: AnyGiven | None, record: Mapping[str, Any] | None, folder: Path) -> Sum:
    """The adapters to rebuild the artifact from, opened, and their weights: what is `given`, else what is recorded."""
    recorded = recorded_adapters(record or {})
    if given is None:
        names = [_named(None, entry, "adapter", folder) for entry in recorded or [{}]]
        weights: Sequence[float | None] = [None] * len(names)
    else:
        names, weights = map(list, with_weights(given))  # type: ignore[assignment]
    if recorded and len(names) != len(recorded):
        raise CheckpointError(
            f"{folder}: was merged from {len(recorded)} adapters, and {len(names)} are named; name all of them, in "
            "their order, with --adapter"
        )
    entries = recorded or [{}] * len(names)
    return Sum(
        tuple(one if isinstance(one, Adapter) else load_adapter(one) for one in names),
        tuple(
            float(entry.get("weight", 1.0) if weight is None else weight)
            for weight, entry in zip(weights, entries, strict=True)
        ),
    )


def _named(given: Any, entry: Mapping[str, Any], part: str, folder: Path) -> str | Path:
    """What is `given`, or what an entry of the record names."""
    if given is not None:
        path: str | Path = given
        return path
    name = entry.get("name")
    if not name:
        error = AdapterError if part == "adapter" else CheckpointError
        raise error(f"{folder}: has no {PROVENANCE} that names its {part}; name it with --{part}")
    return pinned(str(name), entry.get("revision"))


def _parts(names: list[str]) -> list[str]:
    """The files of an artifact on the Hub, without weights in formats that are looked at in none."""
    if any(name.endswith(".onnx") for name in names):
        return names
    return [name for name in names if not is_weights(name) or ".safetensors" in name]


def _check_packages(level: Level, graph: bool, of_weights: tuple[Need, ...]) -> None:
    """Raise MissingExtraError, which names all that is missing, unless what verify takes is installed: for its level, a
    graph, and the base's weights."""
    forward = (FORWARD,) if level != "weights" else ()
    of_graph = (need("onnx"),) if graph else ()
    models = f"the forward level{' (--level weights does without)' if level == 'all' else ''}"
    purpose = models if forward else "working on ONNX graphs" if graph else "reading GGUF files"
    require(purpose, *forward, *of_graph, *of_weights)


def _fetch_artifact(origin: Origin, level: Level) -> bool:
    """Bring here what is looked at of an artifact; True if its weights can be compared where they lie, and did not
    come: those of a merged model whose place can do that."""
    home = origin.folder
    names = home.names() if is_read_in_place(home) and not home.is_here else []
    alone = origin.file is not None or "adapter_config.json" in names or any(".onnx" in name for name in names)
    if level != "weights" or alone or not any(name.endswith(".safetensors") for name in names):
        _fetch_parts(origin)
        return False
    if not origin.checkpoint().can_stay:
        _fetch_parts(origin)
        return False
    fetch(Needed(home, tuple(name for name in names if not is_weights(name) or name.endswith(".json"))))
    return True


def _fetch_parts(origin: Origin) -> None:
    """Bring the files of an artifact or a base here that may be looked at."""
    folder = origin.folder
    if not folder.is_here:
        fetch(Needed(folder, tuple(_parts(folder.names()))))


def _whole(base: Origin, added: Sum, level: Level) -> Checkpoint:
    """The base with all its files here, but for weights that can be compared where they lie; of a model elsewhere only
    those a merge takes are fetched."""
    if not base.folder.is_here:
        try:
            needed = plan_merge(added.adapters, base, weights=added.weights).needed
            fetch(*needed, whole=level != "weights")
        except MergeError:  # a verdict, which needs the files all the same
            _fetch_parts(base)
    return base.checkpoint()


def _write(path: Path, content: bytes) -> None:
    try:
        write_file(path.expanduser(), content)
    except OSError as problem:
        raise FossilExportError(f"{path}: cannot be written: {reason(problem)}; {remedy(problem)}") from problem
