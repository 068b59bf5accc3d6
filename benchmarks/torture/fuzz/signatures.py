"""What a swappable graph says of itself, and the adapter file beside it. The judges: what was trained, put into the
plain graph in NumPy; ONNX Runtime's own reading of the adapter file."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from random import Random

from torture.fuzz.graphs import difference, make_base, make_graph, run, updates_of, with_updates
from torture.fuzz.mutations import damage_file, damage_tree
from torture.fuzz.protobuf import damage_graph
from torture.fuzz.subject import Subject, Unjudged

MARK = "fossil_export"


def make_exports(folder: Path) -> None:
    """Base, adapters, a plain graph, and what was exported of it."""
    for library in ("onnx", "onnx_ir", "onnxruntime"):
        __import__(library)  # once, here, for all attempts
    from fossil_export import export_onnx

    make_base(folder)
    make_graph(folder, "matmul")
    for name, adapter, mode in (
        ("swappable", "miss", "swappable"),
        ("lora-swappable", "lora", "swappable"),
        ("fused", "lora", "fused"),
    ):
        export_onnx(
            folder / adapter,
            folder / name,
            base=folder / "base",
            mode=mode,  # type: ignore[arg-type]
            onnx=folder / "graph",
            copy_data=True,
        )


def damage_mark(path: Path, random: Random) -> str:
    """The metadata of a graph: its JSON, or now and then its text."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    entry = next(one for one in model.metadata_props if one.key == MARK)
    if random.random() < 0.1:
        at = random.randrange(len(entry.value))
        entry.value = random.choice(
            (entry.value[:at], "", "[]", "null", "[" * 100_000, entry.value[:at] + entry.value[at + 1 :])
        )
        how = "text"
    else:
        value, how = damage_tree(json.loads(entry.value), random)
        entry.value = json.dumps(value)
    path.write_bytes(model.SerializeToString())
    return how


@dataclass(frozen=True)
class Signatures:
    """`convert --to onnx-adapter` for a graph whose metadata are damaged."""

    name: str = "signatures of swappable graphs"

    def make(self, folder: Path) -> None:
        make_exports(folder)

    def mutate(self, folder: Path, random: Random) -> str:
        return damage_mark(folder / random.choice(("swappable", "lora-swappable")) / "model.onnx", random)

    def command(self, folder: Path, random: Random) -> list[str]:
        import onnx

        changed = [name for name in ("swappable", "lora-swappable") if self._is_changed(folder, name, onnx)]
        graph = changed[0] if changed else "swappable"
        adapter = "lora" if graph == "lora-swappable" and random.random() < 0.6 else "miss"
        words = ["convert", str(folder / adapter), "--to", "onnx-adapter", "--for", str(folder / graph)]
        return [*words, "--base", str(folder / "base"), "--output", str(folder / "out")]

    @staticmethod
    def _is_changed(folder: Path, name: str, onnx: object) -> bool:
        return (folder / name / "model.onnx").stat().st_mtime > (
            folder / name / "fossil_export.json"
        ).stat().st_mtime + 0.001

    def judge(self, folder: Path) -> str | None:
        adapter = "lora" if b"lora_A" in (folder / "out").read_bytes() else "miss"
        graph = next(name for name in ("swappable", "lora-swappable") if self._is_changed(folder, name, None))
        problems = []
        for trained in {adapter, "miss"}:
            expected = with_updates(folder / "graph" / "model.onnx", updates_of(folder, trained), folder)
            feeds, wanted = run(expected, folder / "graph", None)
            shutil.copyfile(folder / "out", folder / "made.onnx_adapter")
            try:
                _, found = run(folder / graph / "model.onnx", folder / graph, folder / "made.onnx_adapter", feeds)
            except Exception as problem:
                return f"does not run: {problem}"[:500]
            problems.append(difference(wanted, found))
        return None if None in problems else problems[0]


@dataclass(frozen=True)
class CheckedGraphs:
    """`verify --level weights` of a folder with a damaged adapter file, graph or metadata."""

    name: str = "verify, ONNX"

    def make(self, folder: Path) -> None:
        make_exports(folder)
        for name in ("swappable", "fused"):
            shutil.copytree(folder / name, folder / f"sound-{name}")

    def mutate(self, folder: Path, random: Random) -> str:
        name = random.choice(("swappable", "swappable", "fused"))
        (folder / "which").write_text(name)
        way = random.choice(("file", "file", "mark", "graph", "data"))
        if way == "file" and name == "swappable":
            return damage_file(folder / name / "adapter.onnx_adapter", random)
        if way == "mark":
            return damage_mark(folder / name / "model.onnx", random)
        if way == "data":
            return damage_file(random.choice(sorted((folder / name).glob("*.data"))), random)
        return damage_graph(folder / name / "model.onnx", random)

    def command(self, folder: Path, random: Random) -> list[str]:
        return ["verify", str(folder / (folder / "which").read_text()), "--level", "weights"]

    def judge(self, folder: Path) -> str | None:
        """Whether what was trained is still there: the level looks at nothing else of a graph."""
        import numpy as np
        import onnx
        import onnxruntime as ort
        from onnx import numpy_helper

        name = (folder / "which").read_text()

        def held(path: Path) -> dict[str, object]:
            if name == "swappable":
                found = ort.AdapterFormat.read_adapter(str(path / "adapter.onnx_adapter")).get_parameters()
                return {key: np.array(value.numpy()) for key, value in found.items()}
            model = onnx.load(path / "model.onnx")
            return {one.name: numpy_helper.to_array(one) for one in model.graph.initializer if "lora_" in one.name}

        try:
            sound, found = held(folder / f"sound-{name}"), held(folder / name)
        except Exception as problem:
            raise Unjudged(f"{type(problem).__name__}: {problem}"[:300]) from problem
        lost = [key for key, value in sound.items() if key not in found or not np.array_equal(value, found[key])]  # type: ignore[arg-type]
        return f"{lost} is not what it was" if lost else None


SUBJECTS: list[Subject] = [Signatures(), CheckedGraphs()]
