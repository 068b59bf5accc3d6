"""Code that lies in the current folder, or came with a base, an adapter or an artifact, does not run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import edit_json, make_adapter, make_base
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from fossil_export import FossilExportError, convert, export_onnx, load_adapter, merge, verify
from fossil_export.verifying._models import tokenize

OWN_CLASSES = {"AutoConfig": "own_code.Config", "AutoModel": "own_code.Model", "AutoModelForCausalLM": "own_code.Model"}
OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class Config(LlamaConfig):
    model_type = "own"
class Model(LlamaForCausalLM):
    config_class = Config
"""
# Packages that the commands import, modules that GenAI's builder imports by bare names, and one a config names.
PLANTED = [
    "builder_config", "builders", "click", "gguf", "huggingface_hub", "kernels", "numpy", "onnx", "onnx_ir",
    "onnxruntime", "onnxruntime_genai", "peft", "planted", "quantization", "safetensors", "tokenizers", "torch", "tqdm",
    "transformers",
]  # fmt: skip
KERNELS = """
from pathlib import Path
def get_kernel(name, **options):
    Path({ran!r}).touch()
    raise FileNotFoundError(name)
class Anything:
    def __call__(self, *arguments, **options):
        return lambda decorated: decorated
    def __getattr__(self, name):
        return self
    def __or__(self, other):
        return self
def __getattr__(name):
    if name.startswith("_"):
        raise AttributeError(name)
    return Anything()
"""


def plant(path: Path, ran: Path, more: str = "") -> None:
    """A Python file that leaves a trace when it runs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"open({str(ran)!r}, 'a').write({path.name!r} + ' ')\n{more}")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with a tokenizer, and an adapter."""
    folder = tmp_path_factory.mktemp("models")
    base = make_base(folder / "base", shards="1GB")
    tokenizer = Tokenizer(WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(base / "tokenizer.json"))
    edit_json(base / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", unk_token="[UNK]")
    make_adapter(folder / "adapter", base)
    return folder


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    """The trace of planted code."""
    return tmp_path / "ran"


@pytest.fixture
def base(models: Path, tmp_path: Path, ran: Path) -> Path:
    """A base with code for everything that transformers lets a folder bring code for."""
    base = shutil.copytree(models / "base", tmp_path / "base")
    plant(base / "own_code.py", ran, OWN_CODE)
    plant(base / "custom_generate" / "generate.py", ran, "def generate(model, **options):\n    return None\n")
    edit_json(base / "config.json", auto_map=OWN_CLASSES)
    edit_json(base / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "own_code.Model"]})
    edit_json(base / "generation_config.json", custom_generate=str(base), trust_remote_code=True)
    return base


@pytest.fixture
def adapter(models: Path, tmp_path: Path, ran: Path) -> Path:
    """An adapter that names a module to be imported; it lies in the adapter's folder."""
    adapter = shutil.copytree(models / "adapter", tmp_path / "adapter")
    plant(adapter / "planted.py", ran)
    mapping = {"base_model_class": "Model", "parent_library": "planted"}
    edit_json(adapter / "adapter_config.json", auto_mapping=mapping, base_model_name_or_path=str(tmp_path / "base"))
    return adapter


def unknown(base: Path) -> Path:
    """The base, as a model that only its own code knows."""
    edit_json(base / "config.json", model_type="own", architectures=["Model"])
    return base


