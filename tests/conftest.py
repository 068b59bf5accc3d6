"""Models and adapters the tests share: tiny ones made by transformers and PEFT here, and the real one, cached."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # one process a core: more threads only wait for each other

import contextlib
import gc
import json
import signal
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import smollm2
import torch
from loopback import LoopbackHub, point_client_at
from peft import MissConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from slow_tests import chosen, slow_tests
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

if TYPE_CHECKING:
    from s3_tools import S3Server

# Their assertions are shown as those of tests are.
pytest.register_assert_rewrite(*(path.stem for path in Path(__file__).parent.glob("*_tools.py")))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="without the tests in tests/slow.txt (some two minutes)")


def _name(item: pytest.Item) -> tuple[str, str]:
    return item.path.name, getattr(item, "originalname", item.name)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The files that take longest first, so that no process is left alone with one at the end."""
    slow = slow_tests()
    files: dict[str, float] = defaultdict(float)
    for (file, _), seconds in slow.items():
        files[file] += seconds
    items.sort(key=lambda item: -files[item.path.name])
    if config.getoption("--fast"):
        fast = chosen(map(_name, items), slow)
        config.hook.pytest_deselected(items=[item for item in items if _name(item) not in fast])
        items[:] = [item for item in items if _name(item) in fast]


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """What is imported stays: the half million objects of the libraries are not looked through at each collection.

    `verify` collects three times, after each of its models, which was half the time of its tests.
    """
    gc.collect()
    gc.freeze()


# What ignores a signal hands that on to what it starts (`nohup make test &`), what handles it does not.
for _number, _handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, lambda number, frame: None)):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
QV = ["q_proj", "v_proj"]
Randomise = Callable[[torch.nn.Module], None]
ADA, BOB = "hf_adaadaada", "hf_bobbobbob"  # tokens of two users of the loopback Hub


@pytest.fixture(scope="session")
def real_base() -> Path:
    return smollm2.base_model()


@pytest.fixture(scope="session")
def real_adapter() -> Path:
    return smollm2.adapter()


def real_variant(name: str) -> Path:
    """A trained adapter of the real model; "tile" is `real_adapter`, and 50, the rank of "ragged", divides no width."""
    made: dict[str, tuple[str, int, int]] = {
        "tile": ("tile", 64, 20),
        "ragged": ("tile", 50, 4),
        "mini": ("mini", 64, 4),
        "bat": ("bat", 64, 4),
    }
    return smollm2.adapter(*made[name])


@pytest.fixture(scope="session", params=["tile", "ragged", "mini", "bat"])
def every_real_adapter(request: pytest.FixtureRequest) -> Path:
    return real_variant(request.param)


def make_base(folder: Path, dtype: torch.dtype = torch.float32, tie: bool = False, shards: str = "40KB") -> Path:
    """A tiny Llama with random weights, saved in several files, with the companions a real folder has."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=120,
        tie_word_embeddings=tie,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder, max_shard_size=shards)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "LICENSE").write_text("Apache-2.0")
    return folder


def randomise(model: torch.nn.Module) -> None:
    """Stand in for training: every trained value moves."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator) * 0.05
            parameter.data += noise.to(parameter.dtype)


