"""Parts of stored tensors from several adapters, merged where they lie, and what is refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import weights
from fused_tools import Spot, make, put

from fossil_export import FossilExportError, merge, plan_merge
from fossil_export.checkpoints import TensorInfo
from fossil_export.checkpoints._header import slice_of
from fossil_export.checkpoints.layouts import Order, fused_rows, transposed_slice
from fossil_export.merging._layout import tensor_record
from fossil_export.merging._run import Writer, in_place

SPOTS = {
    "q.weight": Spot("qkv", 0, 6, Order(1, 3, 2)),
    "k.weight": Spot("qkv", 7, 4),
    "v.weight": Spot("qkv", 11, 4),
    "kv.weight": Spot("qkv", 7, 8),
    "near.weight": Spot("qkv", 9, 4),
    "far.weight": Spot("qkv", 14, 4),
    "out.weight": Spot("out", 0, 9),
    "q.bias": Spot("bias", 0, 6, Order(1, 3, 2)),
    "k.bias": Spot("bias", 7, 4),
    "number.weight": Spot("numbers", 0, 2),
    "odd.bias": Spot("bias", 8, 5, Order(1, 3, 2)),
}
SHARD, OTHER = torch.randn(2, 4), torch.randn(3, 4)
BASE = {
    "bias": torch.randn(15).half(),
    "numbers": torch.ones(2, 5, dtype=torch.int8),
    "out": torch.randn(9, 3).half(),
    "qkv": torch.randn(15, 5).half(),
}


@pytest.fixture(autouse=True)
def placed(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, SPOTS)


def adapters(folder: Path, *held: dict[str, torch.Tensor]) -> list[Path]:
    """An adapter for each of `held`, all for one base."""
    return [
        make(folder / str(number), {}, tensors, base_model_name_or_path=str(base(folder)))
        for number, tensors in enumerate(held)
    ]


def base(folder: Path) -> Path:
    if not (folder / "common").exists():
        make(folder / "common", BASE, {"q.miss_block": SHARD})
    return folder / "common" / "base"


def test_adapters_that_change_parts_of_one_tensor(tmp_path: Path) -> None:
    """Each its own; updates to one part are added up."""
    values, bias = torch.randn(4, 5), torch.randn(4)
    first = {"k.miss_block": SHARD, "v.miss_block": SHARD}
    second = {"k.miss_block": OTHER, "q.base_layer.weight": torch.randn(6, 5), "q.miss_block": torch.randn(3, 6)}
    given = adapters(tmp_path, first, second | {"k.bias": bias})
    result = merge(given, tmp_path / "merged", weights=[0.5, 1])
    ours = weights(tmp_path / "merged")
    update = 0.5 * torch.cat([SHARD, SHARD, SHARD])[:5].T + torch.cat([OTHER, OTHER])[:5].T
    q = second["q.base_layer.weight"] + torch.cat([second["q.miss_block"]] * 2)[:5].T
    wanted = BASE["qkv"].float()
    wanted[:6] = q.reshape(2, 3, 5).transpose(0, 1).reshape(6, 5)
    wanted[7:11] += update
    wanted[11:] += 0.5 * torch.cat([SHARD] * 3)[:5].T
    torch.testing.assert_close(ours["qkv"].float(), wanted, rtol=1e-3, atol=1e-3)
    assert torch.equal(ours["qkv"][6], BASE["qkv"][6]) and torch.equal(ours["out"], BASE["out"])
    assert torch.equal(ours["bias"], torch.cat([BASE["bias"][:7], bias.half(), BASE["bias"][11:]]))
    record = {tensor.name: tensor_record(tensor) for tensor in result.plan.tensors}
    assert record["bias"]["action"] == "replace" and "source" not in record["bias"]
    assert record["bias"]["pieces"] == [{"elements": [7, 11], "tensor": "base_model.model.k.bias", "adapter": 1}]
    assert len(record["qkv"]["changes"]) == 4
    whole = adapters(tmp_path / "more", first, {"v.miss_block": SHARD, "k.weight": values})
    with pytest.raises(
        FossilExportError, match=r"a part of qkv, which .* changes in another way; such adapters cannot"
    ):
        plan_merge(whole)
    with pytest.raises(FossilExportError, match=r"holds whole trained tensors \(base_model.model.k.weight\), which"):
        plan_merge(whole[1], weights=[0.5])


@pytest.mark.parametrize(
    "held, message",
    [
        ([{"k.weight": torch.ones(4, 5)}, {"k.weight": torch.ones(4, 5)}], "qkv, which .* changes in another way"),
        ([{"k.weight": torch.ones(4, 5)}, {"near.miss_block": SHARD}], "qkv, which .* changes in another way"),
        ([{"k.miss_block": SHARD}, {"near.miss_block": SHARD}], "qkv, which .* changes in another way"),
        ([{"kv.weight": torch.ones(8, 5), "k.miss_block": SHARD}], "one part of qkv in two ways"),
        ([{"k.weight": torch.ones(4, 5), "near.weight": torch.ones(4, 5)}], "one part of qkv in two ways"),
        ([{"far.weight": torch.ones(4, 5)}], r"far.weight \[4, 5\] does not fit as part of qkv \[15, 5\]"),
        ([{"far.miss_block": SHARD}], r"qkv \[15, 5\] has no rows 14 to 17"),
        ([{"number.weight": torch.ones(2, 5)}], r"is F32 and would be part of numbers \[2, 5\], which is I8"),
        (
            [{"odd.bias": torch.ones(5)}],
            r"odd.bias \[5\] does not have the 6 rows that lie in another order in part of",
        ),
    ],
)
def test_what_cannot_be_put_together_is_refused(
    held: list[dict[str, torch.Tensor]], message: str, tmp_path: Path
) -> None:
    given = adapters(tmp_path, *({"out.miss_block": torch.ones(2, 9)} | one for one in held))
    with pytest.raises(FossilExportError, match=message) as found:
        plan_merge(given)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    "held, tensor",
    [
        ({"k.bias": 4}, "bias"),
        ({"k.weight": (4, 5)}, "qkv"),
        ({"k.base_layer.weight": (4, 5), "k.miss_block": ()}, "qkv"),
    ],
)
def test_values_that_are_not_finite(held: dict[str, Any], tensor: str, tmp_path: Path) -> None:
    """In a part that is brought, with a shard on it or not."""
    (name, shape), *shards = held.items()
    for value, message in (
        (torch.nan, f"adapter.*{name} holds infinite or NaN"),
        (1e6, f"{tensor}: overflows float16"),
    ):
        tensors = {"v.miss_block": SHARD, name: torch.full((shape,) if isinstance(shape, int) else shape, value)}
        (adapter,) = adapters(tmp_path / str(value), tensors | {shard: SHARD for shard, _ in shards})
        with pytest.raises(FossilExportError, match=message):
            merge(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_file_is_changed_where_it_lies(tmp_path: Path) -> None:
    """As a streamed merge does it: the base's file is the one that is written."""
    held = {"q.weight": torch.randn(6, 5), "k.miss_block": SHARD, "q.bias": torch.randn(6)}
    (adapter,) = adapters(tmp_path, held)
    merge(adapter, tmp_path / "merged")
    plan = plan_merge(adapter)
    (file,), (header,) = plan.files, plan.base.files
    assert in_place(file, header)
    elsewhere = replace(header, path=tmp_path / "other.safetensors")
    assert not in_place(file, elsewhere) and not in_place(file, replace(header, encoded=header.encoded + b" "))
    copy = tmp_path / "copy.safetensors"
    shutil.copyfile(header.path, copy)
    with Writer(plan) as writer:
        writer.change(file, copy, header.path)
    assert copy.read_bytes() == (tmp_path / "merged" / "model.safetensors").read_bytes() != header.path.read_bytes()


