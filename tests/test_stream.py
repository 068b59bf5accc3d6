"""`merge --stream`: what it publishes is what a merge and a push publish, and only what must be moved is moved."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_adapter, make_base
from hub_tools import cli
from huggingface_hub import snapshot_download
from hypothesis import given, settings
from hypothesis import strategies as st
from loopback import Fault, LoopbackHub
from transformers import AutoModelForCausalLM

from fossil_export import FossilExportError, StreamResult, merge, merge_to_hub, plan_stream, push
from fossil_export.merging.layout import FilePlan
from fossil_export.merging.run import Runner
from fossil_export.publishing.moves import _moves

CARD = b"---\nlicense: mit\nlanguage: en\n---\n# Base\n"
QV = ["q_proj", "v_proj"]


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


@pytest.fixture
def scene(hub: LoopbackHub, bases: Path) -> LoopbackHub:
    """The Hub with bases and adapters, under ada's name."""
    for name in ("many", "one", "tied", "qv"):
        hub.add_folder(f"ada/{name}", bases / name)
    hub.create("ada/nested")
    hub.commit("ada/nested", {f"sub/dir/{path.name}": path for path in (bases / "many").iterdir()})
    hub.commit("ada/nested", {"model.safetensors": b"another", "config.json": b"{}"})
    hub.reset_log()
    return hub


def published(hub: LoopbackHub, repo: str, revision: str = "main") -> dict[str, tuple[int, str]]:
    kept = hub.files(repo, revision)
    return {name: kept[name] for name in kept if name not in (".gitattributes", "README.md")}


def card(hub: LoopbackHub, repo: str, revision: str = "main") -> str:
    return hub.read(repo, "README.md", revision).decode().replace(repo, "REPO").replace(repo.split("/")[1], "NAME")


def asked(hub: LoopbackHub, base: str, revision: str = "main") -> set[str]:
    """Names of the base's weights of which content was fetched or sent whole: a header is a request of a range."""
    names = {digest: name for name, (_, digest) in hub.files(base, revision).items() if name.endswith(".safetensors")}
    whole = [seen for seen in hub.log if seen.method in ("GET", "PUT") and seen.status == 200]
    return {name for digest, name in names.items() if any(digest in seen.path for seen in whole)}


CASES: dict[str, dict[str, Any]] = {
    "qv": {"adapter": "qv", "base": "ada/many", "ways": {"change", "copy"}},
    "linear": {"adapter": "linear", "base": "ada/many", "ways": {"change", "copy"}},
    "one file": {"adapter": "linear", "base": "ada/one", "ways": {"change"}},
    "mini": {"adapter": "mini", "base": "ada/many", "ways": {"change", "copy"}},
    "bat": {"adapter": "bat", "base": "ada/many", "ways": {"change", "copy"}},
    "bfloat16": {"adapter": "qv", "base": "ada/many", "dtype": "bfloat16", "ways": {"write"}},
    "cut anew": {"adapter": "qv", "base": "ada/many", "max_shard_size": "50KB", "ways": {"write"}},
    "into one": {"adapter": "qv", "base": "ada/many", "max_shard_size": "1GB", "ways": {"write"}},
    "trained head": {"adapter": "head", "base": "ada/tied", "ways": {"change", "copy", "write"}},
    "own tokenizer": {"adapter": "saved", "base": "ada/many", "ways": {"change", "copy"}},
    "subfolder": {"adapter": "qv", "base": "hf://ada/nested/sub/dir", "ways": {"change", "copy"}},
    "by file": {"adapter": "qv", "base": "hf://ada/one/model.safetensors", "ways": {"change"}},
    "local": {"adapter": "qv", "base": "many", "ways": {"write", "send"}},
    "local, one": {"adapter": "linear", "base": "one", "ways": {"write"}},
}