def make_adapter(
    folder: Path,
    base: Path,
    change: Randomise = randomise,
    dtype: torch.dtype | None = None,
    model_class: Any = AutoModelForCausalLM,
    autocast: bool = True,
    resize: int | None = None,
    kind: Any = MissConfig,
    **config: Any,
) -> PeftModel:
    """An adapter of a `kind`, which is a class of PEFT's configs, that PEFT makes and saves; returns PEFT's model,
    unmerged, which is the oracle."""
    model = model_class.from_pretrained(base, dtype=dtype or "auto")
    if resize is not None:
        model.resize_token_embeddings(resize, mean_resizing=False)
    config.setdefault("target_modules", LINEARS)
    if "r" in kind.__dataclass_fields__:
        config.setdefault("r", 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft_model = get_peft_model(model, kind(**config), autocast_adapter_dtype=autocast)
        change(peft_model)
        peft_model.save_pretrained(folder)
    return peft_model.eval()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, read by the safetensors library."""
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def peft_merged(base: Path, adapter: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What PEFT's own merge gives, by parameter name."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return {name: value.detach() for name, value in merged.state_dict().items()}


def edit_json(path: Path, **changes: Any) -> None:
    """Change (or, with `...`, drop) keys of a JSON file."""
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: entry for key, entry in value.items() if entry is not ...}))


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Processes started within take an interrupt, or the end of a terminal, also where this one ignores them.

    What ignores a signal hands that on to its children (`nohup make test &`, some CI runners); what handles it
    does not.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    hangup = signal.signal(signal.SIGHUP, lambda number, frame: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        signal.signal(signal.SIGHUP, hangup)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    make_adapter(tmp_path / "adapter", base)
    return tmp_path / "adapter"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """A running loopback Hub; the client of this process uses it, as ada, with its cache in `tmp_path / "home"`."""
    with LoopbackHub(tmp_path / "storage", {ADA: "ada", BOB: "bob"}) as running:
        point_client_at(monkeypatch, running, tmp_path / "home", ADA)
        monkeypatch.setattr("fossil_export.storage.hub._errors.PAUSE", 0.01)
        yield running
        assert running.incidents == []  # the server did not fail, and no token came to the storage host


NOISE = [
    "pytorch_model.bin",
    "tf_model.h5",
    "model.gguf",
    "onnx/model.onnx",
    "original/consolidated.00.pth",
    "README.md",
]
# What repositories hold beside what a merge takes.
CARD = b"---\nlicense: mit\nlanguage: en\n---\n# Base\n"


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in several files, an adapter that names it as ada/base, and another training of it in a subfolder."""
    folder = tmp_path_factory.mktemp("models")
    base = make_base(folder / "base", shards="100KB")
    for name in NOISE:
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_bytes(b"noise" * 1000)
    make_adapter(folder / "adapter", base)
    make_adapter(folder / "adapter" / "checkpoint-100", base, r=4, target_modules=["q_proj"])
    for path in folder.rglob("adapter_config.json"):
        edit_json(path, base_model_name_or_path="ada/base")
    return folder


@pytest.fixture
def hosted(hub: LoopbackHub, models: Path) -> LoopbackHub:
    """The Hub with these as ada/base and ada/adapter."""
    hub.add_folder("ada/base", models / "base")
    hub.add_folder("ada/adapter", models / "adapter")
    return hub


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bases of many files, of one, and one whose head is tied to the embedding."""
    folder = tmp_path_factory.mktemp("bases")
    for name, options in {"many": {}, "one": {"shards": "1GB"}, "tied": {"tie": True}}.items():
        (make_base(folder / name, **options) / "README.md").write_bytes(CARD)
    for name, config in {
        "qv": {"target_modules": QV},
        "linear": {},
        "mini": {"init_weights": "mini", "mini_r": 4},
        "bat": {"init_weights": "bat"},
        "saved": {"target_modules": QV, "modules_to_save": ["lm_head"]},
    }.items():
        make_adapter(folder / name, folder / "many", **config)
    make_adapter(folder / "head", folder / "tied", target_modules=["q_proj"], modules_to_save=["lm_head"])
    (folder / "saved" / "tokenizer.json").write_text('{"version": "mine"}')
    (folder / "saved" / "tokenizer_config.json").write_text('{"a": 1}')
    return folder


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in seven files, and adapters of it that name it as ada/base."""
    folder = tmp_path_factory.mktemp("parts")
    make_base(folder / "base")
    make_adapter(folder / "qv", folder / "base", target_modules=QV)
    make_adapter(folder / "k", folder / "base", target_modules=["k_proj"])
    for name in ("qv", "k"):
        path = folder / name / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "ada/base"}))
    return folder


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    from s3_tools import S3Server

    with S3Server() as server:
        yield server


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """A running S3 with an empty bucket "models"; fsspec in this process uses it, and in those it starts."""
    import fsspec
    from s3_tools import use

    use(monkeypatch, s3_server)
    s3_server.reset()
    s3_server.bucket("models")
    yield s3_server
    s3_server.reset()
    fsspec.get_filesystem_class("s3").clear_instance_cache()
