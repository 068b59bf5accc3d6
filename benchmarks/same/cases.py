"""What is run: every case is a few commands in a folder of its own, on inputs that are made here."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from same import damage
from same.inputs import Adapter, Base, make_adapter, make_base

Command = tuple[str, ...]
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PACKED = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
OUT = "{case}/out"


@dataclass(frozen=True)
class Case:
    """Commands that run one after the other; in them `{case}` is the case's own folder, `{name}` a name of its own."""

    kind: str
    name: str
    commands: tuple[Command, ...]


class Maker:
    """Makes the inputs of one kind of case; `rng` decides all of them."""

    def __init__(self, kind: str, root: Path, seed: int) -> None:
        self.kind, self.root = kind, root
        self.rng = random.Random(f"{seed} {kind}")
        self._made = 0

    def folder(self) -> Path:
        self._made += 1
        return self.root / self.kind / f"{self._made:03}"

    def base(self, **options: Any) -> Base:
        return make_base(self.folder(), self.rng, **options)

    def adapter(self, base: Base, **options: Any) -> Adapter:
        return make_adapter(self.folder(), self.rng, base, **options)

    def pair(self, base: dict[str, Any] | None = None, **adapter: Any) -> tuple[Base, Adapter]:
        made = self.base(**(base or {}))
        return made, self.adapter(made, **adapter)

    def case(self, name: str, *commands: Command) -> Case:
        return Case(self.kind, name, commands)


def merge(adapter: Adapter, *options: str) -> Command:
    return ("merge", str(adapter.path), "--output", OUT, *options)


BAT: dict[str, Any] = {"variant": "bat", "rank": 8}
QV = ("q_proj", "v_proj")
FIXED: dict[str, tuple[dict[str, Any], dict[str, Any], Command]] = {
    # name: options of the base, of the adapter, of the command
    "lone weights file": ({"lone": True}, {}, ()),
    "one file": ({"files": 1}, {"rank": 7}, ("--hash",)),
    "float64": ({"dtype": "float64"}, {"dtype": "float64"}, ()),
    "float64 to bfloat16": ({"dtype": "float64"}, {}, ("--dtype", "bfloat16")),
    "bfloat16 shards": ({}, {"dtype": "bfloat16"}, ()),
    "Bone": ({}, {"form": "bone"}, ()),
    "Bone, bat": ({}, {"form": "bone", **BAT}, ()),
    "Bone, bat under true": ({}, {"form": "bone", "init_weights": True, **BAT}, ()),
    "pickled": ({}, {"form": "pickled", "saved": ["lm_head"]}, ()),
    "trained head": ({}, {"targets": QV, "saved": ["lm_head"]}, ()),
    "trained head, tied": ({"tie": True}, {"targets": QV, "saved": ["embed_tokens"]}, ()),
    "head with shard": ({}, {"targets": ["q_proj", "lm_head"]}, ()),
    "trained norm": ({"dtype": "bfloat16"}, {"targets": QV, "saved": ["norm"]}, ()),
    "resized": ({}, {"targets": QV, "saved": ["resized"]}, ()),
    "resized, tied": ({"tie": True, "dtype": "bfloat16"}, {"targets": QV, "saved": ["resized"]}, ()),
    "biases": ({"family": "qwen2"}, {"saved": ["bias"]}, ()),
    "packed layers": ({"family": "phi3"}, {"targets": PACKED}, ()),
    "one layer": ({}, {"layers": [1], "layers_to_transform": [1]}, ()),
    "mixed dtypes": ({"mixed": True, "dtype": "float16"}, {}, ("--dtype", "bfloat16")),
    "language_model": ({"prefix": "language_model.model."}, {"trained_as": "model.language_model."}, ()),
    "model.language_model": ({"prefix": "model.language_model."}, {"trained_as": "language_model.model."}, ()),
    "language_model to model": ({"prefix": "model."}, {"trained_as": "model.language_model."}, ()),
    "without model": ({"prefix": ""}, {"trained_as": "model.", "targets": QV}, ()),
    "with model": ({"prefix": "model."}, {"trained_as": "", "targets": QV}, ()),
    "many slabs": ({"sizes": (1024, 3072, 256), "layers": 1, "files": 2}, {"rank": 50}, ("--hash",)),
    "many slabs, bat": ({"sizes": (1024, 3072, 256), "layers": 1, "dtype": "bfloat16"}, {**BAT, "rank": 64}, ()),
    "many slabs, cut": (
        {"sizes": (1024, 3072, 256), "layers": 1, "dtype": "bfloat16"},
        {"variant": "mini", "mini": 32, "rank": 61},
        ("--max-shard-size", "7MB", "--dtype", "float16"),
    ),
}


