"""Signs that an adapter was trained over quantized weights (QLoRA's way), and what they say of the quantization.

On the unquantized base it then is another model than the trained one, and nothing in its tensors says so.

| sign | writer |
|---|---|
| the base's name (`…-bnb-4bit`, `…-GPTQ-Int4`, `…-AWQ`) | unsloth and others, for models that are stored quantized |
| `quantization_config` in that base's config.json, if it is at hand | transformers |
| README.md: "quantization config was used during training", and its fields | PEFT until 0.19, where it still knew them (`create_or_update_model_card` in peft_model.py) |
| README.md: axolotl's config, as YAML | axolotl (src/axolotl/train.py; what it means: src/axolotl/loaders/model.py) |
| `training_args.yaml` | LLaMA-Factory's web interface (src/llamafactory/webui; what it means: model/model_utils/quantization.py) |
| `args.json` | ms-swift (swift/llm/argument/base_args/quant_args.py) |

`training_args.bin` is a pickle, and is never loaded.
"""  # noqa: E501

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fossil_export._answers import FOUR_BITS
from fossil_export._spellings import dtype_named
from fossil_export.adapters._adapter import Adapter
from fossil_export.checkpoints._companions import CARD
from fossil_export.checkpoints._jsonfile import is_large, read_json
from fossil_export.errors import AdapterError, FossilExportError

_NAMES = re.compile(r"(?i)(?<![a-z0-9])(bnb|[48]-?bits?|int[48]|nf4|fp[48]|mxfp4|nvfp4|gptq|awq|hqq|aqlm)(?![a-z0-9])")
# As in unsloth/…-bnb-4bit, …-GPTQ-Int4, …-AWQ, …-FP8.

_METHODS = ("gptq", "awq", "hqq", "aqlm", "mxfp4", "nvfp4", "nf4")
# Of these, those that name one way to quantize.

_CARD = re.compile(r"quantization config was used during training:?\s*\n((?:\s*- \w+:.*\n?)*)")
_FIELD = re.compile(r"- (\w+):[ \t]*(.*)")
_LOADED = re.compile(r"load_in_[48]bit: True")
_AXOLOTL = "See axolotl config"
_YAML_BLOCK = re.compile(r"```ya?ml\n(.*?)\n```", re.DOTALL)

_LONGEST = 1 << 16
_BRACKETS = 1000
# Of YAML that is read. A trainer's settings are some kilobytes; PyYAML takes minutes for what is long or deep.

_METHOD = re.compile(r"[\w.-]{1,40}", re.ASCII)
# A method's name. It is shown, and what lies with an adapter may be anything.

_CACHED = re.compile(r"models--([^/\\]+)[/\\]snapshots[/\\]")
# A model in the cache of the Hub, by its path.

_LARGEST = 1 << 20
# Bytes of such a file; what is larger is none.


@dataclass(frozen=True)
class Sign:
    """One thing that says that training ran over quantized weights.

    `where` is it in words, to follow "it was trained over quantized weights, as". `kind` is one of `KINDS`, or the name
    of another method; None if that is not said. The rest is None if it is not said either: whether the scales were
    quantized too, the dtype that was computed in, the modules that were left as they are. With `apart` this does not
    hold for models of these types, which the trainer treats in a way of its own.
    """

    where: str
    kind: str | None = None
    double_quant: bool | None = None
    compute_dtype: str | None = None
    skip_modules: tuple[str, ...] | None = None
    apart: tuple[str, ...] = ()

    @property
    def is_certain(self) -> bool:
        """Whether it says all that the weights depend on."""
        return self.kind == "int8" or (self.kind in FOUR_BITS and self.double_quant is not None)

    @property
    def told(self) -> str:
        """ "nf4 with double quantization"."""
        double = {None: "", True: " with double quantization", False: " without double quantization"}
        return f"{self.kind}{double[self.double_quant]}" if self.kind else "quantized, how is not said"


def quantized_training(adapter: Adapter) -> str | None:
    """What says that training ran over quantized weights; None if nothing does, which is no proof that it did not."""
    return next((sign.where for sign in signs(adapter)), None)


