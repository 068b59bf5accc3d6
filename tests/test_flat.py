"""Memory does not grow with the width of weights, the rank, the number of cores, or what is merged together.

Most merges run in a process of their own, on sparse files, into a sink that throws bytes away.
"""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import flat
import ml_dtypes
import numpy as np
import pytest
import sparse

from fossil_export.merging import _memory
from fossil_export.merging._infinite import became_infinite
from fossil_export.merging._kept import Kept

LIMIT = 250e6

WIDE = sparse.llama(1024, 28672, 1, 8, 4, 64)


def peak(tmp_path: Path, kind: str, rank: int, dtype: str, cores: int, **more: object) -> float:
    """Largest resident bytes of a merge into three weights of 59 MB in bfloat16."""
    adapters = flat.make(tmp_path / "base", WIDE, dtype, [(kind, rank)])
    found = flat.run({"base": str(tmp_path / "base"), "adapters": adapters, "cores": cores, **more})
    assert found["bytes"] > 150e6
    return float(found["peak"])


@pytest.mark.parametrize(("kind", "rank", "dtype"), [("tile", 512, "BF16"), ("bat", 512, "F32"), ("dora", 16, "BF16")])
def test_a_merge_stays_under_250_mb_on_many_cores(kind: str, rank: int, dtype: str, tmp_path: Path) -> None:
    assert peak(tmp_path, kind, rank, dtype, cores=64) < LIMIT


def test_more_cores_take_no_more_threads_than_memory_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fossil_export.merging._planning import plan_merge

    adapters = flat.make(tmp_path / "base", WIDE, "BF16", [("lora", 512)])
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    (file,) = plan_merge(adapters[0], tmp_path / "base").files
    bounds = _memory.bounds_of(file, 1 << 19)
    whole = 512 * 28672 * 4  # A of down_proj, which every thread needs
    assert 1 < bounds.threads < _memory.THREADS and bounds.room >= whole


def test_a_slab_of_bat_is_a_part_of_a_block(tmp_path: Path) -> None:
    from fossil_export.merging._planning import plan_merge
    from fossil_export.merging._slabs import SLAB, slabs

    adapters = flat.make(tmp_path / "base", WIDE, "BF16", [("bat", 512)])
    (file,) = plan_merge(adapters[0], tmp_path / "base").files
    found = list(slabs(file))
    assert max(slab.nbytes for slab in found) <= SLAB
    assert sum(slab.nbytes for slab in found) == file.size - len(file.header)


def test_the_oldest_slab_gets_what_it_needs_and_younger_ones_wait() -> None:
    import threading

    import numpy as np

    kept, order = Kept(100), []
    begun, go = threading.Event(), threading.Event()

    def young() -> None:
        with kept.turn():
            begun.set()
            kept.get("b", lambda: order.append("b") or np.zeros(80, np.uint8), 80)

    with kept.turn():
        kept.get("a", lambda: order.append("a") or np.zeros(80, np.uint8), 80)
        thread = threading.Thread(target=young)
        thread.start()
        begun.wait()
        assert not go.wait(0.05) and order == ["a"]
        kept.get("c", lambda: order.append("c") or np.zeros(80, np.uint8), 80)
    thread.join(60)
    assert order == ["a", "c", "b"]


def test_many_small_tensors_are_few_writes(tmp_path: Path) -> None:
    from fossil_export.merging._planning import plan_merge
    from fossil_export.merging._run import merge_files

    model = sparse.llama(8, 8, 60, 1, 1, 8)
    adapters = flat.make(tmp_path / "base", model, "BF16", [("tile", 4)])
    plan = plan_merge(adapters[0], tmp_path / "base")
    writes: list[tuple[int, int]] = []

    class Counting(sparse.Nowhere):
        def create(self, name: str, size: int, hash: bool = False) -> Counting:  # noqa: A002
            return self

        def write(self, offset: int, data: object) -> None:
            writes.append((offset, len(data)))  # type: ignore[arg-type]

    (result,) = merge_files(plan, Counting())
    assert len(writes) == 2 and sum(size for _, size in writes) == plan.files[0].size
    assert len(result.survival) == 420


def test_infinities_of_a_base_are_looked_at_a_few_at_a_time() -> None:
    data = np.full((512, 4096), -np.inf, np.float32)  # a slab of a mask, say
    out = data.astype(ml_dtypes.bfloat16)
    tracemalloc.start()
    try:
        assert not became_infinite(data, out)
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
    finally:
        tracemalloc.stop()
    data[-1, -1] = 3.4e38  # the last one, which bfloat16 has no number for
    assert became_infinite(data, out)
