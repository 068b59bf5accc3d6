"""A merge whose files are made by the workers of a Ray cluster, and whose end is made here."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fossil_export._progress import Shown, note, reporting
from fossil_export._spellings import device_named
from fossil_export.clusters._asked import Asked, asked_for
from fossil_export.clusters._connection import Connection, connected
from fossil_export.clusters._tasks import Tasks
from fossil_export.clusters._worker import Order
from fossil_export.errors import ClusterError
from fossil_export.merging._assembling import beside, merging, prepare, results_in, told_resumed
from fossil_export.merging._given import AnyGiven
from fossil_export.merging._merge import MergeResult, conclude, result_of
from fossil_export.merging._plan import MergePlan
from fossil_export.merging._requantize import LEAST

if TYPE_CHECKING:
    import torch

    from fossil_export.checkpoints.quantized._trained_on import TrainedOn

CPUS = 4
"""Of a task: a file is merged by several threads, and most of what they wait for is a disk or a network."""


@dataclass(frozen=True)
class Cluster:
    """What a merge ran on, and how: `address` of the cluster, its `nodes`, `cpus` that each task had, how many times
    a file was made `again` since its worker or that one's node was lost."""

    address: str
    nodes: int
    cpus: float
    again: int = 0

    def to_dict(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return dict(vars(self))


@reporting
def merge_on_ray(
    adapter: AnyGiven,
    output: str | Path,
    *,
    base: str | Path | None = None,
    weights: Sequence[float] | None = None,
    dtype: str | torch.dtype = "auto",
    max_shard_size: int | str | None = None,
    requantize: bool = False,
    min_survival: float = LEAST,
    trained_on: str | Mapping[str, Any] | TrainedOn = "auto",
    into: str = "trained",
    device: str = "cpu",
    overwrite: bool = False,
    hash: bool = False,  # noqa: A002  named as the command's option
    address: str = "auto",
    cpus: int = CPUS,
    progress: Shown = False,
) -> MergeResult:
    """Merge an adapter on a Ray cluster, a task for each weights file.

    Every node needs this version of fossil-export. It makes the plan itself: names of `adapter` and `base` must mean
    the same there, paths a folder that all nodes see; of a base on the Hub each node fetches the files that its tasks
    read to its own cache. `output` must be a folder that all nodes see, or a place in an object store. A file with a
    worker that dies is made again, which `progress` is told as a `note`; the same call takes up what an earlier one
    finished.

    Args:
        adapter: What was trained: an `Adapter`, a folder or file (str or path), or an id on the Hub ("user/repo",
            "user/repo@revision", "hf://user/repo/folder"). A list adds the updates of several in their order; a pair
            (adapter, 0.7) adds 0.7 times its update.
        output: Folder to write, or its address in an object store ("s3://bucket/name"). It must not exist, unless
            `overwrite`.
        base: The base model: a folder, a weights file, an address or an id on the Hub. Default: the one that the
            adapter names, at the revision it names.
        weights: A finite number for each adapter, its update being multiplied by it. Default: 1 for each.
        dtype: "auto" (each tensor keeps its own), or the dtype of all floating-point tensors: "float32", "bfloat16",
            "float16" or one of torch's (`torch.bfloat16`).
        max_shard_size: Cut the weights into new files of at most this size: bytes, or text such as "5GB". Default: the
            base's files.
        requantize: True keeps a quantized base's format; False (default) dequantizes it to full precision.
        min_survival: With `requantize`: the share of the update, from 0 to 1, that must be left. Less is a MergeError.
        trained_on: How the base was quantized while the adapter was trained (QLoRA): "nf4", "fp4", "int8", "fp8",
            "unquantized", the settings of a BitsAndBytesConfig as a dict, or "auto" (default): what the adapter's files
            say.
        into: "trained" (default) adds the updates to the base as training saw it, "original" to its stored weights.
        device: "cpu" (default), or "cuda": a GPU for each task.
        overwrite: True replaces what an earlier call wrote there; nothing else is ever replaced.
        hash: True records the SHA-256 of every weights file, which may read them once more.
        address: Of the Ray cluster: "HOST:PORT", "ray://HOST:PORT", "local", or "auto" (default): the running one, else
            one that is started on this machine for this call. A connection that `ray.init` made is used.
        cpus: CPUs of each task, or as many as the smallest node has.
        progress: True shows a bar for each step: a widget in a notebook, else a line on stderr. A function is called
            with a `Progress`, one call at a time, maybe from another thread; what it raises stops the work, leaves
            nothing half-written, and comes out of this call as it is. False (default) is silent.

    Returns:
        MergeResult: `output` (path or address), `survival` (by tensor, how much of the update rounding left),
            `seconds`, `peak_memory` (bytes), `resumed` (files taken up), `warnings` (lines to show), `plan`, and
            `to_dict()`.

    Raises:
        FossilExportError: In one line that names the file, the tensor or field, and the remedy; all errors below are
            its subclasses.
        AdapterError: The adapter cannot be read, or contradicts itself.
        CheckpointError: The base is missing, damaged or changes meanwhile.
        MergeError: Adapter and base do not go together, an argument has no sound value, or the result is not finite.
        HubError: The Hub refuses or cannot be reached.
        OutputError: The output cannot be written there.
        MissingExtraError: Ray is not installed; the extra is `ray`.
        ClusterError: The cluster cannot be used, or a worker has another version or sees other files.

    Example:
        >>> import fossil_export
        >>> fossil_export.merge_on_ray("my-adapter", "/shared/merged", address="10.0.0.1:6379")  # doctest: +SKIP
    """
    started = time.perf_counter()
    options = {
        "dtype": dtype,
        "max_shard_size": max_shard_size,
        "requantize": requantize,
        "min_survival": min_survival,
        "trained_on": trained_on,
        "into": into,
    }
    asked = asked_for(adapter, base, weights, options)
    result, _ = run_on_ray(
        asked.plan(), asked, output, device=device, overwrite=overwrite, hash=hash, address=address, cpus=cpus,
        started=started,
    )  # fmt: skip
    return result


@reporting
def run_on_ray(
    plan: MergePlan,
    asked: Asked,
    output: str | Path,
    *,
    device: str = "cpu",
    overwrite: bool = False,
    hash: bool = False,  # noqa: A002
    address: str = "auto",
    cpus: int = CPUS,
    progress: Shown = False,
    started: float | None = None,
) -> tuple[MergeResult, Cluster]:
    """Carry out the `plan` of what was `asked`; arguments as for `merge_on_ray`."""
    started = time.perf_counter() if started is None else started
    device = device_named(device, ClusterError)
    if device not in ("cpu", "cuda"):
        raise ClusterError(f"{device}: Ray gives each task a GPU itself; say --device cuda")
    ready = prepare(plan, output, device, overwrite, whole=False)  # the base's weights are the workers' to fetch
    plan, place, digest = ready.plan, ready.place, ready.digest
    with (
        connected(address) as connection,
        place.assemble(digest.digest, digest.about, overwrite=overwrite, shared=True) as assembly,
    ):
        try:
            done = results_in(plan, assembly)
            left = [file for file in plan.files if file.name not in done]
            assembly.check_room(sum(file.size for file in left) + beside(plan))
            step = merging(plan.files, done)
            note(str(connection))
            order = Order(asked.pinned(plan), place.name, digest.digest, device, hash, _cpus(connection, cpus, device))
            cluster = Cluster(connection.address, len(connection.nodes()), order.cpus)
            results = dict(done)
            # Ray puts the current folder first where workers look for code; of our own workers it is taken away.
            forget = asked.here if connection.is_own else None
            if left:
                with Tasks(connection, order, digest, step, forget) as tasks:
                    for made in tasks.run(left):
                        results[made.name] = made
                cluster = replace(cluster, again=tasks.again)
            finished = conclude(plan, results.values(), assembly, hash)
        except OSError as problem:
            plan.check()  # an input that is gone is no fault of the output's
            raise assembly.failed(problem) from problem
        assembly.publish()
    notes = told_resumed(place, plan, len(done))
    return result_of(ready, finished, started, resumed=len(done), notes=notes), cluster


def _cpus(connection: Connection, wanted: int, device: str) -> float:
    """Of each task: no more than the smallest node that works has. Raises ClusterError for a GPU that is nowhere."""
    nodes = connection.nodes().values()
    found = [float(node["Resources"]["CPU"]) for node in nodes if node["Resources"].get("CPU")]
    if device == "cuda" and not any(node["Resources"].get("GPU") for node in nodes):
        raise ClusterError(f"{connection.address}: no node of the cluster has a GPU; leave out --device")
    return min([float(wanted), *found])
