"""The commands as a user and as a program meet them."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from conftest import edit_json, make_adapter, make_base, weights
from safetensors.torch import load_file, save_file

import fossil_export
from fossil_export.cli import main

TOOL = [sys.executable, "-m", "fossil_export"]


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*TOOL, *map(str, arguments)], capture_output=True, text=True)


def test_json_is_only_json_and_a_pipe_is_quiet(adapter: Path, tmp_path: Path) -> None:
    done = run("merge", adapter, "--output", tmp_path / "merged", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads(done.stdout)
    assert result["tensors_merged"] == 14 and result["output"] == str(tmp_path / "merged")
    assert set(result["modules"]) == set(fossil_export.load_adapter(adapter).trained)
    assert 20e6 < result["peak_memory"] < 300e6 and result["seconds"] > 0
    assert result["bytes"] == sum(path.stat().st_size for path in (tmp_path / "merged").glob("*.safetensors"))


def test_table_at_the_end(adapter: Path, tmp_path: Path) -> None:
    done = run("merge", adapter, "--output", tmp_path / "merged")
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert lines["merged"] == "14 of 21 tensors (tile, r=8)" and lines["model"] == str(tmp_path / "merged")
    assert {"written", "time", "peak", "update"} < set(lines) and done.stderr == ""


def test_progress_bar_only_on_a_terminal(real_adapter: Path, tmp_path: Path) -> None:
    here, there = pty.openpty()
    fcntl.ioctl(there, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    command = [*TOOL, "merge", str(real_adapter), "--output", str(tmp_path / "merged"), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=there, text=True)
    readable, _, _ = select.select([here], [], [], 5)
    shown = os.read(here, 1 << 16).decode() if readable else ""
    os.close(there)
    os.close(here)
    assert done.returncode == 0 and json.loads(done.stdout)
    assert "merging" in shown and "B/s" in shown


def test_dry_run_prints_the_plan_and_writes_nothing(base: Path, tmp_path: Path) -> None:
    make_adapter(tmp_path / "adapter", base, target_modules=["q_proj"], modules_to_save=["lm_head"])
    done = run("merge", tmp_path / "adapter", "--dry-run", "--dtype", "bfloat16")
    assert "model.layers.{0–1}.self_attn.q_proj.weight" in done.stdout and "dtype = bfloat16" in done.stdout
    assert "merge 2, replace 1, cast 18" in done.stdout.partition("\n\n")[2]  # the summary comes last
    every = run("merge", tmp_path / "adapter", "--dry-run", "--all").stdout
    assert "model.layers.1.self_attn.q_proj.weight" in every and "{0–1}" not in every
    plan = json.loads(run("merge", tmp_path / "adapter", "--dry-run", "--json").stdout)
    assert plan["copied_tensors"] == 18 and [entry["action"] for entry in plan["tensors"]].count("merge") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_inspect(base: Path, tmp_path: Path) -> None:
    make_adapter(tmp_path / "adapter", base, target_modules=["q_proj"], modules_to_save=["lm_head"])
    found = json.loads(run("inspect", tmp_path / "adapter", "--json").stdout)
    assert (found["variant"], found["rank"], found["peft_type"]) == ("tile", 8, "MISS")
    assert found["parameters"] == 2 * 8 * 48 and found["dtypes"] == {"float32": 2}
    state = weights(tmp_path / "adapter")
    for module in found["modules"]:
        assert module["norm"] == pytest.approx(float(torch.linalg.norm(state[module["shard"]])), rel=1e-6)
    assert [entry["tensor"] for entry in found["saved"]] == ["base_model.model.lm_head.weight"]
    touched = [entry["tensor"] for entry in found["base_tensors"]]
    assert sorted(touched) == ["lm_head.weight", *(f"model.layers.{n}.self_attn.q_proj.weight" for n in (0, 1))]
    text = run("inspect", tmp_path / "adapter")
    assert text.returncode == 0 and "possible, touches 3 of 21 tensors" in text.stdout


def test_inspect_says_what_would_stop_a_merge(adapter: Path, tmp_path: Path) -> None:
    other = make_base(tmp_path / "other")
    for path in other.glob("*.safetensors"):
        state = {name: value[: len(value) // 2].clone() for name, value in weights(other).items()}
        save_file(state, path)
        break
    done = run("inspect", adapter, "--base", other, "--json")
    assert done.returncode == 1 and str(other) in json.loads(done.stdout)["problems"][0]
    key = "base_model.model.model.layers.0.self_attn.q_proj.miss_block"
    state = weights(adapter)
    state[key][0, 0] = float("nan")
    save_file(state, adapter / "adapter_model.safetensors")
    done = run("inspect", adapter, "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 1 and found["problems"] == [f"{key} holds infinite or NaN values"]
    assert next(module["norm"] for module in found["modules"] if module["shard"] == key) is None


def test_inspect_without_the_base_at_hand(adapter: Path) -> None:
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="org/model")
    done = run("inspect", adapter)
    assert done.returncode == 0 and "not checked" in done.stdout


def test_warnings_go_to_stderr(base: Path, tmp_path: Path) -> None:
    make_adapter(tmp_path / "adapter", base, change=lambda model: None)
    done = run("merge", tmp_path / "adapter", "--output", tmp_path / "merged", "--json")
    assert done.stderr.startswith("warning: every shard is zero") and json.loads(done.stdout)["warnings"]


def test_errors_go_to_stderr_and_exit_with_1(tmp_path: Path) -> None:
    done = run("merge", tmp_path / "nothing", "--output", tmp_path / "merged")
    assert (done.returncode, done.stdout) == (1, "")
    assert (
        done.stderr
        == f"error: {tmp_path / 'nothing'}: no such file or folder; download the adapter and name its folder\n"
    )


def test_help_needs_neither_numpy_nor_torch() -> None:
    script = (
        "import sys; from fossil_export.cli import main\n"
        "main(['merge', '--help'], standalone_mode=False)\n"
        "assert not {'numpy', 'torch', 'ml_dtypes', 'tqdm'} & set(sys.modules), sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0 and "--max-shard-size" in done.stdout, done.stderr


def test_merge_needs_no_torch(adapter: Path, tmp_path: Path) -> None:
    """Nor for a pickled adapter; and if torch is needed but missing, the error says how to get it."""
    script = "import sys; sys.modules['torch'] = None\nfrom fossil_export.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", script, "merge", str(adapter), "--output", str(tmp_path / "merged")]
    assert subprocess.run(command, capture_output=True).returncode == 0
    done = subprocess.run([*command[:-1], str(tmp_path / "gpu"), "--device", "cuda"], capture_output=True, text=True)
    assert done.returncode == 1 and "pip install 'fossil-export[torch]'" in done.stderr
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    assert subprocess.run([*command[:-1], str(tmp_path / "pickled")], capture_output=True).returncode == 0


def test_version_and_unknown_names() -> None:
    assert fossil_export.__version__ in CliRunner().invoke(main, ["--version"]).output
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = fossil_export.nonsense
    for name in fossil_export.__all__:
        assert getattr(fossil_export, name) is not None
