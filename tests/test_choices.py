"""Each list of choices stands once: tables, types, and what the commands offer."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import click
import pytest

import fossil_export
from fossil_export import FossilExportError, convert
from fossil_export.artifacts._kinds import KINDS
from fossil_export.cards.kinds._table import CARDS
from fossil_export.cli import main
from fossil_export.converting import _gguf_lora as gguf_lora
from fossil_export.converting._converters import CONVERTERS, OPTIONS, OUTTYPES, Format, Outtype
from fossil_export.converting._options import Options
from fossil_export.verifying._levels import LEVELS

GIVEN: dict[str, Any] = {"base_config": "config.json", "graph": "folder", "rank": 4, "energy": 0.9, "outtype": "f16"}
STRANGE = [(to, name) for to, converter in CONVERTERS.items() for name in OPTIONS if name not in converter.takes]


def choices(command: str, option: str) -> list[str]:
    found = main.commands[command]
    (parameter,) = (one for one in found.params if option in one.opts)
    assert isinstance(parameter.type, click.Choice)
    return list(parameter.type.choices)


def test_types_are_their_tables() -> None:
    assert get_args(Format) == tuple(CONVERTERS)
    assert get_args(Outtype) == tuple(OUTTYPES) == tuple(gguf_lora._LARGEST)
    assert KINDS.keys() == CARDS.keys() and all(name == kind.name for name, kind in KINDS.items())
    assert OPTIONS.keys() == GIVEN.keys() <= set(Options.__dataclass_fields__)


def test_the_commands_offer_what_the_tables_hold() -> None:
    assert choices("convert", "--to") == list(CONVERTERS)
    assert choices("convert", "--outtype") == list(OUTTYPES)
    assert choices("verify", "--level") == list(LEVELS)
    assert choices("merge", "--dtype") == ["auto", "float32", "float16", "bfloat16"]


@pytest.mark.parametrize("name", CONVERTERS)
def test_a_converter_is_loaded_on_use(name: str, tmp_path: Path) -> None:
    with pytest.raises((AttributeError, FossilExportError)):  # it is there, and takes no adapter that is none
        CONVERTERS[name].write(None, tmp_path / "out", Options())  # type: ignore[arg-type]


@pytest.mark.parametrize(("to", "name"), STRANGE)
def test_an_option_for_another_converter_is_refused(to: str, name: str, adapter: Path, tmp_path: Path) -> None:
    line = re.escape(f"--to {to} takes no {OPTIONS[name]}, which is for ")
    with pytest.raises(FossilExportError, match=f"^{line}.*; leave it out$"):
        convert(adapter, tmp_path / "out", to=to, **{name: GIVEN[name]})  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_help_of_every_command_needs_no_numbers() -> None:
    script = (
        "import sys; from fossil_export.cli import main\n"
        "for name in ['', *main.commands]:\n"
        "    main([*filter(None, [name]), '--help'], standalone_mode=False)\n"
        "    found = {'numpy', 'torch', 'ml_dtypes', 'gguf', 'onnx', 'huggingface_hub', 'tqdm'} & set(sys.modules)\n"
        "    assert not found, (name, found)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_kinds_know_neither_cards_nor_the_hub() -> None:
    folder = Path(fossil_export.__file__).parent / "artifacts"
    for path in folder.glob("*.py"):
        assert not re.search(r"fossil_export\.(cards|publishing|commands)", path.read_text()), path


def test_a_folder_of_two_kinds_is_of_the_one_its_record_names(tmp_path: Path) -> None:
    from fossil_export.artifacts._kind import Look
    from fossil_export.artifacts._kinds import kind_of
    from fossil_export.errors import CheckpointError

    names = ("model.onnx", "model.safetensors", "a.gguf")
    for record, kind in ((None, "onnx"), ({"artifact": "merged"}, "merged"), ({"artifact": ["onnx"]}, "onnx")):
        found = kind_of(Look(tmp_path, names, record, CheckpointError))
        assert found is not None and found.name == kind
    assert kind_of(Look(tmp_path, ("notes.txt", "checkpoint/model.safetensors"), None, CheckpointError)) is None