def merges(maker: Maker, count: int) -> Iterator[Case]:
    for name, (base_options, options, extra) in FIXED.items():
        yield maker.case(name, merge(maker.pair(base_options, **options)[1], "--json", *extra))
    for _ in range(count):
        yield _drawn_merge(maker)
    base, adapter = maker.pair()
    again = merge(adapter, "--overwrite", "--dtype", "float16")
    yield maker.case("text, then again, then over it", merge(adapter), merge(adapter), again)
    bare = maker.adapter(base, named=False)
    yield maker.case("--base", merge(bare), merge(bare, "--base", str(base.path)))
    half = maker.base(dtype="float16")
    yield maker.case("float16 to bfloat16", merge(maker.adapter(half, dtype="float16"), "--dtype", "bfloat16"))
    state = maker.adapter(base, form="rwkv")
    yield maker.case("state dict of RWKV", merge(state, "--base", str(base.path), "--json"))


def _drawn_merge(maker: Maker) -> Case:
    rng = maker.rng
    variant = rng.choice(["tile", "tile", "mini", "bat"])
    rank = rng.choice([2, 3, 4, 6, 8, 12, 24]) if variant == "bat" else rng.randint(1, 48)
    dtype = rng.choice(["float32", "float16", "bfloat16", "float64"])
    family = rng.choice(["llama", "llama", "qwen2", "phi3"])
    tie, files, layers = rng.random() < 0.4, rng.randint(1, 5), rng.randint(1, 3)
    lone = rng.random() < 0.1
    base = maker.base(
        dtype=dtype, family=family, tie=tie, files=files, layers=layers, lone=lone, mixed=rng.random() < 0.3
    )
    linears = PACKED if family == "phi3" else LINEARS
    targets = tuple(rng.sample(linears, rng.randint(1, len(linears))))
    saved = rng.sample(["lm_head", "embed_tokens", "norm", "bias", "resized"], rng.choice([0, 0, 0, 1]))
    adapter = maker.adapter(
        base,
        variant=variant,
        rank=rank,
        mini=rng.choice([1, 2, 3, 4, 6, 8]),
        targets=targets,
        dtype=rng.choice(["float32", "float32", dtype]),
        saved=saved,
        form=rng.choice(["peft", "peft", "peft", "pickled", "bone" if variant != "mini" else "peft"]),
    )
    options = ["--dtype", rng.choice(["float32", "float16", "bfloat16"])] if rng.random() < 0.4 else []
    options += ["--max-shard-size", rng.choice(["20KB", "100KB", "1GB"])] if rng.random() < 0.3 else []
    options += ["--hash"] if rng.random() < 0.3 else []
    options += ["--device", "cpu:0"] if rng.random() < 0.15 else []
    options += ["--json"] if rng.random() < 0.8 else []
    told = [f"{variant} r={rank}", dtype, family, *saved, *(["tied"] if tie else []), *options]
    return maker.case(" ".join(told), merge(adapter, *options))


def plans(maker: Maker, count: int) -> Iterator[Case]:
    """What is shown and not done: `inspect`, `merge --dry-run`, and all help."""
    for name, (base_options, options, extra) in FIXED.items():
        if not name.startswith("many slabs"):
            path = str(maker.pair(base_options, **options)[1].path)
            shown = [("inspect", path), ("inspect", path, "--all"), ("inspect", path, "--json")]
            dry = ("merge", path, "--dry-run", *extra)
            yield maker.case(name, *shown, dry, (*dry, "--all"), (*dry, "--json"))
    for command in ("merge", "inspect", "verify", "onnx", "convert", "push"):
        yield maker.case(f"{command} --help", (command, "--help"))
    yield maker.case("help and version", ("--help",), ("--version",))


def refusals(maker: Maker, count: int) -> Iterator[Case]:
    """Inputs that are damaged in one place, and wishes that cannot be met."""
    for name, change in damage.ADAPTERS.items():
        base, adapter = maker.pair()
        change(adapter)
        path = str(adapter.path)
        yield maker.case(f"adapter: {name}", merge(adapter), ("inspect", path, "--json"), *_converted(path, base))
    for name, break_base in damage.BASES.items():
        base, adapter = maker.pair()
        break_base(base)
        path = str(adapter.path)
        yield maker.case(f"base: {name}", merge(adapter), ("inspect", path, "--json"), *_converted(path, base))
    adapter, bat = maker.pair()[1], maker.pair(**BAT)[1]
    path, out = str(adapter.path), ("-o", OUT)
    wishes: dict[str, Command] = {
        "no output": ("merge", path),
        "unknown dtype": merge(adapter, "--dtype", "int8"),
        "size": merge(adapter, "--max-shard-size", "many"),
        "device": merge(adapter, "--device", "toaster"),
        "not there": ("merge", "nothing/here", "--output", OUT),
        "output in the adapter": ("merge", path, "--output", f"{path}/out"),
        "rank of tile": ("convert", path, "--to", "lora", "--rank", "4", *out),
        "bat without a rank": ("convert", str(bat.path), "--to", "lora", *out),
        "bat to GGUF": ("convert", str(bat.path), "--to", "gguf-lora", *out),
        "no graph": ("convert", path, "--to", "onnx-adapter", *out),
        "no such graph": ("onnx", path, "--onnx", "none.onnx", *out),
        "nothing to verify": ("verify", "nothing/here"),
        "an adapter to verify": ("verify", path, "--level", "weights"),
        "nothing to push": ("push", "nothing/here", "ada/x"),
        "stream without a repository": ("merge", path, "--stream"),
    }
    for name, command in wishes.items():
        yield maker.case(name, command)