def signs(adapter: Adapter) -> tuple[Sign, ...]:
    """All of them that lie with the adapter; those that say how come first."""
    found = [*_named(adapter), *_written(adapter)]
    return tuple(sorted(found, key=lambda sign: not sign.is_certain))


def agreed(found: tuple[Sign, ...], name: str) -> Sign | None:
    """What several signs say together. Raises AdapterError, naming two, if they contradict each other."""
    if not found:
        return None
    first = found[0]
    for other in found[1:]:
        for field in ("kind", "double_quant"):
            ours, theirs = getattr(first, field), getattr(other, field)
            if ours is not None and theirs is not None and ours != theirs:
                raise AdapterError(
                    f"{name}: was trained over quantized weights, but {first.where} ({first.told}) and {other.where} "
                    f"({other.told}) do not agree; say with --trained-on which is right"
                )
    return first


def of_settings(settings: Mapping[str, Any], where: str) -> Sign | None:
    """What a `quantization_config` says; None if it quantizes nothing."""
    method = settings.get("quant_method")
    if isinstance(method, str) and method not in ("bitsandbytes", "QuantizationMethod.BITS_AND_BYTES"):
        return Sign(where, _method(method.removeprefix("QuantizationMethod.").lower()))
    dtype, skip = _dtype(settings.get("bnb_4bit_compute_dtype")), _modules(settings.get("llm_int8_skip_modules"))
    if _true(settings.get("load_in_8bit")) or _true(settings.get("_load_in_8bit")):
        return Sign(where, "int8", None, dtype, skip)
    if _true(settings.get("load_in_4bit")) or _true(settings.get("_load_in_4bit")):
        kind = settings.get("bnb_4bit_quant_type")
        return Sign(
            where,
            kind if kind in ("nf4", "fp4") else None,
            _boolean(settings.get("bnb_4bit_use_double_quant")),
            dtype,
            skip,
        )
    return Sign(where) if method is not None else None


def _named(adapter: Adapter) -> Iterator[Sign]:
    name = adapter.base_model or ""
    cached = _CACHED.search(name)
    last = cached[1] if cached is not None else re.split(r"[/\\]", name.rstrip("/\\"))[-1]
    if match := _NAMES.search(last):
        words = {word.lower() for word in _NAMES.findall(last)}
        kind = next((method for method in _METHODS if method in words), None)
        yield Sign(f"its base is called {name}", "fp8" if match[1].lower() == "fp8" else kind)


def _written(adapter: Adapter) -> Iterator[Sign]:
    try:
        names = set(adapter.home.root_names())
    except FossilExportError:
        return
    for file, reader in _READERS.items():
        if file not in names:
            continue
        try:
            text = adapter.home.read(file).decode("utf-8-sig", "replace") if adapter.home.size(file) <= _LARGEST else ""
        except (OSError, FossilExportError):
            continue
        yield from reader(text.replace("\r\n", "\n"))


def _of_card(text: str) -> Iterator[Sign]:
    where = f"its {CARD} has the settings of a quantized base"
    blocks = [dict(_FIELD.findall(block)) for block in _CARD.findall(text)]
    found = [sign for block in blocks if (sign := of_settings(block, where)) is not None]
    begin = text.find(_AXOLOTL)
    # At the first place alone: a text that begins so again and again, and never ends, would take hours.
    if begin >= 0 and (block := _YAML_BLOCK.search(text[begin : begin + _LONGEST])) is not None:
        found += _of_axolotl(block[1])
    yield from found
    if not found and (any(not block for block in blocks) or _LOADED.search(text)):
        yield Sign(where)


def _of_axolotl(text: str) -> Iterator[Sign]:
    """Models of some types it loads in another way."""
    settings, where = _yaml(text), f"its {CARD} has axolotl's settings of a quantized base"
    # bnb_config_kwargs are BitsAndBytesConfig's own words, set last.
    more = settings.get("bnb_config_kwargs")
    if _true(settings.get("load_in_4bit")):
        if settings.get("adapter") != "qlora":
            yield Sign(where)
            return
        dtype = _half(settings)
        asked = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": dtype,
        } | (more if isinstance(more, dict) else {})
    elif _true(settings.get("load_in_8bit")):
        asked = {"load_in_8bit": True}
    else:
        return
    sign = of_settings(asked, where)
    if sign is not None:
        yield Sign(where, sign.kind, sign.double_quant, sign.compute_dtype, sign.skip_modules, ("falcon_h1", "jamba"))


