"""The ways to put trained tensors into a graph: one file each, one entry in `MODES`.

The table is all that the command's help needs; a mode's file is imported when its graph is rewritten. That file has

    rewrite(graph, editor) -> slots       the optional inputs that the graph got; empty but for a mode that swaps
    makes_weights(graph) -> bool          only if its entry says `new_weights`: whether it does so in this graph
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

ModeName = Literal["merged", "tiled", "fused", "swappable"]


@dataclass(frozen=True)
class Mode:
    """What must be known of a mode before a graph is touched; `name` is that of its file (`_name.py`), `help` a line
    for users.

    `opset` is the oldest that has its operators. `low_rank`: takes only updates of the exact low-rank form; `blocks`:
    and bat's. `floats`: adds to float weights, which codes are not. `new_weights`: may make weights anew, so that the
    base's data file is of no more use. `merges`: a graph that is made here is made from the merged model. `swaps`: the
    trained tensors are inputs, and lie in an adapter file beside the graph.
    """

    name: str
    help: str
    opset: int
    low_rank: bool = False
    blocks: bool = False
    floats: bool = False
    new_weights: bool = False
    merges: bool = False
    swaps: bool = False

    def rewrite(self, graph: Any, editor: Any) -> Sequence[Any]:
        """Put the trained tensors into every place of `graph` (an `OpenGraph`), by an `Editor`; gives `Slot`s."""
        found: Sequence[Any] = self._file().rewrite(graph, editor)
        return found

    def makes_weights(self, graph: Any) -> bool:
        """Whether weights of this graph (an `OpenGraph`) are made anew."""
        return self.new_weights and bool(self._file().makes_weights(graph))

    def _file(self) -> Any:
        return import_module(f"{__name__}._{self.name}")


MODES = {
    mode.name: mode
    for mode in (
        Mode("merged", "plain graph", 1, floats=True, new_weights=True, merges=True),
        Mode("tiled", "base weights shared, sum folded at load", 13, low_rank=True, blocks=True, floats=True),
        Mode("fused", "branches with what was trained inside", 13, low_rank=True, new_weights=True),
        Mode("swappable", "adapters loaded while the session runs", 15, low_rank=True, swaps=True),  # Shape of a range
    )
}