def test_rows_and_slices_that_are_not_there(tmp_path: Path) -> None:
    info = TensorInfo("whole", "F16", (3, 4, 5), tmp_path / "model.safetensors", 100)
    assert fused_rows(info, 4, 4).span == (20, 40) and transposed_slice(info, 2).span == (40, 60)
    assert slice_of(slice_of(info, 20, 40, (8, 5)), 5, 10, (2, 5)) == TensorInfo("whole", "F16", (2, 5), info.path, 150)
    assert Order(2, 3, 4).inverse.inverse == Order(2, 3, 4) and hash(Order(2, 3, 4)) == hash(Order(2, 3, 4))
    wrong: list[tuple[Any, str]] = [
        (lambda: fused_rows(info, 9, 4), "has no rows 9 to 12"),
        (lambda: fused_rows(info, -1, 2), "has no rows -1 to 0"),
        (lambda: fused_rows(slice_of(info, 0, 60, (60,)), 0, 1), r"whole \[60\] has no rows 0 to 0"),
        (lambda: fused_rows(info, 0, 4, Order(2, 3, 1)), "its 4 rows are not 2 times 3 times 1"),
        (lambda: transposed_slice(info, 3), "has no matrix 3"),
        (lambda: transposed_slice(slice_of(info, 0, 60, (12, 5)), 0), r"whole \[12, 5\] has no matrix 0"),
        (lambda: slice_of(info, 50, 20, (4, 5)), r"has no part \[4, 5\] at element 50"),
        (lambda: slice_of(info, 0, 20, (5, 5)), r"has no part \[5, 5\] at element 0"),
    ]
    for make_it, message in wrong:
        with pytest.raises(FossilExportError, match=message):
            make_it()
