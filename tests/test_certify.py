"""`verify --push-to-hub`: the certificate of a published model goes beside it, and its card quotes it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import BOB
from hub_tools import cli
from loopback import Fault, LoopbackHub, point_client_at

from fossil_export import FossilExportError, merge, merge_to_hub, publish_certificate, push, verify
from fossil_export.verifying._verdict import Verification

WEIGHTS = "model-00001-of-00003.safetensors"


@pytest.fixture
def streamed(hosted: LoopbackHub, tmp_path: Path) -> LoopbackHub:
    """ada/model, merged from ada/adapter and ada/base, of which nothing lies here."""
    result = merge_to_hub("ada/adapter", "ada/model", cache_dir=tmp_path / "cache")
    assert [note for note in result.push.warnings if "verif" in note] == [
        "this was not verified; run `fossil-export verify ada/model --push-to-hub` and the card will quote it"
    ]
    assert "It was not verified" in card(hosted)
    hosted.reset_log()
    return hosted


def card(hub: LoopbackHub, revision: str = "main") -> str:
    return hub.read("ada/model", "README.md", revision).decode()


def how_to_use(hub: LoopbackHub) -> str:
    return card(hub).partition("## How to use it")[2].partition("## Is it")[0]


def verdict(hub: LoopbackHub, revision: str = "main") -> str:
    return card(hub, revision).partition("## Is it")[2].partition("\n## ")[0]


def certificate(hub: LoopbackHub, revision: str = "main") -> str:
    return hub.read("ada/model", "fossil_parity.json", revision).decode()


def test_the_card_quotes_what_was_found(streamed: LoopbackHub, tmp_path: Path) -> None:
    before, usage = streamed.files("ada/model"), how_to_use(streamed)
    streamed.commit("ada/model", {"README.md": card(streamed).replace("# model", "# model\n\nMy words.").encode()})
    told = json.loads(cli("verify", "ada/model", "--push-to-hub", "--json").stdout)
    assert told["parity"] and told["push"]["changed"] and told["push"]["files"] == ["README.md", "fossil_parity.json"]
    assert streamed.commits("ada/model")[0] == "Add what fossil-export verify found"
    after = streamed.files("ada/model")
    assert {name: after[name] for name in before if name != "README.md"} == {
        name: before[name] for name in before if name != "README.md"
    }
    found = json.loads(certificate(streamed))
    assert found["parity"] and found["base"] == f"ada/base@{streamed.head('ada/base')}"
    assert found["hashes"]["adapter"][0]["sha256"] and found["weights"]["wrong"] == 0
    assert "| Verdict | parity |" in card(streamed) and "| Weights | 21 tensors, 14 merged, 0 wrong |" in card(streamed)
    assert "compared it with" in verdict(streamed) and "torch" in verdict(streamed)
    assert "from the truth" in card(streamed) and "My words." in card(streamed) and how_to_use(streamed) == usage
    assert str(tmp_path) not in card(streamed) + certificate(streamed)

    result = cli("verify", "ada/model", "--push-to-hub")
    assert "published" in result.stdout and "(holds just this already)" in result.stdout
    assert len(streamed.commits("ada/model")) == 4


def test_no_parity_is_published_too(streamed: LoopbackHub) -> None:
    damaged = bytearray(streamed.read("ada/model", WEIGHTS))
    damaged[-2] ^= 0x40
    streamed.commit("ada/model", {WEIGHTS: bytes(damaged)})
    told = cli("verify", "ada/model", "--level", "weights", "--push-to-hub", code=1)
    assert "not the trained model: " in told.stderr and "and the card says so" in told.stderr
    assert "**no parity**" in card(streamed) and json.loads(certificate(streamed))["parity"] is False


def test_branches_and_pull_requests(streamed: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    streamed.commit("ada/model", {"a.txt": b"a"}, branch="next")
    cli("verify", "ada/model@next", "--level", "weights", "--push-to-hub")
    assert "compared numbers, not answers" in card(streamed, "next") and "torch" not in verdict(streamed, "next")
    assert "| Verdict | parity |" in card(streamed, "next") and "It was not verified" in card(streamed)
    assert "a.txt" in streamed.files("ada/model", "next")
    point_client_at(monkeypatch, streamed, tmp_path / "bob", BOB)  # who may only ask
    told = cli("verify", "ada/model", "--level", "weights", "--push-to-hub", "--create-pr")
    assert "/ada/model/discussions/1" in told.stdout and " on refs/pr/1\n" in told.stdout
    assert "| Verdict | parity |" in card(streamed, "refs/pr/1") and "It was not verified" in card(streamed)
    point_client_at(monkeypatch, streamed, tmp_path / "ada", "hf_adaadaada")
    head = streamed.head("ada/model")
    cli("verify", "ada/model@refs/pr/1", "--level", "weights", "--push-to-hub")
    assert streamed.head("ada/model") == head


def test_no_path_of_this_machine_is_published(streamed: LoopbackHub, models: Path) -> None:
    cli("verify", "ada/model", "--level", "weights", "--push-to-hub", "--base", models / "base", "--adapter",
        models / "adapter")  # fmt: skip
    found = json.loads(certificate(streamed))
    assert found["parity"] and (found["base"], found["adapter"]["name"]) == ("base", "adapter")
    assert str(models) not in certificate(streamed) + card(streamed)


def refused(*arguments: str | Path) -> str:
    return cli("verify", *arguments, "--push-to-hub", code=1).stderr


def test_what_will_be_refused_is_refused_first(
    streamed: LoopbackHub, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = streamed.head("ada/model")
    assert "is no repository on the Hub; verify the folder, then push it" in refused(models / "adapter")
    assert "is no repository on the Hub" in refused("hf://ada/adapter/checkpoint-100")
    assert refused("ada/adapter") == (
        "error: ada/adapter: is the trained adapter itself; merge or convert it, and verify the result\n"
    )
    streamed.create("ada/gguf")
    streamed.commit("ada/gguf", {"adapter.gguf": b"GGUF"})
    assert "error: ada/gguf: holds no model, LoRA or ONNX graph (only adapter.gguf); name" in refused("ada/gguf")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "adapter.gguf").write_bytes(b"GGUF")
    told = cli("verify", tmp_path / "here", "--adapter", models / "adapter", code=1).stderr
    assert "holds GGUF files, which are not verified" in told
    assert f"has no branch {head}; a commit or a tag takes nothing" in refused(f"ada/model@{head}")
    point_client_at(monkeypatch, streamed, tmp_path / "bob", BOB)
    assert "your token may not do that" in refused("ada/model")
    assert not [seen for seen in streamed.log if "ada/base" in seen.path]
    assert "--create-pr wants --push-to-hub" in cli("verify", "ada/model", "--create-pr", code=2).stderr


@pytest.mark.parametrize("way", ["stream", "push"])
def test_a_certificate_is_of_one_model(way: str, streamed: LoopbackHub, models: Path, tmp_path: Path) -> None:
    """It stays while the same is published again, and goes with the first change."""

    def again(adapter: str) -> tuple[str, ...]:
        if way == "stream":
            return merge_to_hub(adapter, "ada/model", base="ada/base", cache_dir=tmp_path / "cache").push.warnings
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        return push(merge(adapter, folder, base="ada/base").output, "ada/model").warnings

    cli("verify", "ada/model", "--level", "weights", "--push-to-hub")
    head = streamed.head("ada/model")
    assert not any("verif" in line for line in again("ada/adapter")) and streamed.head("ada/model") == head
    if way == "push":
        streamed.commit("ada/model", {"fossil_parity.json": b"{"})
        again("ada/adapter")
        assert "fossil_parity.json" not in streamed.files("ada/model")
        cli("verify", "ada/model", "--level", "weights", "--push-to-hub")
    said = again("hf://ada/adapter/checkpoint-100")
    assert "fossil_parity.json" not in streamed.files("ada/model") and "It was not verified" in card(streamed)
    assert any("fossil_parity.json of an earlier model would have been taken for this one's" in line for line in said)


@pytest.fixture
def verified(streamed: LoopbackHub) -> Verification:
    return verify("ada/model", level="weights")


def test_another_model_by_now(streamed: LoopbackHub, verified: Verification) -> None:
    streamed.commit("ada/model", {WEIGHTS: streamed.read("ada/model", WEIGHTS)[:-1] + b"\1"})
    with pytest.raises(FossilExportError, match=f"ada/model: {WEIGHTS} is not what was verified any more; verify it a"):
        publish_certificate(verified)
    assert "fossil_parity.json" not in streamed.files("ada/model")


def test_the_branch_moves_meanwhile(streamed: LoopbackHub, verified: Verification) -> None:
    """Files that have nothing to do with it stop nothing, and are kept."""

    def move() -> None:
        streamed.commit("ada/model", {"notes.txt": b"mine"})

    streamed.fault(Fault("POST", "/commit/", before=move))
    assert publish_certificate(verified, commit_message="Checked").changed
    assert streamed.commits("ada/model")[:2] == ["Checked", "Change files"]
    assert {"notes.txt", "fossil_parity.json"} <= set(streamed.files("ada/model"))


def test_offline(streamed: LoopbackHub, verified: Verification, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FossilExportError, match="HF_HUB_OFFLINE is set; unset it to publish"):
        publish_certificate(verified)
