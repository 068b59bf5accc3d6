"""Files that are cut while they are read, by us or by a library that maps them: one line, and no signal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fossil_export import convert
from fossil_export.checkpoints._folder import LocalFolder
from fossil_export.checkpoints._header import read_header
from fossil_export.checkpoints._input import InputFile
from fossil_export.errors import AdapterError, CheckpointError


def test_a_file_cut_under_the_reader_is_an_error_and_no_signal(tmp_path: Path) -> None:
    """In a process of its own, which a read through a map would have killed."""
    save_file({"weight": torch.zeros(1 << 20)}, tmp_path / "model.safetensors")
    script = """
import os, sys
from pathlib import Path
import numpy as np
from fossil_export.adapters._quantized import quantized_training
from fossil_export.checkpoints._header import read_header
from fossil_export.checkpoints._input import InputFile
from fossil_export.errors import CheckpointError
path = Path(sys.argv[1])
header = read_header(path)
file = InputFile(path, header)
os.truncate(path, 4096)
try:
    file.read(header.tensors[0].offset, np.empty(1 << 22, np.uint8))
except CheckpointError as problem:
    print(problem)
"""
    command = [sys.executable, "-c", script, str(tmp_path / "model.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "changed while it was being read" in done.stdout


def test_a_file_cut_while_it_is_copied_is_the_same_error(base: Path, adapter: Path, tmp_path: Path) -> None:
    """Untouched ranges go to the system through a map; it has no pages for what is gone."""
    big = {"untouched": torch.randn(3 << 20)}
    save_file(big | load_file(sorted(base.glob("*.safetensors"))[0]), base / "model.safetensors")
    header = read_header(base / "model.safetensors")
    file = InputFile(header.path, header)
    whole = file.view(0, header.size)
    os.truncate(header.path, 1 << 20)
    target = os.open(tmp_path / "copy", os.O_WRONLY | os.O_CREAT)
    with pytest.raises(OSError, match="Bad address"):
        for start in range(0, header.size, 1 << 20):
            os.pwrite(target, whole[start : start + (1 << 20)].data, start)
    os.close(target)
    del whole
    with pytest.raises(CheckpointError, match="changed while"):
        file.check()
    file.close()


def _cut_on_first_view(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """Cut `path` as soon as a piece of any file was asked for, which a map would answer with a signal."""
    view = LocalFolder.view

    def cutting(self: LocalFolder, name: str, offset: int, nbytes: int) -> object:
        found = view(self, name, offset, nbytes)
        os.truncate(path, 0)
        return found

    monkeypatch.setattr(LocalFolder, "view", cutting)


@pytest.mark.parametrize("target", ["lora", "miss"])
def test_an_adapter_cut_while_it_is_converted_is_an_error(
    target: str, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _cut_on_first_view(monkeypatch, adapter / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="changed while it was being read"):
        convert(adapter, tmp_path / "out", to=target)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="how a fault is told is the system's")
def test_a_file_cut_under_a_library_that_maps_it_ends_in_one_line(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(1 << 20)}, tmp_path / "model.safetensors")
    script = """
import os, sys
from fossil_export._mapped import tell_of_cut_files
from safetensors import safe_open
tell_of_cut_files()
with safe_open(sys.argv[1], "pt") as file:
    os.truncate(sys.argv[1], 4096)
    print(file.get_tensor("weight").sum())
"""
    command = [sys.executable, "-c", script, str(tmp_path / "model.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.startswith(f"error: {tmp_path / 'model.safetensors'}: was cut while it was being read")
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="how a fault is told is the system's")
def test_several_threads_that_read_what_is_cut_tell_it_once(tmp_path: Path) -> None:
    script = """
import os, sys, threading
import numpy as np
from fossil_export._mapped import tell_of_cut_files
tell_of_cut_files()
np.zeros(1 << 22, np.uint8).tofile(sys.argv[1])
mapped = np.memmap(sys.argv[1], np.float32, "r")
os.truncate(sys.argv[1], 0)
together = threading.Barrier(4)
for _ in range(4):
    threading.Thread(target=lambda: (together.wait(), mapped.sum())).start()
"""
    for _ in range(4):
        done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "weights")], capture_output=True, text=True)
        assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="how a fault is told is the system's")
def test_a_bus_error_that_is_no_cut_file_blames_none() -> None:
    script = """
import os, signal
from fossil_export._mapped import tell_of_cut_files
tell_of_cut_files()
os.kill(os.getpid(), signal.SIGBUS)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (-signal.SIGBUS, "")