def _converted(path: str, base: Base) -> Iterator[Command]:
    for target in ("lora", "gguf-lora", "miss"):
        yield ("convert", path, "--to", target, "-o", f"{{case}}/{target}")


def converts(maker: Maker, count: int) -> Iterator[Case]:
    def convert(adapter: Adapter, target: str, *options: str, json: bool = True) -> Command:
        return ("convert", str(adapter.path), "--to", target, "-o", OUT, *(["--json"] if json else []), *options)

    rng = maker.rng
    for number in range(count):
        family = rng.choice(["llama", "qwen2", "phi3"])
        linears = PACKED if family == "phi3" else LINEARS
        variant = rng.choice(["tile", "mini"])
        base, adapter = maker.pair(
            {"family": family, "sizes": rng.choice([(48, 96, 24), (64, 96, 32)]), "dtype": "bfloat16"},
            variant=variant,
            rank=rng.randint(1, 40),
            mini=rng.choice([1, 2, 4, 8]),
            targets=tuple(rng.sample(linears, rng.randint(1, len(linears)))),
            dtype=rng.choice(["float32", "float16", "bfloat16"]),
        )
        kind = rng.choice(["f32", "f16", "q8_0"])
        gguf = convert(adapter, "gguf-lora", "--outtype", kind, json=number % 2 == 0)
        yield maker.case(f"{variant} {family} to GGUF {kind}", gguf)
        yield maker.case(f"{variant} {family} to LoRA", convert(adapter, "lora", json=number % 3 > 0))
        size = {"rank": rng.choice([2, 4, 8]), "variant": "bat"}
        bat = maker.adapter(base, targets=linears, **size)
        wish = rng.choice([("--rank", str(rng.randint(1, 24))), ("--energy", "0.8")])
        yield maker.case(f"bat {family} to LoRA {' '.join(wish)}", convert(bat, "lora", *wish))
    for name in ("Bone", "Bone, bat", "Bone, bat under true", "pickled", "biases", "head with shard", "trained norm"):
        base_options, options, _ = FIXED[name]
        base, adapter = maker.pair(base_options, **options)
        miss = convert(adapter, "miss")
        yield maker.case(f"{name} to MISS", miss, miss, convert(adapter, "miss", "--overwrite", json=False))
        if "bat" not in name:
            yield maker.case(f"{name} to LoRA", convert(adapter, "lora"))
            config = str(base.path / "config.json")
            gguf = convert(maker.adapter(base, named=False), "gguf-lora", "--base-config", config)
            yield maker.case(f"{name} to GGUF by the base's config", gguf)
    for variant in ("tile", "bat"):
        state = maker.adapter(maker.base(), variant=variant, form="rwkv")
        yield maker.case(f"{variant} of RWKV to MISS", convert(state, "miss", "--base", "BlinkDL/rwkv-7"))


def verifications(maker: Maker, count: int) -> Iterator[Case]:
    def verify(*options: str) -> Command:
        return ("verify", OUT, "--level", "weights", *options)

    for name, (base_options, options, extra) in FIXED.items():
        if not name.startswith("many slabs"):
            base, adapter = maker.pair(base_options, **options)
            other = maker.adapter(base, **options)
            lies = verify("--adapter", str(other.path))
            yield maker.case(f"merge, {name}", merge(adapter, *extra), verify("--json"), verify(), lies)
    for options in ({"rank": 8}, {"variant": "mini", "mini": 4}):
        adapter = maker.pair(**options)[1]
        lora = ("convert", str(adapter.path), "--to", "lora", "-o", OUT)
        yield maker.case(f"LoRA {options}", lora, verify("--json"), verify("--report", "{case}/report.html"))


KINDS: dict[str, Callable[[Maker, int], Iterator[Case]]] = {
    "merge": merges,
    "plan": plans,
    "refused": refusals,
    "convert": converts,
    "verify": verifications,
}