def _of_llama_factory(text: str) -> Iterator[Sign]:
    settings, where = _yaml(text), "its training_args.yaml has quantization_bit"
    bits, method = settings.get("quantization_bit"), settings.get("quantization_method", "bnb")
    method = method.lower() if isinstance(method, str) else ""
    if bits in (None, "none", 0):
        return
    if method in ("bnb", "bitsandbytes") and bits in (4, 8):
        double = _boolean(settings.get("double_quantization", True))
        dtype = _half(settings)
        kind = settings.get("quantization_type", "nf4")
        known = kind if kind in ("nf4", "fp4") else None
        yield Sign(where, "int8") if bits == 8 else Sign(where, known, double, dtype)
    else:
        yield Sign(where, None if method in ("bnb", "bitsandbytes") else _method(method))


def _of_swift(text: str) -> Iterator[Sign]:
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError):
        return
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if not isinstance(method, str):
        return
    where, bits = "its args.json has quant_method", settings.get("quant_bits")
    if _method(method) is not None:
        where = f"{where} {method}"
    if method != "bnb":
        yield Sign(where, _method(method))
    elif bits == 8:
        yield Sign(where, "int8")
    else:
        kind = settings.get("bnb_4bit_quant_type", "nf4")
        double = _boolean(settings.get("bnb_4bit_use_double_quant", True))
        known = kind in ("nf4", "fp4") and bits == 4
        yield Sign(where, kind if known else None, double, _dtype(settings.get("bnb_4bit_compute_dtype")))


_READERS: dict[str, Callable[[str], Iterator[Sign]]] = {
    CARD: _of_card,
    "training_args.yaml": _of_llama_factory,
    "args.json": _of_swift,
}


def _yaml(text: str) -> Mapping[str, Any]:
    import yaml  # type: ignore[import-untyped]

    if len(text) > _LONGEST or text.count("[") + text.count("{") > _BRACKETS:
        return {}
    try:
        found = yaml.safe_load(text)
    except Exception:  # for values with a wrong tag it raises whatever comes up
        return {}
    # A few kilobytes of aliases to aliases stand for more than there is memory.
    return found if isinstance(found, dict) and not is_large(found, _LONGEST) else {}


def _true(value: Any) -> bool:
    return _boolean(value) is True


def _half(settings: Mapping[str, Any]) -> str | None:
    """The dtype that axolotl or LLaMA-Factory load a model in. "auto" is bfloat16 on all GPUs that have it."""
    for dtype, names in (("bfloat16", ("bf16", "bfloat16", "pure_bf16")), ("float16", ("fp16", "float16"))):
        if any(_true(value := settings.get(name)) or value in ("auto", "full") for name in names):
            return dtype
    return None


def _method(name: str) -> str | None:
    return name if _METHOD.fullmatch(name) else None


def _boolean(value: Any) -> bool | None:
    if isinstance(value, bool):
        return value
    return {"true": True, "false": False}.get(value.strip().lower()) if isinstance(value, str) else None


def _dtype(value: Any) -> str | None:
    name = dtype_named(value)
    return name if name in ("float32", "float16", "bfloat16") else None


def _modules(value: Any) -> tuple[str, ...] | None:
    """A list of names, or one as Python prints it; None for None."""
    if isinstance(value, str):
        found = re.findall(r"['\"]([\w.]+)['\"]", value)
        return tuple(found) if value.strip().startswith("[") else None
    return tuple(map(str, value)) if isinstance(value, (list, tuple)) else None


def settings_at(folder: Path) -> Mapping[str, Any] | None:
    """The `quantization_config` of a model folder on this machine; None without one."""
    try:
        config = read_json(folder / "config.json", AdapterError)
    except AdapterError:
        return None
    from fossil_export.checkpoints.quantized import settings_of

    return settings_of(config)
