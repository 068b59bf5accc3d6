"""Code of a model's own runs with --trust-remote-code, and in no other way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import edit_json, make_adapter, make_base

from fossil_export import FossilExportError, export_onnx, merge, plan_onnx, run_onnx, verify
from fossil_export._foreign import is_trusted
from fossil_export.cli import main

MAPPED = {"AutoConfig": "own_code.Config", "AutoModel": "own_code.Inner", "AutoModelForCausalLM": "own_code.Model"}
OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
open({ran!r}, "a").write("x")
class Config(LlamaConfig):
    model_type = "own"
class Inner(LlamaModel):
    config_class = Config
class Model(LlamaForCausalLM):
    config_class = Config
"""


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where transformers copies such code to, for this process and for its children."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    return tmp_path / "ran"


@pytest.fixture
def base(tmp_path: Path, ran: Path) -> Path:
    """A model that only its own code knows, and everything a folder could say to have it run."""
    base = make_base(tmp_path / "base", shards="1GB")
    make_adapter(tmp_path / "adapter", base)
    (base / "own_code.py").write_text(OWN_CODE.format(ran=str(ran)))
    asked = {"auto_map": MAPPED, "trust_remote_code": True, "hf_remote": True}
    edit_json(base / "config.json", model_type="own", architectures=["Model"], **asked)
    edit_json(base / "generation_config.json", trust_remote_code=True)
    return base


def test_verify_runs_it_only_if_told(base: Path, ran: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_TRUST_REMOTE_CODE", "TRUST_REMOTE_CODE", "HF_TRUST_REMOTE_CODE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr("builtins.input", lambda question: "y")
    merge(tmp_path / "adapter", tmp_path / "merged", base=base)
    parts = {"base": base, "adapter": tmp_path / "adapter"}
    with pytest.raises(FossilExportError, match=r"is run only with --trust-remote-code"):
        verify(tmp_path / "merged", **parts)
    assert not ran.exists()
    assert verify(tmp_path / "merged", **parts, level="weights", trust_remote_code=True).parity
    assert not ran.exists()  # that level needs none
    result = verify(tmp_path / "merged", **parts, trust_remote_code=True)
    assert result.parity and result.forward is not None and ran.exists()
    assert "trust" not in json.dumps(result.to_dict()) + (tmp_path / "merged" / "fossil_parity.json").read_text()
    assert not is_trusted()
    ran.unlink()
    with pytest.raises(FossilExportError, match="--trust-remote-code"):  # one trust is none for later
        verify(tmp_path / "merged", **parts)


def test_a_class_that_transformers_knows_is_the_folders_own_if_trusted(base: Path, ran: Path, tmp_path: Path) -> None:
    named = MAPPED | {"AutoModelForCausalLM": "own_code.LlamaForCausalLM"}
    edit_json(base / "config.json", model_type="llama", architectures=["LlamaForCausalLM"], auto_map=named)
    (base / "own_code.py").write_text(
        f"import transformers\nopen({str(ran)!r}, 'a').write('x')\n"
        "class Config(transformers.LlamaConfig):\n    pass\n"
        "class LlamaForCausalLM(transformers.LlamaForCausalLM):\n    config_class = Config\n"
    )
    merge(tmp_path / "adapter", tmp_path / "merged", base=base)
    assert verify(tmp_path / "merged", base=base, adapter=tmp_path / "adapter").parity and not ran.exists()
    assert verify(tmp_path / "merged", base=base, adapter=tmp_path / "adapter", trust_remote_code=True).parity
    assert ran.exists()


def test_onnx_runs_it_only_if_told(base: Path, ran: Path, tmp_path: Path) -> None:
    given = {"base": base, "runtime": "torch"}
    with pytest.raises(FossilExportError, match=r"is run only with --trust-remote-code"):
        export_onnx(tmp_path / "adapter", tmp_path / "out", **given)
    assert not ran.exists()
    plan = plan_onnx(tmp_path / "adapter", **given, trust_remote_code=True)
    assert not ran.exists() and "trust_remote_code" not in plan.to_dict()
    run_onnx(plan, tmp_path / "out")
    assert ran.exists() and "trust" not in (tmp_path / "out" / "fossil_export.json").read_text()
    ran.unlink()
    parts = {"base": base, "adapter": tmp_path / "adapter"}
    with pytest.raises(FossilExportError, match="--trust-remote-code"):
        verify(tmp_path / "out", **parts)
    assert not ran.exists()
    assert verify(tmp_path / "out", **parts, trust_remote_code=True).parity


def test_the_option_of_both_commands(base: Path, ran: Path, tmp_path: Path) -> None:
    merge(tmp_path / "adapter", tmp_path / "merged", base=base)
    named = ["--base", str(base), "--adapter", str(tmp_path / "adapter"), "--level", "forward"]
    told = CliRunner().invoke(main, ["verify", str(tmp_path / "merged"), *named])
    assert told.exit_code == 1 and "only with --trust-remote-code" in told.stderr and not ran.exists()
    told = CliRunner().invoke(main, ["verify", str(tmp_path / "merged"), *named, "--trust-remote-code"])
    assert told.exit_code == 0 and ran.exists()
    plan = ["onnx", str(tmp_path / "adapter"), "--base", str(base), "--dry-run", "--trust-remote-code", "--json"]
    told = CliRunner().invoke(main, plan)
    assert told.exit_code == 0 and "trust" not in told.stdout