def run(command: list[str], cwd: Path, *path: str) -> str:
    """What a command says, run in `cwd` with these entries at the end of PYTHONPATH; it must succeed."""
    entries = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*entries, *path])}
    done = subprocess.run(command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def hostile(tmp_path: Path, ran: Path) -> Path:
    """A folder full of Python files, to run commands in."""
    for name in PLANTED:
        plant(tmp_path / "hostile" / f"{name}.py", ran, "raise ImportError('of the current folder')\n")
    return tmp_path / "hostile"


COMMANDS = """
import json, sys
from fossil_export import _start
from fossil_export.cli import main
for command in json.loads(sys.argv[1]):
    main(command, prog_name="fossil-export", standalone_mode=False)
    print("done", command[0])
"""
# In one process, which imports what all of them need; only GenAI's builder is another one.


def test_all_commands(base: Path, adapter: Path, hostile: Path, ran: Path) -> None:
    """Code lies everywhere, and PYTHONPATH ends with an empty entry, which Python takes for the current folder."""
    plain, named = str(adapter), ["--base", str(base), "--adapter", str(adapter)]
    commands = [
        ["merge", plain, "--output", "merged"],
        ["verify", "merged", *named],
        ["onnx", plain, "--output", "chat", "--runtime", "genai"],
        ["onnx", plain, "--output", "graph", "--runtime", "torch"],
        ["verify", "graph", *named],
        ["convert", plain, "--output", "lora", "--to", "lora"],
        ["verify", "lora", *named],
        ["convert", plain, "--output", "lora.gguf", "--to", "gguf-lora"],
    ]
    program = str(Path(sys.executable).with_name("fossil-export"))
    run([program, "inspect", plain], hostile, "")
    assert not ran.exists(), ran.read_text()
    script = base.parent / "commands" / "run.py"
    script.parent.mkdir()
    script.write_text(COMMANDS)
    told = run([sys.executable, str(script), json.dumps(commands)], hostile, "")
    assert [line.split()[1] for line in told.splitlines() if line.startswith("done ")] == [it[0] for it in commands]
    assert told.count("parity") >= 3 and not ran.exists(), (told, ran.exists() and ran.read_text())


def test_started_as_a_module(adapter: Path, base: Path, hostile: Path, ran: Path) -> None:
    told = run([sys.executable, "-m", "fossil_export", "inspect", str(adapter)], hostile)
    assert "MISS" in told and not ran.exists()


def test_the_current_folder_by_name_stays(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("print('mine')")
    code = "import fossil_export.cli, mine"
    assert run([sys.executable, "-P", "-c", code] if sys.version_info >= (3, 11) else [sys.executable, "-c", code],
               tmp_path, "", str(tmp_path)) == "mine\n"  # fmt: skip


@pytest.mark.parametrize("trust", [False, True])
def test_how_the_builder_is_started(trust: bool, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GenAI before 0.15 runs a model's code unless told not to. This one tells how it was started, and fails."""
    builder = tmp_path / "installed" / "onnxruntime_genai" / "models" / "builder.py"
    builder.parent.mkdir(parents=True)
    for folder in builder.parents[:2]:
        (folder / "__init__.py").touch()
    told = tmp_path / "told"
    builder.write_text(
        "import importlib.util, json, os, sys\nkernels = importlib.util.find_spec('kernels')\n"
        "told = [sys.argv[1:], sys.path, kernels, sys.stdin.read(), os.environ['GIT_DIR']]\n"
        f"json.dump(told, open({str(told)!r}, 'w'))\nsys.exit('failed on purpose')\n"
    )
    (tmp_path / "here").mkdir()
    plant(tmp_path / "here" / "kernels.py", tmp_path / "ran")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("PYTHONPATH", f":{builder.parents[2]}:")
    with pytest.raises(FossilExportError, match="failed on purpose"):
        export_onnx(models / "adapter", "out", base=models / "base", runtime="genai", trust_remote_code=trust)
    arguments, path, kernels, typed, repository = json.loads(told.read_text())
    assert arguments[-2:] == ["--extra_options", f"hf_remote={str(trust).lower()}"] and path[0] == str(
        builder.parents[2]
    )
    assert str(tmp_path / "here") not in path and "" not in path
    assert not any(Path(entry, "run_genai.py").exists() for entry in path)
    assert (kernels, typed, repository) == (None, "", os.devnull)


@pytest.mark.parametrize("runtime", ["genai", "torch"])
def test_a_model_that_needs_its_code(
    runtime: str, base: Path, models: Path, ran: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda question: "y")  # transformers asks who sits at a terminal
    with pytest.raises(FossilExportError, match="needs Python code of its own") as caught:
        export_onnx(models / "adapter", tmp_path / "out", base=unknown(base), runtime=runtime)
    assert not ran.exists() and "\n" not in str(caught.value) and not (tmp_path / "out").exists()
    assert str(caught.value).startswith(f"{base}: ")


def test_verify_a_model_that_needs_its_code(
    base: Path, models: Path, ran: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda question: "y")
    merge(models / "adapter", tmp_path / "merged", base=unknown(base))
    assert (tmp_path / "merged" / "own_code.py").exists()  # whoever trusts it finds it there
    with pytest.raises(FossilExportError, match="needs Python code of its own"):
        verify(tmp_path / "merged", base=base, adapter=models / "adapter", level="forward")
    assert (
        verify(tmp_path / "merged", base=base, adapter=models / "adapter", level="weights").parity and not ran.exists()
    )


@pytest.mark.parametrize("name", ["pipeline", "HfArgumentParser", "AutoTokenizer"])
def test_architectures_that_are_no_model(name: str, models: Path, tmp_path: Path) -> None:
    base = shutil.copytree(models / "base", tmp_path / "base")
    edit_json(base / "config.json", architectures=[name])
    with pytest.raises(FossilExportError, match=f"architectures names {name}, which is no model"):
        export_onnx(models / "adapter", tmp_path / "out", base=base, runtime="torch")


def test_tokenizers_that_are_none(models: Path, tmp_path: Path) -> None:
    base = shutil.copytree(models / "base", tmp_path / "base")
    edit_json(base / "tokenizer_config.json", tokenizer_class="AutoModelForCausalLM")
    with pytest.raises(FossilExportError, match="tokenizer_class names AutoModelForCausalLM, which is no tokenizer"):
        tokenize(base, ("a b",))


@pytest.fixture
def kernels(tmp_path: Path, ran: Path) -> str:
    """The folder of an installed package `kernels`, which leaves a trace if it is asked for code."""
    plant(tmp_path / "installed" / "kernels" / "__init__.py", tmp_path / "imported", KERNELS.format(ran=str(ran)))
    distribution = tmp_path / "installed" / "kernels-0.18.2.dist-info"
    distribution.mkdir()
    (distribution / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n")
    return str(distribution.parent)


def test_kernels_of_the_hub(models: Path, ran: Path, tmp_path: Path, kernels: str) -> None:
    """`kernels`, where it is installed, fetches and runs what a config names as attention."""
    base = shutil.copytree(models / "base", tmp_path / "base")
    edit_json(base / "config.json", attn_implementation="someone/attention", use_kernels=True)
    merge(models / "adapter", tmp_path / "merged", base=base)
    command = [sys.executable, "-m", "fossil_export", "verify", str(tmp_path / "merged"), "--level", "forward"]
    told = run([*command, "--base", str(base), "--adapter", str(models / "adapter")], tmp_path, kernels)
    assert "parity" in told and not ran.exists()


CLASSES_THAT_ASK = """
import sys
from pathlib import Path
import torch
from transformers import MraConfig, MraModel
from transformers.models.mra import modeling_mra
from fossil_export._foreign import load_model, model_class, read_config, trusting
from fossil_export._libraries import without_kernels
from fossil_export.models import architecture
ran, folder = map(Path, sys.argv[1:])
for name in ("is_torch_cuda_available", "is_cuda_platform", "is_ninja_available"):
    vars(modeling_mra)[name] = lambda: True
config = MraConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)
config.architectures = ["MraModel"]
with without_kernels():
    MraModel(config).save_pretrained(folder)
    architecture(config.to_dict(), "MraModel", exact=True)
with trusting(False):
    read = read_config(folder)
    load_model(model_class(read, "AutoModel"), folder, read)
    from transformers.integrations.hub_kernels import lazy_load_kernel
    lazy_load_kernel("falcon_mamba-ssm"), lazy_load_kernel("causal-conv1d")
assert not ran.exists()
MraModel(config)  # whoever uses transformers in the same process has it as it was
assert ran.exists()
"""


def test_kernels_that_classes_ask_for(ran: Path, tmp_path: Path, kernels: str) -> None:
    run([sys.executable, "-c", CLASSES_THAT_ASK, str(ran), str(tmp_path / "model")], tmp_path, kernels)


def test_an_adapter_in_a_base(models: Path, tmp_path: Path) -> None:
    base = shutil.copytree(models / "base", tmp_path / "base")
    shutil.copy(models / "adapter" / "adapter_config.json", base)
    for runtime in ("genai", "torch"):
        with pytest.raises(FossilExportError, match=r"holds adapter_config\.json, and transformers would load"):
            export_onnx(models / "adapter", tmp_path / "out", base=base, runtime=runtime, mode="fused")


def test_a_lora_that_names_modules(models: Path, ran: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(tmp_path / "installed" / "megatron" / "planted.py", ran)
    monkeypatch.syspath_prepend(tmp_path / "installed")
    convert(models / "adapter", tmp_path / "lora", to="lora", base=models / "base")
    config = tmp_path / "lora" / "adapter_config.json"
    edit_json(config, megatron_config={"a": 1}, megatron_core="megatron.planted")
    with pytest.raises(FossilExportError, match=r"sets megatron_config, which may name modules"):
        verify(tmp_path / "lora", base=models / "base", adapter=models / "adapter")
    assert not ran.exists()


def test_pickles_are_read_without_pytorchs_unpickler(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = shutil.copytree(models / "adapter", tmp_path / "adapter")
    state = load_file(adapter / "adapter_model.safetensors")
    torch.save(state, adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    monkeypatch.setattr(torch, "load", None)  # before 2.6 it could be made to run code, whatever it was asked
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    loaded = load_adapter(adapter)
    found = {info.name: loaded.array(info) for header in loaded.headers for info in header.tensors}
    assert found.keys() == state.keys()
    assert all(torch.equal(torch.from_numpy(found[name]), value) for name, value in state.items())
