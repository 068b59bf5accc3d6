"""How many threads compute, and how they wait for each other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import verify_tools

from fossil_export import Progress, _threads, verify
from fossil_export._cores import _quotas, cores
from fossil_export._threads import WAITING, bounded_torch

bf16 = verify_tools.bf16

V1 = "4:memory:/a\n1:cpuacct,cpu:/a/b\n0::/\n"


@pytest.mark.parametrize(
    ("groups", "files", "quotas"),
    [
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "150000 100000\n"}, [1.5]),
        ("0::/outside\n", {"cpu.max": "200000 100000\n"}, [2.0]),
        ("0::/../../b\n", {"cpu.max": "50000 100000\n", "../b/cpu.max": "100000 100000\n"}, [0.5]),
        (V1, {"cpu/a/b/cpu.cfs_quota_us": "300000", "cpu/a/b/cpu.cfs_period_us": "100000"}, [3.0]),
        (V1, {"cpu/a/b/cpu.cfs_quota_us": "-1", "cpu/a/b/cpu.cfs_period_us": "100000"}, []),
        ("0::/\nnonsense\n", {"cpu.max": "many cores"}, []),
    ],
)
def test_quotas_of_a_container(groups: str, files: dict[str, str], quotas: list[float], tmp_path: Path) -> None:
    (tmp_path / "groups").write_text(groups)
    for name, content in files.items():
        path = tmp_path / "mount" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    assert list(_quotas(tmp_path / "groups", tmp_path / "mount")) == quotas
    assert list(_quotas(tmp_path / "none", tmp_path / "mount")) == []


@pytest.mark.parametrize(("quota", "expected"), [(0.2, 1), (1.5, 2), (2.9, 3), (4096.0, 5)])
def test_no_more_cores_than_the_quota_and_the_affinity_allow(
    quota: float, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(5)), raising=False)
    monkeypatch.setattr("fossil_export._cores._quotas", lambda *files: iter([quota]))
    assert cores() == expected


def test_what_the_user_set_is_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_threads, "cores", lambda: 7)
    for given, expected in (("3", 3), ("4,2", 4), ("", 7), ("0", 7), ("many", 7)):
        monkeypatch.setenv("OMP_NUM_THREADS", given)
        assert _threads.threads() == expected
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert _threads.threads() == 7


def test_pytorch_takes_what_is_allowed_and_has_its_own_number_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        for allowed, expected in ((2, 2), (1, 1), (8, 4)):
            monkeypatch.setattr(_threads, "cores", lambda allowed=allowed: allowed)
            with bounded_torch():
                assert torch.get_num_threads() == expected
            assert torch.get_num_threads() == 4
        with bounded_torch(1):
            assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


SEEN = """
import json, os, sys
from fossil_export import _threads
if "own process" in sys.argv:
    _threads.wait_asleep()
_threads.import_torch()
left = {name: os.environ.get(name) for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
print(json.dumps(left))
"""


@pytest.mark.parametrize(
    ("own", "given", "seen", "left"),
    [
        (False, {}, "3000", {"OMP_WAIT_POLICY": None, "GOMP_SPINCOUNT": None}),
        (True, {}, "3000", WAITING),
        (True, {"GOMP_SPINCOUNT": "77"}, "77", {"OMP_WAIT_POLICY": None, "GOMP_SPINCOUNT": "77"}),
        (False, {"OMP_WAIT_POLICY": "active"}, None, {"OMP_WAIT_POLICY": "active", "GOMP_SPINCOUNT": None}),
    ],
)
def test_how_threads_wait(own: bool, given: dict[str, str], seen: str | None, left: dict[str, str | None]) -> None:
    """What OpenMP itself says that it was told, on being loaded."""
    environment = {name: value for name, value in os.environ.items() if name not in WAITING} | given
    done = subprocess.run(
        [sys.executable, "-c", SEEN, *(["own process"] if own else [])],
        env=environment | {"OMP_DISPLAY_ENV": "VERBOSE"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == left
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("this PyTorch has another OpenMP than GCC's")
    told = next(line for line in done.stderr.splitlines() if "GOMP_SPINCOUNT" in line)
    assert seen is None or f"'{seen}'" in told, told


def test_the_model_and_the_prompt_at_hand_are_told(bf16: Path) -> None:
    told: list[Progress] = []
    assert verify(bf16, level="forward", progress=told.append).parity
    steps = list(dict.fromkeys(one.step for one in told))
    models = ["the trained model in float64", "the trained model in bfloat16", "the artifact"]
    assert [step for step in steps if step in models] == models
    assert steps[-1] == "the artifact, continued"
    for model in models:
        last = [one for one in told if one.step == model][-1]
        assert (last.done, last.total, last.unit) == (16, 16, "prompts")
