"""What can be refused before a graph is made."""

from __future__ import annotations

from collections.abc import Sequence

from fossil_export.adapters import Adapter, Trained
from fossil_export.errors import OnnxError, listed
from fossil_export.methods import ROWS
from fossil_export.onnx._trained import comes_in_blocks, is_linear
from fossil_export.onnx.builders import PRECISIONS
from fossil_export.onnx.modes import MODES, Mode


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
    formless = [trained for trained in adapter.trained.values() if trained.form_rank is None]
    if MODES[mode].low_rank and formless:
        _refuse_formless(adapter, formless, MODES[mode])
    codes = precision in PRECISIONS and PRECISIONS[precision].codes
    if codes and MODES[mode].floats and not MODES[mode].merges:
        raise OnnxError(
            f"--mode {mode} adds to float weights, and {precision} weights are codes; use --mode fused or swappable, "
            "or --mode merged, which quantizes the merged weights"
        )


def _refuse_formless(adapter: Adapter, formless: Sequence[Trained], mode: Mode) -> None:
    """Raise OnnxError for what is no branch beside a linear layer, unless the mode takes it as blocks."""
    others = [trained for trained in formless if not comes_in_blocks(trained)]
    if others:
        why = "is no branch beside a linear layer" if mode.name != "tiled" else "is no sum of a few constants"
        raise OnnxError(
            f"{adapter.path}: the update of {listed([trained.module for trained in others])} ({others[0].method}) "
            f"{why}; use --mode merged"
        )
    if not mode.blocks:
        raise OnnxError(
            f"{adapter.path}: is a {adapter.variant} adapter, whose update depends on the weight it changes and is no "
            "branch beside it; use --mode tiled or merged, or approximate it by a LoRA"
        )


def check_products(adapter: Adapter) -> None:
    """Raise OnnxError for what is no product of a graph that is there already, and so is not changed in it."""
    others = [trained.module for trained in adapter.trained.values() if not is_linear(trained)]
    if others:
        raise OnnxError(
            f"{adapter.path}: trained more than weights of linear layers ({listed(others)}), and only these are "
            "changed in a graph that is there; leave --onnx out, so that it is made of the merged model"
        )
