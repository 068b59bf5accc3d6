"""Every ONNX mode, runtime and precision of the real model, verified against the trainer: the table of docs/parity.md.

    python benchmarks/onnx_parity.py --output onnx_parity.md --json onnx_parity.json     # about half an hour on 2 cores

The plain graphs are made once each; "--runtime" and "--precision" take a part of the run.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import common
import smollm2

from fossil_export import FossilExportError, export_onnx, verify
from fossil_export.onnx.builders import BUILDERS

MODES = ("merged", "tiled", "fused", "swappable")
HEADER = (
    "graph",
    "precision",
    "mode",
    "trainer",
    "artifact",
    "as it runs",
    "KL",
    "top-1",
    "same continuations",
    "verdict",
)


def main(arguments: list[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--runtime", nargs="+", default=["genai", "torch"])
    parser.add_argument("--precision", nargs="+", default=["fp32", "fp16", "int4"])
    parser.add_argument("--mode", nargs="+", default=MODES)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prompts", help="one a line; the built-in sixteen by default")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for runtime in options.runtime:
            for precision in options.precision:
                folder = Path(temporary) / f"{runtime}-{precision}"
                rows += _rows(runtime, precision, options, folder)
    table = common.table(HEADER, map(_cells, rows)) + "\n"
    print(table)
    if options.output:
        common.publish(options.output, table)
    if options.json:
        common.write_json(options.json, rows)


def _rows(runtime: str, precision: str, options: Any, folder: Path) -> list[dict[str, Any]]:
    folder.mkdir()
    plain: Path | None = None
    rows = []
    for mode in options.mode:
        if mode == "tiled" and precision == "int4":
            continue
        output = folder / mode
        settings: dict[str, Any] = {"runtime": runtime, "precision": precision}
        if mode != "merged":
            if plain is None:
                plain = BUILDERS[runtime].build(smollm2.base_model(), folder / "plain", precision, options.device)
            settings = {"onnx": plain}
        export_onnx(smollm2.adapter(), output, mode=mode, device=options.device, **settings)
        rows.append({"graph": runtime, "precision": precision, "mode": mode} | _verified(output, options))
        print(common.row(_cells(rows[-1])), flush=True)
    return rows


def _cells(row: dict[str, Any]) -> list[Any]:
    return [row.get(name, "") for name in HEADER]


def _verified(output: Path, options: Any) -> dict[str, Any]:
    try:
        found = verify(output, device=options.device, prompts=options.prompts)
    except FossilExportError as problem:
        return {"verdict": str(problem)}
    assert found.forward is not None
    trainer, artifact = found.forward.trainer, found.forward.artifact
    return {
        "trainer": f"{trainer.relative_error:.1e} ({found.forward.trainer_dtype})",
        "artifact": f"{artifact.relative_error:.1e}",
        "as it runs": f"{as_run.relative_error:.1e}" if (as_run := found.forward.as_run) is not None else "",
        "KL": f"{artifact.kl:.0e}",
        "top-1": f"{artifact.top1:.1%}",
        "same continuations": f"{found.forward.same_continuations} of {found.forward.continuations}",
        "verdict": "parity" if found.parity else found.problems[0],
        "device": found.device,
    }


if __name__ == "__main__":
    main()
