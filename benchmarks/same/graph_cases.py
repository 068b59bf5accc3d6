"""Cases of `onnx`: on graphs that the tests make by hand, and on graphs that the builders make; what runs models."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from same.cases import OUT, Case, Command, Maker

FLOAT_FORMS = ("matmul", "transpose", "cast", "packed", "gemm", "gemm_transb")
CODED_FORMS = ("nbits", "packed_nbits", "dequant")
MODES = ("merged", "tiled", "fused", "swappable")
BRANCHES = ("fused", "swappable")


def exports(maker: Maker, count: int) -> Iterator[Case]:
    for form in FLOAT_FORMS:
        yield from _case(maker, form, MODES)
        yield from _case(maker, form, ("merged", "tiled"), variant="bat", rank=4)
    for form in CODED_FORMS:
        yield from _case(maker, form, MODES, inputs=32, rank=6)
        yield from _case(maker, form, BRANCHES, graph={"names": False}, inputs=32, rank=6)
    for form in ("matmul", "packed"):
        for dtype in ("float16", "bfloat16"):
            yield from _case(maker, form, MODES, graph={"dtype": dtype}, rank=5)
        yield from _case(maker, form, MODES, variant="mini", rank=5, mini_r=4)
        yield from _case(maker, form, MODES, graph={"external": False}, inputs=96, rank=7)
    yield from _case(maker, "matmul", ("fused",), variant="bat", rank=4)
    for _ in range(count // 2):
        rng = maker.rng
        form, mode = rng.choice(FLOAT_FORMS), rng.choice(MODES)
        inputs = rng.randint(3, 40)
        yield from _case(
            maker,
            form,
            (mode,),
            graph={"names": rng.random() < 0.5, "external": rng.random() < 0.7},
            inputs=inputs,
            rank=rng.randint(1, min(9, inputs)),
            outputs={name: rng.randint(1, 12) for name in ("q_proj", "k_proj", "v_proj")},
            bias=rng.random() < 0.5,
            targets=rng.choice([None, ["q_proj", "v_proj"], ["k_proj"]]),
            seed=rng.getrandbits(16),
        )


def models(maker: Maker, count: int) -> Iterator[Case]:
    """Where transformers, PEFT, the builders and the runtimes take part: slow, and so few."""
    for options in ({"rank": 8}, {"variant": "mini", "mini": 4}, {"variant": "bat"}):
        adapter = str(maker.pair({"sizes": (64, 96, 32), "dtype": "bfloat16"}, **options)[1].path)
        merged = ("merge", adapter, "-o", OUT)
        told = " ".join(map(str, options.values()))
        yield maker.case(f"merge {told}", merged, ("verify", OUT, "--json", "--report", "{case}/report.html"))
        if "variant" not in options:
            lora = ("convert", adapter, "--to", "lora", "-o", OUT)
            yield maker.case(f"LoRA {told}", lora, ("verify", OUT, "--json"))
            for mode in MODES:
                export = ("onnx", adapter, "-o", OUT, "--mode", mode)
                yield maker.case(f"genai {mode}", export, *([] if mode == "tiled" else [("verify", OUT)]))
            int4 = ("onnx", adapter, "-o", OUT, "--mode", "fused", "--precision", "int4", "--json")
            yield maker.case("genai int4", int4, ("verify", OUT, "--json"))
            torch = ("onnx", adapter, "-o", OUT, "--mode", "swappable", "--runtime", "torch", "--json")
            yield maker.case("torch swappable", torch, ("verify", OUT, "--json"))


def _case(
    maker: Maker, form: str, modes: tuple[str, ...], graph: dict[str, Any] | None = None, **options: Any
) -> Iterator[Case]:
    """One model and its graph, exported in each of `modes`; of a swappable one also the file of a second adapter."""
    make_case, make_graph = _tests()
    folder, options = maker.folder(), {"rank": 4, **options}
    folder.mkdir(parents=True)
    made = make_case(folder, **options)
    graph = {"flat": form.startswith("gemm"), **(graph or {})}
    file = make_graph(made, folder / "plain" / "model.onnx", form, **graph)
    base = ("--base", str(folder / "base"))
    for mode in modes:
        commands: list[Command] = [
            ("onnx", str(made.adapter), *base, "--onnx", str(file), "--mode", mode, "-o", OUT, "--json"),
        ]
        if mode == "tiled":
            commands.append((*commands[0][:-2], "{case}/copied", "--copy-data"))
        if mode == "swappable":
            commands.append(("verify", OUT, "--level", "weights", "--json"))
            other = make_case(folder, **options | {"rank": 3, "seed": 7}, adapter=f"other-{mode}")
            for target in ("{case}/other.onnx_adapter", "{case}/second"):
                to = ("convert", str(other.adapter), *base, "--to", "onnx-adapter", "--for", OUT, "-o", target)
                commands.append(to)
        told = [f"{key}={value}" for key, value in (options | graph).items() if value not in (None, True, False)]
        yield maker.case(" ".join([form, mode, *told]), *commands)


def _tests() -> tuple[Any, Any]:
    """What makes models and graphs in the tests."""
    import sys

    sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
    from graphs import make_case, make_graph  # type: ignore[import-not-found]

    return make_case, make_graph
