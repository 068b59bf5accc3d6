"""A transformers that is missing, old or broken: what the table knows goes on as ever, the rest is told in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import edit_json, make_adapter, make_base

from fossil_export import _extras
from fossil_export._libraries import config_class
from fossil_export.errors import FossilExportError

CLI = (sys.executable, "-m", "fossil_export")

# As a module `transformers` that stands first on the path, beside a `torch` that cannot be imported, or that can.
INSTALLED = {
    "none": 'raise ModuleNotFoundError("No module named \'transformers\'", name="transformers")',
    "old": "__version__ = '4.40.0'\nCONFIG_MAPPING = {}\nclass PreTrainedModel: ...",
    "broken": "raise RuntimeError('undefined symbol')",
}


@pytest.fixture(params=INSTALLED)
def environment(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, str]:
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "transformers.py").write_text(INSTALLED[request.param])
    if request.param == "none":
        (tmp_path / "first" / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\")")
    root = str(Path(__file__).parents[1])
    return {"PYTHONPATH": f"{tmp_path / 'first'}:{root}", "PATH": "/usr/bin:/bin"}


def plan(tmp_path: Path, environment: dict[str, str]) -> tuple[int, str]:
    command = [*CLI, "merge", str(tmp_path / "adapter"), "-o", str(tmp_path / "merged"), "--dry-run"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr.strip() or done.stdout


def test_what_the_table_knows_is_merged(tmp_path: Path, environment: dict[str, str]) -> None:
    make_adapter(tmp_path / "adapter", make_base(tmp_path / "base", tie=True), modules_to_save=["embed_tokens"])
    code, said = plan(tmp_path, environment)
    assert code == 0 and "tie_word_embeddings = False" in said


def test_a_model_of_neither_is_merged_by_plain_names(tmp_path: Path, environment: dict[str, str]) -> None:
    make_adapter(tmp_path / "adapter", make_base(tmp_path / "base"))
    edit_json(tmp_path / "base" / "config.json", model_type="newer_than_all", architectures=["NewerForCausalLM"])
    assert plan(tmp_path, environment)[0] == 0


def test_what_needs_knowledge_is_refused_in_one_line(tmp_path: Path, environment: dict[str, str]) -> None:
    make_adapter(tmp_path / "adapter", make_base(tmp_path / "base", tie=True), modules_to_save=["embed_tokens"])
    edit_json(tmp_path / "base" / "config.json", model_type="newer_than_all", architectures=["NewerForCausalLM"])
    code, said = plan(tmp_path, environment)
    assert code == 1 and len(said.splitlines()) == 1
    assert "install a transformers that knows the model" in said


def test_a_tied_model_whose_embedding_was_trained_needs_no_transformers(tmp_path: Path) -> None:
    """To import it takes seconds and some hundred MB, and the head's shape is that of the embedding it was tied to."""
    make_adapter(tmp_path / "adapter", make_base(tmp_path / "base", tie=True), modules_to_save=["embed_tokens"])
    program = (
        "import sys; from fossil_export import plan_merge; plan = plan_merge(sys.argv[1])\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)), plan.config_edits)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "adapter"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[] {'tie_word_embeddings': False}"


@pytest.mark.parametrize("architectures", [..., None, []])
def test_a_config_that_names_no_class_is_merged(architectures: object, tmp_path: Path) -> None:
    make_adapter(tmp_path / "adapter", make_base(tmp_path / "base"))
    edit_json(tmp_path / "base" / "config.json", architectures=architectures)
    done = subprocess.run(
        [*CLI, "merge", str(tmp_path / "adapter"), "-o", str(tmp_path / "merged"), "--json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout)["tensors_merged"] == 14


def test_what_needs_transformers_5_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_extras, "version", lambda name: "4.57.6")
    with pytest.raises(FossilExportError) as raised:
        _extras.needs_transformers_5("model.gguf: a GGUF file as a base")
    assert str(raised.value) == (
        "model.gguf: a GGUF file as a base needs transformers 5 or later, not 4.57.6: pip install 'transformers>=5'"
    )
    monkeypatch.setattr(_extras, "version", lambda name: "5.0.0rc1")
    _extras.needs_transformers_5("that")


def test_the_configs_of_transformers_4_have_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    old = SimpleNamespace(PretrainedConfig=dict)
    monkeypatch.setitem(sys.modules, "transformers", old)  # type: ignore[arg-type]
    assert config_class() is dict
