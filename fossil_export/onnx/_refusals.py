"""What can be refused before a graph is made."""

from __future__ import annotations

from fossil_export.adapters import Adapter
from fossil_export.errors import OnnxError
from fossil_export.methods import ROWS
from fossil_export.onnx._trained import is_tiled
from fossil_export.onnx.builders import PRECISIONS
from fossil_export.onnx.modes import MODES


def check_mode(adapter: Adapter, mode: str, precision: str | None = None) -> None:
    """Raise OnnxError for an adapter that this mode does not take."""
    if mode not in MODES:
        raise OnnxError(f"mode is {mode!r}, expected {', '.join(MODES)}")
    if parts := [one.method for one in adapter.trained.values() if one.method in ("lora_parameter", *ROWS)]:
        raise OnnxError(
            f"{adapter.path}: has {parts[0]} modules, which are not found in graphs; merge it, and export the merged "
            "model (optimum-cli export onnx)"
        )
    if adapter.config.get("layer_replication"):
        raise OnnxError(
            f"{adapter.path}: was trained on repeated layers (layer_replication), which a graph of the base lacks; "
            "merge it, and export the merged model (optimum-cli export onnx)"
        )
    if MODES[mode].low_rank and any(trained.form_rank is None for trained in adapter.trained.values()):
        raise OnnxError(
            f"{adapter.path}: is a {adapter.variant} adapter, whose update depends on the weight it changes and is no "
            "branch beside it; use --mode tiled or merged, or approximate it by a LoRA"
        )
    if MODES[mode].swaps and not all(map(is_tiled, adapter.trained.values())):
        raise OnnxError(
            f"{adapter.path}: is a {adapter.variant} adapter, whose branch has two matrices, and a graph to swap in "
            "has one input a layer; use --mode fused, tiled or merged"
        )
    if mode == "tiled" and any(one.form_rank is None and one.method != "bat" for one in adapter.trained.values()):
        raise OnnxError(f"{adapter.path}: is a {adapter.variant} adapter, which --mode tiled cannot write; use merged")
    codes = precision in PRECISIONS and PRECISIONS[precision].codes
    if codes and MODES[mode].floats and not MODES[mode].merges:
        raise OnnxError(
            f"--mode {mode} adds to float weights, and {precision} weights are codes; use --mode fused or swappable, "
            "or --mode merged, which quantizes the merged weights"
        )
