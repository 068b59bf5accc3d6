"""The connection to a Ray cluster: quiet, without statistics, and of a process that keeps its own signals."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from fossil_export._extras import need, require, required
from fossil_export.errors import ClusterError

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else a tip about accelerators is printed
}
"""Ray reads these when it is imported and when it starts. What the user has set of the last one stays."""

STORE = 100 << 20
"""Bytes of a local cluster's object store, in which next to nothing lies: the weights never pass through Ray."""

PURPOSE = "merging on a Ray cluster"
"""What Ray is needed for."""

START = "ray start --head"
"""How a cluster is started."""


@dataclass(frozen=True)
class Connection:
    """`ray` is the module. `address` is the cluster's; `is_own` says that the connection was made here, and ends here,
    `is_new` that the cluster was, too."""

    ray: Any
    address: str
    is_own: bool
    is_new: bool

    def nodes(self) -> dict[str, dict[str, Any]]:
        """The nodes that are there now, by id, as Ray describes them. Raises ClusterError if Ray does not say."""
        try:
            return {node["NodeID"]: node for node in self.ray.nodes() if node["Alive"]}
        except Exception as problem:
            raise failed(self.address, problem) from problem

    def node_name(self, node: str | None) -> str:
        """A node as people know it: the host and its address."""
        for one in self.ray.nodes() if node else ():
            if one["NodeID"] == node:
                return f"{one['NodeManagerHostname']} ({one['NodeManagerAddress']})"
        return "an unknown node"

    def __str__(self) -> str:
        if self.is_new:
            return "Ray on this machine alone, as no cluster runs here (see --ray)"
        return f"Ray cluster at {self.address}, {len(self.nodes())} nodes"


def check_ray() -> None:
    """Raise MissingExtraError if Ray is not installed. It is not imported."""
    require(PURPOSE, need("ray"))


@contextmanager
def connected(address: str) -> Iterator[Connection]:
    """A connection to the cluster at `address`; of "auto" to the running one (RAY_ADDRESS, or the one on this machine),
    else, and of "local", to one that is started on this machine and ends with the block.

    A connection that this process has already is used, and stays. Raises MissingExtraError without Ray, ClusterError if
    there is no such cluster, or it is of another Ray or Python.
    """
    with _quiet():
        with _own_signals():
            ray = required("ray", "ray", PURPOSE)
        if ray.is_initialized():
            yield Connection(ray, ray.get_runtime_context().gcs_address, False, False)
            return
        with _silent():
            with _own_signals():
                found = _connect(ray, address)
            try:
                yield found
            finally:
                with _own_signals():
                    ray.shutdown()


def _connect(ray: Any, address: str) -> Connection:
    common = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.CRITICAL}
    wanted = _running() if address == "auto" else address
    # Ray waits long for what is not there, and its core prints that.
    if wanted not in (None, "local") and not wanted.startswith("ray://") and not _answers(wanted):
        raise ClusterError(f"{wanted}: no Ray cluster answers there; start one ({START}), or say --ray local")
    try:
        if wanted in (None, "local"):
            context = ray.init("local", object_store_memory=STORE, **common)
            return Connection(ray, context.address_info["gcs_address"], True, True)
        context = ray.init(wanted, **common)
        info = getattr(context, "address_info", None) or {}
        return Connection(ray, info.get("gcs_address") or wanted, True, False)
    except ImportError as problem:  # of ray://
        ray.shutdown()
        raise ClusterError(
            f"{wanted}: Ray's client is not installed, which ray:// wants; pip install 'ray[client]', or name the "
            "cluster as HOST:PORT on one of its machines"
        ) from problem
    except Exception as problem:
        ray.shutdown()
        raise failed(wanted or address, problem) from problem


def _running() -> str | None:
    """The cluster that `ray.init()` would join: of RAY_ADDRESS, or one that `ray start` started on this machine and
    that is still there."""
    if (named := os.environ.get("RAY_ADDRESS", "")) not in ("", "auto"):
        return named
    try:
        found = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster").read_text().strip()
    except (OSError, ValueError):
        return None
    return found if re.fullmatch(r"\S+:\d+", found) and _answers(found) else None


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ClusterError(
            f"{address!r}: is no address of a Ray cluster; write auto, local, HOST:PORT or ray://HOST:PORT"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError:
        return False
    return True


def failed(address: str, problem: Exception) -> ClusterError:
    """What Ray says of a cluster, in one line."""
    first = next((line.strip() for line in str(problem).splitlines() if line.strip()), type(problem).__name__)
    text = " ".join(str(problem).split())
    if "ersion mismatch" in text:
        return ClusterError(f"{address}: {text}; install the same Ray and Python here and there")
    return ClusterError(f"{address}: Ray cannot be used: {first}; look at its state with: ray status")


@contextmanager
def _quiet() -> Iterator[None]:
    """No statistics, no logging of Ray's; the environment and the logger are then as they were."""
    before = {name: os.environ.get(name) for name in (*QUIET, "RAY_AUTH_MODE")}  # the last is set by Ray
    os.environ.update({name: value for name, value in QUIET.items() if before[name] is None or "STATS" in name})
    logger = logging.getLogger("ray")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _silent() -> Iterator[None]:
    """A thread of Ray's prints what nodes tell of workers that died, to stdout, and no setting stops it. It comes as an
    exception, too."""
    module, name = import_module("ray._private.worker"), "print_to_stdstream"
    shown = getattr(module, name, None)
    if shown is not None:
        setattr(module, name, lambda *data, **options: None)
    try:
        yield
    finally:
        if shown is not None:
            setattr(module, name, shown)


@contextmanager
def _own_signals() -> Iterator[None]:
    """Ray takes signals when it is imported and when it starts; they are given back."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    handlers = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                if handler is not None and signal.getsignal(number) is not handler:
                    signal.signal(number, handler)
