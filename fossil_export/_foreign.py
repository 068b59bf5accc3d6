"""Model folders opened by transformers without running code that came with them, unless it was asked for.

A folder can ask for code in more ways than `auto_map`: its config names the class that is made, the attention
that is used (a name like `user/repo` is fetched from the Hub and run) and the tokenizer's class. All models and
tokenizers of this package are opened through here. Only `trusting` lets the first way run, and nothing else does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fossil_export._libraries import config_class, tame_bitsandbytes, without_kernels
from fossil_export.adapters._peft import CONFIG
from fossil_export.checkpoints._jsonfile import read_json
from fossil_export.errors import CheckpointError

_ATTENTION = (None, "eager", "sdpa")
_EXPERTS = (None, "eager", "batched_mm", "grouped_mm")
_TRUSTED = ContextVar("trusted", default=False)


@contextmanager
def trusting(wanted: bool) -> Iterator[None]:
    """Let models that this thread opens in the block run the code that `auto_map` names, if it is `wanted`.

    All that opens and runs models is in such a block; kernels of the Hub are found in none.
    """
    before = _TRUSTED.set(wanted)
    try:
        with without_kernels():
            yield
    finally:
        _TRUSTED.reset(before)


def is_trusted() -> bool:
    """Whether models may run code of their own."""
    return _TRUSTED.get()


def read_config(folder: Path) -> Any:
    """The config of a model folder, as transformers reads it, with nothing left in it that names code.

    Raises CheckpointError where transformers has no class for it, would load more than the folder's weights, or would
    pass over what a newer one has written.
    """
    tame_bitsandbytes()
    import transformers

    refuse_adapter(folder)
    refuse_newer(folder)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=is_trusted())
    except ValueError as problem:
        if "trust_remote_code" not in str(problem):
            raise
        raise CheckpointError(needs_code(folder)) from problem
    _disarm(config)
    return config


def refuse_adapter(folder: Path) -> None:
    """Raise CheckpointError for a model folder that holds an adapter's config: transformers would follow it."""
    if (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder}: holds {CONFIG}, and transformers would load that adapter too; take it out")


def refuse_newer(folder: Path) -> None:
    """Raise CheckpointError for a config of transformers 5 if an older one is here.

    That makes another model of it, and says nothing: it passes over `rope_parameters`, in which the newer one has the
    base of the rotary embeddings and their scaling, over `scale_decoder_outputs` (T5, LongT5), and ties other biases.
    """
    found = version("transformers")
    file = folder / "config.json"
    if _numbers(found) >= (5, 0) or not file.is_file():
        return
    config = read_json(file, CheckpointError)
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    if any("rope_parameters" in part and "rope_theta" not in part for part in parts):
        what = "would pass over its rope_parameters"
    elif _numbers(config.get("transformers_version")) >= (5, 0) or any("scale_decoder_outputs" in one for one in parts):
        what = "may make another model of it"
    else:
        return
    raise CheckpointError(
        f"{file}: was written by transformers 5, and transformers {found} {what}: pip install 'transformers>=5'"
    )


def newer_note(folder: Path) -> tuple[str, ...]:
    """A line if a newer transformers than the one here wrote the config: fields that this does not know it passes
    over."""
    file, found = folder / "config.json", version("transformers")
    written = read_json(file, CheckpointError).get("transformers_version") if file.is_file() else None
    if _numbers(written) <= _numbers(found):
        return ()
    return (
        f"{file}: was written by transformers {written}, and transformers {found}, which is here, may not know all of "
        "its fields: pip install --upgrade transformers, then run this again",
    )


def _numbers(written: Any) -> tuple[int, int]:
    """The first two numbers of a version; zeros if it is none."""
    found = re.match(r"(\d{1,9})\.(\d{1,9})", str(written))
    return (int(found[1]), int(found[2])) if found else (0, 0)


def needs_code(folder: Path) -> str:
    """What is said of a model that transformers does not know."""
    return (
        f"{folder}: this model needs Python code of its own (auto_map in its config.json), which is run only with "
        "--trust-remote-code; read that code first, or use a transformers that knows the model (merge and convert need "
        "none)"
    )


def model_class(config: Any, default: str) -> Any:
    """The class of transformers that `config` names, `default` where it names none. Raises CheckpointError.

    Where `auto_map` is trusted, the auto class by which it names the model.
    """
    import transformers

    name = str(next(iter(config.architectures or [default])))
    named = getattr(config, "auto_map", None)
    if is_trusted() and isinstance(named, dict):
        autos = [auto for auto, path in named.items() if auto != "AutoConfig" and str(path).rpartition(".")[2] == name]
        found = getattr(transformers, next(iter([*(auto for auto in autos if auto == default), *autos]), default), None)
        return found if hasattr(found, "_model_mapping") else getattr(transformers, default)
    kind = getattr(transformers, name, None) if name.isidentifier() else None
    if kind is None or name == default:
        return getattr(transformers, default)
    if not _is(kind, transformers.PreTrainedModel):
        raise CheckpointError(f"config.json: architectures names {name}, which is no model of transformers; mend it")
    return kind


def load_model(kind: Any, folder: Path, config: Any, **options: Any) -> Any:
    """The weights of `folder` as a model of class `kind`; `config` is one of `read_config`."""
    if hasattr(kind, "set_experts_implementation"):
        options["experts_implementation"] = "eager"  # grouped products take no float64
    # PyTorch loads no pickle: it has run code of some.
    loaded = kind.from_pretrained(
        folder, config=config, trust_remote_code=is_trusted(), use_safetensors=True, **options
    )
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    model.__dict__.pop("generate", None)  # transformers put custom_generate/generate.py there
    return loaded


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder. Raises CheckpointError and what transformers raises."""
    import transformers

    for file in ("tokenizer_config.json", "config.json"):
        name = read_json(folder / file, CheckpointError).get("tokenizer_class") if (folder / file).is_file() else None
        kind = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
        if kind is not None and not _is(kind, transformers.PreTrainedTokenizerBase):
            raise CheckpointError(f"{folder / file}: tokenizer_class names {name}, which is no tokenizer; mend it")
    return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=is_trusted())


def _is(kind: Any, parent: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, parent)


def _disarm(config: Any) -> None:
    """Let neither a config nor its parts name Python files, or kernels of the Hub; transformers chooses for itself."""
    if not is_trusted():
        vars(config).pop("auto_map", None)
    if getattr(config, "_attn_implementation", None) not in _ATTENTION:
        config._attn_implementation = None
    if getattr(config, "_experts_implementation", None) not in _EXPERTS:
        config._experts_implementation = None
    for part in list(vars(config).values()):
        if isinstance(part, config_class()):
            _disarm(part)