@pytest.mark.parametrize("name", CASES)
def test_the_same_as_merge_and_push(name: str, scene: LoopbackHub, bases: Path, tmp_path: Path) -> None:
    options = dict(CASES[name])
    ways, local = options.pop("ways"), "/" not in options["base"]
    options["adapter"] = bases / options["adapter"]
    options["base"] = bases / options["base"] if local else options["base"]
    result = merge_to_hub(**options, repo_id="ada/streamed", cache_dir=tmp_path / "cache")
    stream = result.plan
    repo = str(options["base"]).removeprefix("hf://").removesuffix("/model.safetensors").partition("/sub/")[0]
    if not local:
        touched = {source.rpartition("/")[2] for move in stream.moves for source in move.sources}
        assert {found.rpartition("/")[2] for found in asked(scene, repo)} == touched
        assert stream.fetched == sum(move.fetch for move in stream.moves)
    small = sum(size for size, _ in published(scene, "ada/streamed").values() if size < 10_000) + 10_000
    down, up = scene.moved()
    assert down < stream.fetched + 2 * small + 65_536 * len(stream.merge.base.files)  # headers, in ranges
    assert up < stream.nbytes("send", "change", "write") + 4 * small

    assert {move.way for move in stream.moves} == ways
    assert result.copied == tuple(move.file.name for move in stream.moves if move.way == "copy")
    assert scene.commits("ada/streamed")[1:] == ["initial commit"]
    adapter, base = options.pop("adapter"), options.pop("base")
    push(merge(adapter, tmp_path / "merged", base=base, **options).output, "ada/pushed")
    assert published(scene, "ada/streamed") == published(scene, "ada/pushed")
    assert card(scene, "ada/streamed") == card(scene, "ada/pushed")
    assert ("license: mit" in card(scene, "ada/streamed")) == (name != "subfolder")  # the card is the repository's
    assert not list((tmp_path / "cache").rglob("*.*")) and str(tmp_path) not in card(scene, "ada/streamed")
    for path, (size, _) in published(scene, "ada/streamed").items():
        assert size > 10_000 or str(tmp_path).encode() not in scene.read("ada/streamed", path)
    assert "README.md" in result.push.left_behind and set(result.push.files) == {
        *published(scene, "ada/streamed"),
        "README.md",
    }
    if name == "qv":
        again = merge_to_hub(adapter, "ada/streamed", base=base, cache_dir=tmp_path / "cache")
        assert not again.push.changed and len(scene.commits("ada/streamed")) == 2


def test_a_large_tokenizer_is_copied_too(scene: LoopbackHub, bases: Path, tmp_path: Path) -> None:
    """Unless the adapter brings its own."""
    large = b'{"long": "%s"}' % (b"x" * 110_000)
    scene.commit("ada/many", {"tokenizer.json": large})
    scene.reset_log()
    result = merge_to_hub(bases / "qv", "ada/new", base="ada/many", cache_dir=tmp_path / "cache")
    assert "tokenizer.json" in result.copied and scene.read("ada/new", "tokenizer.json") == large
    assert sum(scene.moved()) < 2 * result.plan.fetched + 110_000
    push(merge(bases / "qv", tmp_path / "merged", base="ada/many").output, "ada/pushed")
    assert published(scene, "ada/new") == published(scene, "ada/pushed")
    result = merge_to_hub(bases / "saved", "ada/other", base="ada/many", cache_dir=tmp_path / "cache")
    assert "tokenizer.json" not in result.copied and scene.read("ada/other", "tokenizer.json") == b'{"version": "mine"}'


