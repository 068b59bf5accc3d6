"""Links that lead out of a model's folder: refused, never followed into an output or an upload."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from fossil_export import convert, load_adapter, merge, push, verify
from fossil_export.checkpoints._folder import LocalFolder
from fossil_export.errors import AdapterError, CheckpointError

SECRET = "a secret of this machine"


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    """A folder that is none of the model's business."""
    folder = tmp_path / "home" / ".ssh"
    folder.mkdir(parents=True)
    (folder / "id_ed25519").write_text(SECRET)
    (folder / "config.json").write_text(json.dumps({"secret": SECRET}))
    return folder


LINKS: dict[str, Callable[[Path, Path], None]] = {
    "folder": lambda base, secrets: (base / "assets").symlink_to(secrets),
    "relative folder": lambda base, secrets: (base / "assets").symlink_to(os.path.relpath(secrets, base)),
    "file": lambda base, secrets: (base / "vocab.txt").symlink_to(secrets / "id_ed25519"),
    "link to a link": lambda base, secrets: _chain(base, secrets),
    "in a subfolder": lambda base, secrets: _below(base, secrets),
    "the folder above": lambda base, secrets: (base / "assets").symlink_to(".."),
}


def _chain(base: Path, secrets: Path) -> None:
    (base / ".hidden").symlink_to(secrets)
    (base / "assets").symlink_to(".hidden")


def _below(base: Path, secrets: Path) -> None:
    (base / "sub").mkdir()
    (base / "sub" / "notes.txt").symlink_to(secrets / "id_ed25519")


@pytest.mark.parametrize("kind", LINKS)
def test_links_out_of_a_base_are_refused(kind: str, base: Path, adapter: Path, secrets: Path, tmp_path: Path) -> None:
    LINKS[kind](base, secrets)
    with pytest.raises(CheckpointError, match=r"is a link to .*outside its folder") as refusal:
        merge(adapter, tmp_path / "merged")
    assert str(base) in str(refusal.value) and SECRET not in str(refusal.value)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_links_out_of_an_adapters_tokenizer_are_refused(
    name: str, base: Path, adapter: Path, secrets: Path, tmp_path: Path
) -> None:
    for other in ("tokenizer.json", "tokenizer_config.json"):
        (adapter / other).write_text("{}")
    (adapter / name).unlink(missing_ok=True)
    (adapter / name).symlink_to(secrets / "id_ed25519")
    for run in (
        lambda: merge(adapter, tmp_path / "out"),
        lambda: convert(adapter, tmp_path / "out", to="lora"),
        lambda: convert(adapter, tmp_path / "out", to="miss"),
    ):
        with pytest.raises(CheckpointError, match=f"{name}: is a link to .*outside its folder"):
            run()
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_links_out_of_an_adapter_are_refused(name: str, adapter: Path, tmp_path: Path) -> None:
    (adapter / name).rename(tmp_path / name)
    (adapter / name).symlink_to(tmp_path / name)
    with pytest.raises(AdapterError, match=f"{name}: is a link to"):
        load_adapter(adapter)


def test_a_checkpoint_of_a_run_that_lies_elsewhere_must_be_named(base: Path, adapter: Path, tmp_path: Path) -> None:
    """Who was sent the folder did not choose what its links lead to; who links to a folder can name the link."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoint-5").symlink_to(adapter)
    with pytest.raises(AdapterError, match=f"checkpoint-5: is a link out of its folder, to {adapter}; name that one"):
        load_adapter(run)
    assert load_adapter(run / "checkpoint-5").trained.keys() == load_adapter(adapter).trained.keys()
    (run / "checkpoint-5").unlink()
    (run / "store").mkdir()
    adapter.rename(run / "store" / "last")
    (run / "checkpoint-6").symlink_to("store/last")
    assert "checkpoint-6 is taken" in load_adapter(run).notes[0]


def test_a_link_to_the_whole_folder_is_the_folder(base: Path, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "latest").symlink_to(adapter)
    (tmp_path / "base-link").symlink_to(base)
    merge(tmp_path / "latest", tmp_path / "merged", base=tmp_path / "base-link")
    assert verify(tmp_path / "merged", level="weights").parity


def test_links_are_not_offered_for_upload(base: Path, adapter: Path, secrets: Path, tmp_path: Path) -> None:
    merge(adapter, tmp_path / "merged")
    (tmp_path / "merged" / "assets").symlink_to(secrets)
    with pytest.raises(CheckpointError, match="assets: is a link to"):
        push(tmp_path / "merged", "ada/model")


@pytest.mark.parametrize("folder", ["blobs", "models--org--x/blobs"])
def test_a_folder_called_blobs_is_no_hub_cache(folder: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / "secret").write_text(SECRET)
    (base / "notes.txt").symlink_to(tmp_path / folder / "secret")
    with pytest.raises(CheckpointError, match="is a link to"):
        merge(adapter, tmp_path / "merged")


def test_links_on_the_way_to_a_graphs_data_are_refused(tmp_path: Path, secrets: Path) -> None:
    folder = tmp_path / "graph"
    folder.mkdir()
    (folder / "sub").symlink_to(secrets)
    with pytest.raises(CheckpointError, match="outside its folder"):
        LocalFolder(folder).check_links(["sub/id_ed25519"])


def test_a_hidden_shard_is_none_of_the_model(base: Path, adapter: Path, tmp_path: Path) -> None:
    index = next(base.glob("*.index.json"))
    first = sorted(base.glob("*.safetensors"))[0]
    first.rename(tmp_path / "other.safetensors")
    (base / f".{first.name}").symlink_to(tmp_path / "other.safetensors")
    index.write_text(index.read_text().replace(first.name, f".{first.name}"))
    with pytest.raises(CheckpointError, match="which is missing"):
        merge(adapter, tmp_path / "merged")
