"""`verify`: the command, its arguments, and the files that it writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import verify_tools
from click.testing import CliRunner
from conftest import weights
from safetensors.torch import save_file
from verify_tools import Q0, flip, tamper

from fossil_export import FossilExportError, merge, verify
from fossil_export.cli import main
from fossil_export.verifying._models import tokenize

bf16 = verify_tools.bf16


def test_adapter_given_as_another_file_of_its_folder(bf16: Path, tmp_path: Path) -> None:
    state = weights(tmp_path / "adapter")
    save_file({name: -value for name, value in state.items()}, tmp_path / "adapter" / "step100.safetensors")
    merge(tmp_path / "adapter" / "step100.safetensors", tmp_path / "early")
    result = verify(tmp_path / "early")
    assert result.parity, result.problems


def test_read_only_artifact_has_its_verdict(bf16: Path) -> None:
    (bf16 / "fossil_parity.json").mkdir()  # nothing can be written in its place, not even by root
    result = verify(bf16, level="weights")
    assert result.parity and "cannot be written" in result.warnings[0]


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fossil_export", "verify", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_command(bf16: Path, tmp_path: Path) -> None:
    done = run(bf16, "--json", "--report", tmp_path / "report.html")
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads(done.stdout)
    assert result["parity"] and len(result["tensors"]) == 21 and result["modules"]
    certificate = json.loads((bf16 / "fossil_parity.json").read_text())
    assert certificate["parity"] and certificate["forward"]["allowed_factor"] == 2.0
    assert certificate["versions"]["peft"] and certificate["device"].startswith("cpu")
    assert "Parity" in (tmp_path / "report.html").read_text()
    text = CliRunner().invoke(main, ["verify", str(bf16)])  # a process of its own imports for five seconds
    assert text.exit_code == 0 and "parity" in text.stdout and "21 tensors, 14 merged, 0 wrong" in text.stdout
    tamper(bf16, f"{Q0}.weight", flip)
    done = run(bf16, "--level", "weights")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(
        f"not the trained model: {Q0}.weight 1 of 2304 elements are off, the first at [24, 0]"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_no_gpu_is_said_and_never_quietly_the_cpu(bf16: Path) -> None:
    done = CliRunner().invoke(main, ["verify", str(bf16), "--device", "cuda"])
    assert done.exit_code == 1 and "no CUDA GPU" in done.output and done.output.count("\n") == 1
    assert not (bf16 / "fossil_parity.json").exists()


def test_bad_arguments(bf16: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    for options, message in (
        ({"prompts": tmp_path / "none.txt"}, "none.txt"),
        ({"prompts": tmp_path / "empty.txt"}, "no prompts"),
        ({"level": "deep"}, "expected weights, forward, all"),
        ({"adapter": tmp_path / "none"}, "no such file"),
        ({"report": tmp_path / "no" / "report.html", "level": "weights"}, "cannot be written"),
    ):
        with pytest.raises(FossilExportError, match=message):
            verify(bf16, **options)  # type: ignore[arg-type]
    (alone := tmp_path / "other.onnx_adapter").touch()
    with pytest.raises(FossilExportError, match="is an adapter alone; name the swappable folder"):
        verify(alone)
    (bf16 / "fossil_export.json").unlink()
    with pytest.raises(FossilExportError, match="name it with --adapter"):
        verify(bf16)
    assert verify(bf16, base=tmp_path / "base", adapter=tmp_path / "adapter", level="weights").parity


def test_verify_without_peft_says_how_to_get_it(bf16: Path) -> None:
    script = "import sys; sys.modules['peft'] = None\nfrom fossil_export.cli import main; main(sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", script, "verify", str(bf16)], capture_output=True, text=True)
    assert done.returncode == 1 and "pip install 'fossil-export[peft]'" in done.stderr
    weights_only = [sys.executable, "-c", script.replace("peft", "torch", 1), "verify", str(bf16), "--level", "weights"]
    assert subprocess.run(weights_only, capture_output=True).returncode == 0


def test_tokens_by_the_artifacts_tokenizer(real_base: Path, bf16: Path) -> None:
    assert tokenize(real_base, ("The sea",)) == [[504, 3426]]
    ids = tokenize(bf16, ("The sea", "x"))
    assert ids == tokenize(bf16, ("The sea", "x")) and all(0 <= token < 120 for row in ids for token in row)