@pytest.mark.parametrize(
    "large", [(".bin",), (".safetensors", ".json", ".md", ".jinja")], ids=["nothing", "everything"]
)
def test_whatever_the_hub_keeps_outside_of_git(
    large: tuple[str, ...], hub: LoopbackHub, bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loopback.git.LFS_SUFFIXES", large)
    hub.add_folder("ada/many", bases / "many")
    result = merge_to_hub(bases / "qv", "ada/streamed", base="ada/many", cache_dir=tmp_path / "cache", hash=True)
    push(merge(bases / "qv", tmp_path / "merged", base="ada/many", hash=True).output, "ada/pushed")
    assert published(hub, "ada/streamed") == published(hub, "ada/pushed")
    assert card(hub, "ada/streamed") == card(hub, "ada/pushed")
    assert ("config.json" in result.copied) == (".json" in large)
    assert not merge_to_hub(
        bases / "qv", "ada/streamed", base="ada/many", cache_dir=tmp_path / "cache", hash=True
    ).push.changed


def test_the_model_that_was_trained(scene: LoopbackHub, bases: Path, tmp_path: Path) -> None:
    tokens = torch.arange(20)[None]
    trained = make_adapter(tmp_path / "adapter", bases / "many", target_modules=QV)
    merge_to_hub(tmp_path / "adapter", "ada/new", base="ada/many", cache_dir=tmp_path / "cache", hash=True)
    folder = Path(snapshot_download("ada/new"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(model(tokens).logits, trained(tokens).logits, rtol=1e-4, atol=1e-5)
    record = json.loads((folder / "fossil_export.json").read_text())
    kept = scene.files("ada/new")
    assert {entry["file"]: entry["sha256"] for entry in record["files"]} == {
        name: digest for name, (_, digest) in kept.items() if name.endswith(".safetensors")
    }
    assert all(entry["sha256"] == entry["hub_blob"] for entry in record["base"]["weights"])
    cli("verify", "ada/new", "--level", "weights", "--adapter", tmp_path / "adapter")


@pytest.mark.parametrize("options", [{"revision": "tuned"}, {"create_pr": True}], ids=["branch", "pull request"])
def test_into_the_bases_own_repository(
    options: dict[str, Any], scene: LoopbackHub, bases: Path, tmp_path: Path
) -> None:
    push(merge(bases / "qv", tmp_path / "merged", base="ada/many").output, "ada/pushed")
    scene.reset_log()
    head = scene.head("ada/many")
    result = merge_to_hub(bases / "qv", "ada/many", base="ada/many", cache_dir=tmp_path / "cache", **options)
    branch = "refs/pr/1" if "create_pr" in options else "tuned"
    assert published(scene, "ada/many", branch) == published(scene, "ada/pushed") and scene.head("ada/many") == head
    assert "# Base" in scene.read("ada/many", "README.md", branch).decode() and result.copied
    assert not any("duplicate" in seen.path for seen in scene.log)

    with pytest.raises(FossilExportError, match=r"is the base itself, .* choose another repository, or --revision"):
        merge_to_hub(bases / "qv", "ada/many", base="ada/many", cache_dir=tmp_path / "cache")
    assert scene.head("ada/many") == head and not list((tmp_path / "cache").rglob("*.*"))


def test_what_the_cache_has_is_not_fetched(scene: LoopbackHub, bases: Path, tmp_path: Path) -> None:
    cached = Path(snapshot_download("ada/many"))
    before = {path.name: path.read_bytes() for path in cached.iterdir()}
    scene.reset_log()
    merge_to_hub(bases / "qv", "ada/new", base="ada/many", cache_dir=tmp_path / "cache")
    assert asked(scene, "ada/many") == set() and scene.moved()[0] < 50_000
    assert {path.name: path.read_bytes() for path in cached.iterdir()} == before


def refuse(hub: LoopbackHub) -> None:
    hub.refuse_copies = True


def no_xet(hub: LoopbackHub) -> None:
    hub.no_xet = True


def forbid(hub: LoopbackHub) -> None:
    hub.fault(Fault("POST", "/lfs-files/duplicate", status=403, times=None))


@pytest.mark.parametrize("how", [refuse, no_xet, forbid])
def test_copies_that_the_hub_refuses(
    how: Callable[[LoopbackHub], None], scene: LoopbackHub, bases: Path, tmp_path: Path
) -> None:
    scene.commit("ada/many", {"tokenizer.json": b'{"long": "%s"}' % (b"x" * 110_000)})  # in storage, as weights are
    push(merge(bases / "qv", tmp_path / "merged", base="ada/many").output, "ada/pushed")
    how(scene)
    scene.reset_log()
    result = merge_to_hub(bases / "qv", "ada/new", base="ada/many", cache_dir=tmp_path / "cache", hash=False)
    assert published(scene, "ada/new") == published(scene, "ada/pushed") and result.copied == ()
    (said,) = [line for line in result.push.warnings if "passed through" in line]
    assert "does not copy from ada/many to ada/new" in said and "5 untouched files" in said and "\n" not in said
    assert scene.commits("ada/new")[1:] == ["initial commit"] and not list((tmp_path / "cache").rglob("*.*"))


def test_one_commit_is_read(scene: LoopbackHub, bases: Path, tmp_path: Path) -> None:
    """The base's branch may move while its files are fetched, copied or looked at."""
    push(merge(bases / "qv", tmp_path / "merged", base="ada/many").output, "ada/pushed")
    names = [name for name in scene.files("ada/many") if name != ".gitattributes"]
    moved = Fault("PUT", before=lambda: scene.commit("ada/many", dict.fromkeys(names, b"{}"), delete=["LICENSE"]))
    scene.fault(moved)
    merge_to_hub(bases / "qv", "ada/new", base="ada/many", cache_dir=tmp_path / "cache")
    assert moved.times == 0 and published(scene, "ada/new") == published(scene, "ada/pushed")


# The disk


def on_disk(*folders: Path) -> int:
    """Bytes of all that lies there, whole or in part, but for what programs note for themselves."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    notes = {"trees", "refs", ".locks", ".cache", "journal.json", "CACHEDIR.TAG"}
    journal = ".journal.json.partial-"
    return sum(p.stat().st_size for p in files if not notes & set(p.parts) and not p.name.startswith(journal))


@pytest.fixture
def peak(scene: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What lay on the disk at every request and after every merge of a file."""
    found: list[int] = []

    def look(*_: object) -> None:
        found.append(on_disk(tmp_path / "cache", tmp_path / "home"))

    def looked_after(done: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            result = done(*arguments)
            look()
            return result

        return run

    for name in ("write", "change"):
        monkeypatch.setattr(Runner, name, looked_after(getattr(Runner, name)))
    scene.fault(Fault(after=look, times=None))
    return found


@pytest.mark.parametrize("name", ["qv", "cut anew", "into one", "bfloat16", "trained head"])
def test_no_more_on_the_disk_than_planned(
    name: str, scene: LoopbackHub, bases: Path, tmp_path: Path, peak: list[int]
) -> None:
    options = {key: value for key, value in CASES[name].items() if key != "ways"}
    base = options.pop("base")
    adapter = "ada/qv" if options.pop("adapter") == "qv" else bases / "head"
    plan = plan_stream(adapter, base, **options)
    peak.clear()
    merge_to_hub(adapter, "ada/new", base=base, cache_dir=tmp_path / "cache", max_disk=plan.disk, **options)
    # It is that much, of which the smallest files may come later, and no more.
    at_hand = max(move.disk for move in plan.moves)
    assert at_hand + plan.adapter_bytes <= max(peak) <= plan.disk < at_hand + plan.adapter_bytes + 10_000
    largest = max(file.size for file in plan.merge.files)
    assert plan.disk - plan.kept <= largest or name != "qv"
    with pytest.raises(FossilExportError, match=rf"--max-disk {plan.disk - 1:,} is too little.* allow {plan.disk:,}"):
        plan_stream(adapter, base, max_disk=plan.disk - 1, **options)


def test_what_comes_beside_weights_counts_too(scene: LoopbackHub, bases: Path, tmp_path: Path) -> None:
    """A large tokenizer of the adapter's, and the base's card."""
    scene.commit("ada/qv", {"tokenizer.json": b" " * 3_000_000, "tokenizer_config.json": b"{}"})
    scene.commit("ada/many", {"README.md": CARD + b"x" * 2_000_000})
    plan = plan_stream("ada/qv", "ada/many")
    merge_to_hub("ada/qv", "ada/new", base="ada/many", cache_dir=tmp_path / "cache", max_disk=plan.disk)
    left = [path for path in (tmp_path / "home").rglob("blobs/*") if path.is_file()]
    largest = max(move.disk for move in plan.moves)
    assert 5_000_000 < sum(path.stat().st_size for path in left) <= plan.disk - largest < 5_100_000


def test_too_little_disk_is_told_before_anything_moves(scene: LoopbackHub, bases: Path, tmp_path: Path) -> None:
    with pytest.raises(FossilExportError, match=r"--max-disk 1,000 is too little: model-.* caches 2,\d+; allow 39,"):
        merge_to_hub(bases / "qv", "ada/new", base="ada/many", max_disk="1KB", cache_dir=tmp_path / "cache")
    assert "ada/new" not in scene.repos() and not (tmp_path / "cache").exists() and not asked(scene, "ada/many")
    with pytest.raises(FossilExportError, match="max_disk is 'much', expected bytes or a size"):
        plan_stream(bases / "qv", "ada/many", max_disk="much")


def test_a_limit_holds_when_copies_are_refused(scene: LoopbackHub, bases: Path, tmp_path: Path) -> None:
    make_adapter(tmp_path / "adapter", bases / "many", target_modules=["k_proj"])
    plan = plan_stream(tmp_path / "adapter", "ada/many")
    copied = max(move.file.size for move in plan.moves if move.way == "copy") + plan.kept
    assert plan.disk < copied
    scene.refuse_copies = True
    options: dict[str, Any] = {"base": "ada/many", "cache_dir": tmp_path / "cache"}
    with pytest.raises(FossilExportError, match=rf"takes {copied:,} bytes at once; .* allow {copied:,} \(2 of 7"):
        merge_to_hub(tmp_path / "adapter", "ada/new", max_disk=plan.disk, **options)
    assert set(scene.files("ada/new")) == {".gitattributes"}
    scene.reset_log()
    result = merge_to_hub(tmp_path / "adapter", "ada/new", max_disk=copied, **options)
    assert result.resumed == 2 and asked(scene, "ada/many") == {m.file.name for m in plan.moves if m.way == "copy"}


@given(
    st.lists(
        st.tuples(st.sampled_from(["copy", "change", "write"]), st.sets(st.integers(0, 7), max_size=4)), max_size=8
    ),
    st.lists(st.integers(1, 99), min_size=8, max_size=8),
)
@settings(max_examples=150, deadline=None)
def test_the_disk_is_accounted_for(wanted: list[tuple[str, set[int]]], sizes: list[int]) -> None:
    """Carry the plan out with names alone: what lies there is what the plan says, and everything is there in time."""
    size = {str(number): sizes[number] for number in range(8)}
    ways = []
    for number, (way, sources) in enumerate(wanted):
        names = (str(number),) if way == "change" else tuple(sorted(map(str, sources))) if way == "write" else ()
        ways.append((FilePlan(str(number), b"", (), sizes[number]), way, names))
    here: set[str] = set()
    for move in _moves(ways, size):
        missing = set(move.sources) - here
        assert move.fetch == sum(size[name] for name in missing)
        here |= missing
        here -= set(move.sources) if move.way == "change" else set()
        assert move.disk == sum(size[name] for name in here) + (
            move.file.size if move.way in ("change", "write") else 0
        )
        assert set(move.drop) <= here
        here -= set(move.drop)
    assert not here


# The command


def test_the_command(scene: LoopbackHub, tmp_path: Path) -> None:
    edit = json.loads(scene.read("ada/qv", "adapter_config.json")) | {"base_model_name_or_path": "ada/many"}
    scene.commit("ada/qv", {"adapter_config.json": json.dumps(edit).encode()})
    command = ["merge", "ada/qv", "--push-to-hub", "ada/new", "--stream", "--cache-dir", tmp_path / "cache"]
    plan = json.loads(cli(*command, "--dry-run", "--json").stdout)["stream"]
    shown = cli(*command, "--dry-run").stdout
    assert "copied on the Hub" in shown and "fetched, merged, sent" in shown and "to fetch" in shown
    assert "ada/new" not in scene.repos() and not (tmp_path / "cache").exists()
    assert not any(seen.method not in ("GET", "HEAD") for seen in scene.log)
    assert plan["bytes_fetched"] == sum(file["bytes"] for file in plan["files"] if file["way"] == "change") > 90_000

    done = cli(*command, "--json", "--private", "--commit-message", "Mine", "--max-disk", "1MB", "--hash")
    found = json.loads(done.stdout)
    assert found["commit"] == scene.head("ada/new") and len(found["copied"]) == 4 and found["resumed"] == 0
    assert scene.commits("ada/new")[0] == "Mine" and scene.readable("ada", "ada/new").private
    assert "run `fossil-export verify ada/new --push-to-hub` and" in done.stderr and "DIR" not in done.stderr
    shown = cli(*command, "--revision", "v1").stdout
    assert (
        "copied there" in shown
        and "model-00003-of-00007" in shown
        and "update kept" in shown
        and "/ada/new/tree/v1" in shown
    )
    assert published(scene, "ada/new", "v1").keys() == published(scene, "ada/new").keys()


@pytest.mark.parametrize(
    "options, said",
    [
        (["--stream"], "want --push-to-hub"),
        (["-o", "out", "--private"], "want --push-to-hub"),
        (["-o", "out", "--create-pr"], "want --push-to-hub"),
        (["-o", "out", "--push-to-hub", "ada/x", "--max-disk", "1GB"], "want --stream"),
        (["-o", "out", "--cache-dir", "cache"], "want --stream"),
        (["-o", "out", "--push-to-hub", "ada/x", "--stream"], "leave out --output"),
        (["--overwrite", "--push-to-hub", "ada/x", "--stream"], "leave out --output"),
        (["--push-to-hub", "ada/x"], "'--stream' to keep no copy here"),
    ],
)
def test_options_that_do_not_go_together(options: list[str], said: str, hub: LoopbackHub) -> None:
    done = cli("merge", "ada/qv", *options, code=2)
    assert said in done.stderr and done.stdout == "" and hub.log == []


def test_results_read_well(scene: LoopbackHub, bases: Path, tmp_path: Path) -> None:
    steps: list[str] = []
    result = merge_to_hub(bases / "qv", "ada/new", base="ada/many", cache_dir=tmp_path / "cache", progress=steps.append)
    assert steps[0] == "opening ada/new" and steps[-1] == "committing"
    assert steps[1] == "[1/7] model-00001-of-00007.safetensors: fetching" and len(steps) == 11
    assert isinstance(result, StreamResult) and result.resumed == 0
    told = json.loads(json.dumps(result.to_dict()))
    assert told["plan"]["stream"]["disk"] == result.plan.disk and told["tensors_merged"] == 4 == len(result.survival)
    assert told["warnings"] == [
        "this was not verified; run `fossil-export verify ada/new --push-to-hub` and the card will quote it"
    ]
