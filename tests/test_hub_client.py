"""What the package takes of the Hub's client is public, but for one file that looks before it uses; the versions that
it supports are those that it is tested with."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from importlib import import_module, util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests
from conftest import ADA, make_adapter, make_base
from hub_tools import CLIENT, cli, content
from huggingface_hub import CommitOperationAdd
from loopback import Fault, LoopbackHub, point_client_at

import fossil_export
from fossil_export.errors import HubError
from fossil_export.publishing._operations import uploaded
from fossil_export.storage.hub import _address as address
from fossil_export.storage.hub import _client as client
from fossil_export.storage.hub._errors import explained

PACKAGE = Path(fossil_export.__file__).parent
PUBLIC = {"huggingface_hub"} | {f"huggingface_hub.{name}" for name in ("constants", "errors", "utils")}
PROJECT = Path(__file__).parent.parent


def uses(source: str) -> Iterator[tuple[str, str]]:
    """What a file takes of the client by name: module and name ("" for the module itself)."""
    tree = list(ast.walk(ast.parse(source)))
    for node in tree:
        if isinstance(node, ast.ImportFrom) and _is_of_client(node.module):
            yield from ((str(node.module), alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if _is_of_client(alias.name))
        elif isinstance(node, ast.Constant) and _is_of_client(node.value) and re.fullmatch(r"[\w.]+", node.value):
            yield node.value, ""
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "constants":
            yield "huggingface_hub.constants", node.attr


OTHERS = {"_attn_implementation", "_experts_implementation"}  # fields of transformers' configs


def attributes(source: str) -> Iterator[str]:
    """Private attributes of objects that are not the file's own, also by their names as text."""
    tree = list(ast.walk(ast.parse(source)))
    own = {node.name for node in tree if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    for node in tree:
        if isinstance(node, ast.Attribute) and re.match("_[^_]", node.attr) and node.attr not in own | OTHERS:
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls", "os", "constants")):
                yield node.attr
        elif isinstance(node, ast.Constant) and re.match("_[^_]", str(node.value)):
            yield from [node.value] if hasattr(CommitOperationAdd, node.value) else []


def private(source: str) -> list[str]:
    """What a file takes of the client that is none of its public names."""
    found = [f"{module} {name}" for module, name in uses(source) if module not in PUBLIC or name.startswith("_")]
    return found + list(attributes(source))


def _is_of_client(name: object) -> bool:
    return str(name).split(".")[0] == "huggingface_hub"


SAMPLES = [
    "from huggingface_hub.utils._runtime import is_xet_available",
    "from huggingface_hub.lfs import UploadInfo",
    "from huggingface_hub import _commit_api",
    "import huggingface_hub._tree_cache",
    "from huggingface_hub import constants\nconstants._HF_DEFAULT_ENDPOINT",
    "import_module('huggingface_hub.utils._xet')",
    "def f(api):\n    return api._validate_yaml('')",
    "def f(addition):\n    addition._remote_oid = None",
    "def f(addition):\n    return getattr(addition, '_upload_mode')",
]


@pytest.mark.parametrize("source", SAMPLES)
def test_private_names_are_seen(source: str) -> None:
    assert len(private(source)) == 1


def test_only_one_file_uses_private_names() -> None:
    found = {path.relative_to(PACKAGE).as_posix(): private(path.read_text()) for path in PACKAGE.rglob("*.py")}
    for name in [name for name in found if name.startswith("models/")]:
        # Their private names are of transformers' classes; of the client they know nothing.
        assert not list(uses((PACKAGE / name).read_text()))
        del found[name]
    assert [name for name, names in found.items() if names] == ["storage/hub/_client.py"]


ROOMS = ("adapters", "checkpoints", "converting", "_inspection.py", "merging", "onnx", "verifying")
"""Where it is not known that there is a Hub."""


def imports(source: str) -> set[str]:
    """Every module that a file imports, or takes names from, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and re.fullmatch(r"fossil_export[\w.]+", str(node.value)):
            found.add(str(node.value))
    return found


def kinds_asked(source: str) -> set[str]:
    """The classes that a file tells apart by isinstance."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and len(node.args) == 2]
    asked = [call.args[1] for call in calls if isinstance(call.func, ast.Name) and call.func.id == "isinstance"]
    return {node.id for kinds in asked for node in ast.walk(kinds) if isinstance(node, ast.Name)}


@pytest.mark.parametrize(
    "source",
    [
        "import fossil_export.storage.hub._names",
        "from fossil_export.storage import hub",
        "def f():\n    from fossil_export.storage.hub._remote import HubFolder",
        "import_module('fossil_export.storage.hub')",
    ],
)
def test_imports_of_the_hub_are_seen(source: str) -> None:
    assert any(name.startswith("fossil_export.storage.hub") for name in imports(source))


def test_only_some_rooms_know_the_hub() -> None:
    files = {path.relative_to(PACKAGE): path.read_text() for path in PACKAGE.rglob("*.py")}
    rooms = {path: imports(text) for path, text in files.items() if path.parts[0] in ROOMS}
    assert {path.parts[0] for path in rooms} == set(ROOMS)
    for path, names in rooms.items():
        forbidden = "fossil_export.storage" if path.parts[0] == "checkpoints" else "fossil_export.storage.hub"
        assert not [name for name in names if name.startswith(forbidden)], path
    for path, text in files.items():
        if path.parts[0] not in ("publishing", "storage"):
            assert not kinds_asked(text) & {"HubFolder", "LocalFolder"}, path
    assert kinds_asked("isinstance(folder, (HubFolder, LocalFolder))") == {"HubFolder", "LocalFolder"}


def test_all_that_is_used_is_there() -> None:
    """In the version at hand, for what is imported where it is needed alone."""
    names = {use for path in PACKAGE.rglob("*.py") for use in uses(path.read_text())}
    assert len(names) > 30
    for module, name in sorted(names - {("huggingface_hub.utils._http", ""), ("huggingface_hub.file_download", "")}):
        assert hasattr(import_module(module), name or "__name__"), (module, name)
    for name in client.LOGGERS:
        if name.startswith("huggingface_hub"):
            assert util.find_spec(name), name
    client.check_additions()
    assert callable(import_module("huggingface_hub.utils._xet").abort_xet_session)


def test_the_versions_are_those_that_are_tested() -> None:
    """Without tomllib, which Python 3.10 has not."""
    text = (PROJECT / "pyproject.toml").read_text()
    assert f'"{client.SUPPORTED}"' in text
    above = text[text.index("huggingface-hub>=") :].partition(",<")[2].partition('"')[0]
    for name, first in (("constraints-floor.txt", client.WRITES), (".ci/versions.ini", client.FLOOR)):
        assert f"huggingface_hub=={first[0]}.{first[1]}.0" in (PROJECT / name).read_text(), name
    today = re.search(r"^huggingface_hub==(\d+)", (PROJECT / "constraints.txt").read_text(), re.MULTILINE)
    assert today is not None and int(today[1]) == int(above) - 1 == client.ABOVE[0] - 1


ADDRESSES = [
    "hf://u/r", "hf://u/r/", "hf://u/r@main", "hf://u/r@refs/pr/3/sub/x", "hf://u/r@a%2Fb/x", "hf://u/r/a b", "hf://",
    "hf://u/r/sub/f.safetensors", "hf://datasets/u/r", "hf://models/u/r@v", "hf://gpt2", "hf://u/r@", "hf://u/r//x",
    "hf://u/r?x", "hf://u/r/a@b", "https://huggingface.co/u/r", "https://huggingface.co/u/r/tree/main/sub",
    "https://huggingface.co/u/r/blob/refs%2Fpr%2F1/a/b.safetensors?x=1", "https://hf.co/datasets/u/r",
    "https://huggingface.co/u/r/discussions", "https://huggingface.co/u", "https://example.com/u/r",
    "http://127.0.0.1:1/hub/u/r/resolve/v1/a%20b.gguf", "http://127.0.0.1:1/u/r", "http://huggingface.co/u/r/tree/main/",
]  # fmt: skip


@pytest.mark.skipif(CLIENT < (1, 23), reason="the client reads no addresses")
@pytest.mark.parametrize("text", ADDRESSES)
def test_addresses_are_read_as_later_clients_do(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1/hub")

    def read(parse: Any) -> Any:
        try:
            return parse(text, HubError)
        except HubError as problem:
            return str(problem).partition(":")[0]

    if text != "http://127.0.0.1:1/u/r":  # the client takes what lies beside a Hub that is in a folder for its own
        assert read(address._parsed) == read(address.parsed)
    else:
        assert read(address._parsed) == "http"


class Older:
    """A module of the client without what is younger than 1.0, and with its session of then."""

    get_session = requests.Session

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        if name in ("parse_hf_uri", "get_cached_repo_tree", "http_stream_backoff"):
            raise AttributeError(name)
        return getattr(self._module, name)


def test_a_client_before_1_0_reads_models_by_requests(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as one client can pass for another; `make test-versions PART=hub-reads` has the real one."""
    make_adapter(tmp_path / "adapter", make_base(tmp_path / "base"))
    hub.create("ada/base")
    hub.commit("ada/base", {path.name: path for path in (tmp_path / "base").iterdir()})
    cli("merge", tmp_path / "adapter", "-o", tmp_path / "here")
    for name in ("huggingface_hub", "huggingface_hub.utils"):
        monkeypatch.setitem(sys.modules, name, Older(import_module(name)))  # type: ignore[arg-type]
    pinned = f"hf://ada/base@{hub.head('ada/base')}"
    for number, base in enumerate(("ada/base", pinned, f"{hub.endpoint}/ada/base")):
        cli("merge", tmp_path / "adapter", "--base", base, "-o", tmp_path / f"{number}")
        one, other = (content(tmp_path / name) for name in ("here", f"{number}"))
        assert {n: b for n, b in one.items() if n.endswith("s")} == {n: b for n, b in other.items() if n.endswith("s")}
    assert any(seen.status == 206 for seen in hub.log)  # headers came by ranges
    hub.fault(Fault("GET", "/resolve/", status=429, times=99))
    with pytest.raises(requests.HTTPError) as raised, client.streamed(f"{hub.endpoint}/ada/base/resolve/x", {}, 5):
        pass
    line = str(explained(raised.value, "ada/base"))
    assert line == "ada/base: the Hub asks for fewer requests; wait a few minutes and run the same command again"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    with LoopbackHub(tmp_path / "storage", {ADA: "ada"}) as hub:
        point_client_at(monkeypatch, hub, tmp_path / "home", ADA)
        yield hub


def test_a_client_of_another_kind_is_refused_before_anything_is_sent(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(client, "fields", lambda kind: [SimpleNamespace(name="_upload_mode")])
    result = cli("push", tmp_path / "model.gguf", "ada/new", code=1)
    version = import_module("huggingface_hub").__version__
    assert result.stderr == (
        f"error: huggingface_hub {version} is not known here (CommitOperationAdd has no _should_ignore, _is_uploaded, "
        f"_remote_oid); install one that is tested: pip install '{client.SUPPORTED}'\n"
    )
    assert hub.log == []


@pytest.mark.parametrize("command", [("inspect", "ada/nothing"), ("push", ".", "ada/new")])
@pytest.mark.parametrize("found", ["0.33.5", "3.0.0.dev0"])
def test_a_client_of_another_time_is_refused(
    found: str, command: tuple[str, ...], hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "version", lambda name: found)
    line = f"error: huggingface_hub {found} is not known here (too old or too new); install one that is tested: pip"
    assert cli(*command, code=1).stderr.startswith(line) and hub.log == []
    for other in ("0.34.0", "1.23.0", "2.99.0"):
        monkeypatch.setattr(client, "version", lambda name, other=other: other)
        client.check_version()


@pytest.mark.parametrize("found", ["0.34.0", "1.22.5"])
def test_a_client_that_only_reads_is_told_so_before_anything_is_sent(
    found: str, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "version", lambda name: found)
    said = cli("push", ".", "ada/new", code=1).stderr
    assert said.startswith(f"error: huggingface_hub {found} reads models, but is too old to publish them with; ")
    assert said.endswith(f": pip install '{client.PUBLISHES}'\n") and said.count("\n") == 1 and hub.log == []


def test_an_upload_in_another_way_is_no_small_file() -> None:
    addition = CommitOperationAdd("model.safetensors", b"content")
    with pytest.raises(HubError, match=r"model.safetensors has the upload mode None\); install one that is tested"):
        client.is_large(addition)
    setattr(addition, client._MODE, "bucket")
    with pytest.raises(HubError, match="has the upload mode 'bucket'"):
        client.is_large(addition)


def test_what_was_uploaded_is_not_sent_again(hub: LoopbackHub) -> None:
    """By the client at hand, from what a journal knows."""
    addition = uploaded("model.safetensors", 5, "ab" * 32, b"12345")
    assert client.is_large(addition) and not client.is_ignored(addition)
    assert (addition.upload_info.size, addition.upload_info.sha256) == (5, bytes.fromhex("ab" * 32))
    hub.create("ada/new")
    hub.reset_log()
    import_module("huggingface_hub").HfApi().preupload_lfs_files("ada/new", [addition])
    assert hub.log == []


def test_a_client_without_sessions_of_hf_xet_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = import_module("huggingface_hub.utils._xet")
    calls: list[bool] = []
    monkeypatch.setattr(module, "abort_xet_session", lambda: calls.append(True))
    client.renew_xet_session()
    monkeypatch.delattr(module, "abort_xet_session")
    client.renew_xet_session()
    assert calls == [True]
