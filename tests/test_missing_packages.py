"""Packages that are missing: one line names all of them, and what installs them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import gguf_bases
import pytest
from conftest import make_adapter, make_base
from peft import FourierFTConfig, LoraConfig

from fossil_export import _extras
from fossil_export._extras import install, need, needing, require
from fossil_export.errors import MissingExtraError

ROOT = Path(__file__).parents[1]

# Runs command lines (JSON) in one process that finds none of the packages; prints (exit code, stderr) of each.
WITHOUT = """
import contextlib, io, json, sys

HIDDEN = set(sys.argv[1].split(","))

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
from fossil_export.cli import main

found = []
for line in json.loads(sys.argv[2]):
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            main(line, prog_name="fossil-export")
        except SystemExit as end:
            found.append((end.code, said.getvalue()))
print(json.dumps(found))
"""
ALL = ("gcsfs", "s3fs", *_extras.EXTRAS["genai"], *_extras.EXTRAS["gguf"], *_extras.EXTRAS["ray"])

NEEDS = {
    "merge A -o out --device cuda": "'fossil-export[torch]'",
    "merge A -o out --ray local": "'fossil-export[ray]'",
    "merge A -o out --base base.gguf": "'fossil-export[gguf,peft]'",
    "merge A -o out --base base.gguf --device cuda": "'fossil-export[gguf,peft]'",
    "merge A -o out --base base.gguf --ray auto": "'fossil-export[gguf,peft,ray]'",
    "merge A -o s3://bucket/model": "s3fs",
    "merge s3://bucket/a -o gs://bucket/model --base base.gguf": "'fossil-export[gguf,peft]' gcsfs s3fs",
    "merge A -o out --trained-on int8": "'fossil-export[peft]'",
    "merge PISSA -o out": "'fossil-export[torch]'",
    "merge FOURIER -o out": "'fossil-export[torch]'",
    "inspect FOURIER": "'fossil-export[torch]'",
    "verify merged": "'fossil-export[peft]'",
    "verify merged --report report.html": "'fossil-export[peft]'",
    "verify merged --base base.gguf": "'fossil-export[gguf,peft]'",
    "verify graph --adapter A --base base": "'fossil-export[onnx,peft]'",
    "verify graph --adapter A --base base --level weights": "'fossil-export[onnx]'",
    "verify graph --adapter A --base base.gguf": "'fossil-export[gguf,onnx,peft]'",
    "onnx A -o out": "'fossil-export[genai]'",
    "onnx A -o out --mode swappable --precision int4": "'fossil-export[genai]'",
    "onnx A -o out --runtime torch": "'fossil-export[genai]'",
    "onnx A -o out --base base.gguf": "'fossil-export[genai,gguf]'",
    "onnx A -o out --onnx graph/model.onnx --mode tiled": "'fossil-export[onnx]'",
    "onnx A --onnx graph/model.onnx --mode tiled --dry-run": "'fossil-export[onnx]'",
    "convert A --to gguf-lora -o out.gguf": "'fossil-export[gguf]'",
    "convert A --to gguf-lora -o out.gguf --base base.gguf": "'fossil-export[gguf,peft]'",
    "convert A --to onnx-adapter -o out.onnx_adapter --for graph": "'fossil-export[onnx]'",
}
WORKS = (
    "merge A -o whole",
    "merge BIN -o whole-bin",
    "inspect A",
    "onnx A --dry-run",
    "convert A --to lora -o lora",
    "verify whole --level weights --report report.html",
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("empty")
    base = make_base(folder / "base")
    make_adapter(folder / "A", base)
    make_adapter(folder / "PISSA", base, kind=LoraConfig, init_lora_weights="pissa")
    make_adapter(folder / "FOURIER", base, kind=FourierFTConfig, n_frequency=20)
    make_adapter(folder / "BIN", base).save_pretrained(folder / "BIN", safe_serialization=False)
    for path in (folder / "BIN").glob("*.safetensors"):
        path.unlink()
    gguf_bases.write(folder / "base.gguf")
    (folder / "graph").mkdir()
    (folder / "graph" / "model.onnx").write_bytes(b"a graph")
    return folder


@pytest.fixture(scope="module")
def said(place: Path) -> dict[str, tuple[int, str]]:
    lines = (*WORKS, "merge A -o merged", *NEEDS)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, ",".join(ALL), json.dumps([line.split() for line in lines])],
        cwd=place,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(place), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return {line: (code, text) for line, (code, text) in zip(lines, json.loads(done.stdout), strict=True)}


@pytest.mark.parametrize("line", NEEDS)
def test_one_line_names_all_that_a_command_line_needs(line: str, said: dict[str, tuple[int, str]]) -> None:
    code, text = said[line]
    (error,) = (one for one in text.splitlines() if one.startswith("error: "))
    assert code == 1 and error.endswith(f" install {NEEDS[line]}")


@pytest.mark.parametrize("line", WORKS)
def test_the_main_job_needs_none_of_them(line: str, said: dict[str, tuple[int, str]]) -> None:
    assert said[line][0] == 0, said[line][1]


def only(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    monkeypatch.setattr(_extras, "has", lambda module: module in names)


def test_what_is_there_is_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "pip", "onnx", "onnx_ir", "onnxruntime", "torch")
    with (
        needing(need("gguf"), need("onnx")),
        pytest.raises(
            MissingExtraError, match=r"^this needs accelerate, gguf, peft and transformers: .*\[gguf,peft\]'$"
        ),
    ):
        require("this", need("peft"))


def test_nothing_is_raised_for_what_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "gguf")
    with needing(need("ray")):
        require("this", need("gguf"))


@pytest.mark.parametrize(
    ("mark", "there", "expected"),
    [
        (None, (), "uv pip install --python {prefix}/bin/python 'fossil-export[peft]' s3fs"),
        (None, ("pip",), "{prefix}/bin/python -m pip install 'fossil-export[peft]' s3fs"),
        ("bin/pip", ("pip",), "pip install 'fossil-export[peft]' s3fs"),
        ("pipx_metadata.json", (), "pipx install --force 'fossil-export[peft]' && pipx inject fossil-export s3fs"),
        ("uv-receipt.toml", (), "uv tool install --with s3fs 'fossil-export[peft]'"),
    ],
)
def test_the_command_installs_into_this_environment(
    mark: str | None, there: tuple[str, ...], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch, *there)
    monkeypatch.setattr(_extras, "_is_pip_here", lambda: "pip" in there)
    (tmp_path / "bin").mkdir()
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(sys, "executable", f"{tmp_path}/bin/python")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin")
    if mark is not None:
        (tmp_path / mark).write_text("")
        (tmp_path / mark).chmod(0o755)
    assert install(["peft"], ["s3fs"]) == expected.format(prefix=tmp_path)
