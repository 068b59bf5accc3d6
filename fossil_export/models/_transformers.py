"""What a model class is, asked of the installed transformers: built without weights, from a config.json alone."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from threading import RLock, get_ident
from typing import Any

from fossil_export._libraries import tame_bitsandbytes, without_kernels
from fossil_export.models import _configs, _traits
from fossil_export.models._architecture import Architecture, pattern_of

_MOST = 40_000  # parameters, buffers and modules of one model: DeepSeek-V3 has under 10,000 of them
_ONE = RLock()  # what a build switches off or counts is the whole process's


def read(config: Mapping[str, Any], class_name: str) -> Architecture | None:
    """What class `class_name` is for the content of a config.json, as the installed transformers makes it.

    None if there is no transformers (5 or later), or if it makes no such model. No code but transformers' own is run,
    and nothing is fetched. Several threads take turns.
    """
    try:
        content = _configs.cleaned(config)
        with _quiet():
            made = _configs.make(content)
            kind = model_class(class_name)
            path = place(made, kind)
            model = build(kind, _configs.at(made, path))
            return describe(model, made, content, path)
    except (Exception, RecursionError):  # what foreign code raises for a strange config is not ours to list
        return None


def made_alike(one: Mapping[str, Any], other: Mapping[str, Any], but: Collection[str]) -> bool:
    """Whether the configs made of two contents are equal, but for some fields; False if one cannot be made."""
    try:
        with _quiet():
            made = [_configs.make(_configs.cleaned(content)).to_dict() for content in (one, other)]
    except (Exception, RecursionError):  # as above
        return False
    one, other = (_without(but, each) for each in made)
    return repr(one) == repr(other)  # NaN is itself here, and 1 is not True


def _without(keys: Collection[str], value: Any) -> Any:
    """A tree without some keys, its others in order."""
    if not isinstance(value, dict):
        return value
    return {str(key): _without(keys, value[key]) for key in sorted(value, key=str) if key not in keys}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what transformers logs of a strange config, or of PyTorch that is missing: its answer says it. Without
    kernels of the Hub, too: names do not depend on them."""
    importlib.import_module("torch")
    tame_bitsandbytes()
    with without_kernels():
        from transformers import logging

        level = logging.get_verbosity()
        logging.set_verbosity(logging.CRITICAL)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        finally:
            logging.set_verbosity(level)


def model_class(name: str) -> Any:
    """The model class of transformers of that name. Raises Strange if there is none."""
    import transformers

    kind = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise _configs.Strange(f"{name} is no model of transformers")
    return kind


def place(config: Any, kind: Any) -> _configs.Path:
    """Where in a config the one is that a class takes: a composite's text model takes `text_config`. Raises Strange."""
    wanted = kind.config_class
    if wanted is None or isinstance(config, wanted):
        return ()
    for path, part in _configs.nested(config):
        if isinstance(part, wanted):
            return path
    if kind.__name__ in classes(config.model_type).values():  # it takes that of another model type
        return ()
    raise _configs.Strange(f"{kind.__name__} is not made of a {type(config).__name__}")


def build(kind: Any, config: Any) -> Any:
    """A model on the meta device. Raises Strange if it is too large, and what its class raises."""
    import torch
    from transformers import initialization

    with ExitStack() as stack:
        stack.enter_context(_ONE)
        stack.enter_context(torch.device("meta"))
        stack.enter_context(initialization.no_init_weights())
        stack.enter_context(without_kernels())
        stack.enter_context(_counted())
        return kind(config).eval()


@contextmanager
def _counted() -> Iterator[None]:
    """Raise Strange as soon as a model becomes absurdly large."""
    from torch.nn.modules import module

    seen, mine = 0, get_ident()

    def one(*_: Any) -> None:
        nonlocal seen
        seen += get_ident() == mine
        if seen > _MOST:
            raise _configs.Strange(f"more than {_MOST} parameters, buffers and modules")

    hooks = (
        module.register_module_parameter_registration_hook(one),
        module.register_module_buffer_registration_hook(one),
        module.register_module_module_registration_hook(one),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def describe(model: Any, config: Any, content: Mapping[str, Any], path: _configs.Path = ()) -> Architecture:
    """The Architecture of a built model. `config` is the whole config, the model's own being at `path` in it."""
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    prefix = model.base_model_prefix
    return Architecture(
        name=type(model).__name__,
        model_type=str(config.model_type),
        patterns=frozenset(map(pattern_of, shapes)),
        prefix=prefix,
        shapes=shapes,
        rules=_traits.rules(model),
        ties=_traits.ties(model, config, content),
        parts=_traits.parts(model, config, path),
        embedding=_traits.module(model, "get_input_embeddings"),
        head=_traits.module(model, "get_output_embeddings"),
        follows_tie=_traits.reads_tie(model) or _configs.changes_more(content),
        ignored=_traits.ignored(model),
        optional=tuple(sorted(model._keys_to_ignore_on_load_missing or ())),
    )


@cache
def _mappings() -> Mapping[str, Mapping[str, Any]]:
    """Auto class -> model type -> class name, or several of them."""
    from transformers.models.auto import modeling_auto

    found = {}
    for name, kind in vars(modeling_auto).items():
        mapping = getattr(kind, "_model_mapping", None)
        if name.startswith("Auto") and mapping is not None:
            found[name] = mapping._model_mapping
    return dict(sorted(found.items()))


def classes(model_type: str) -> dict[str, str]:
    """The class that each auto class of transformers makes for a model type: {"AutoModel": "LlamaModel", …}; {} if
    there is no transformers that works."""
    try:
        with _quiet():
            mappings = _mappings()
    except Exception:  # a broken installation raises whatever its parts raise
        return {}
    found = {}
    for auto, names in mappings.items():
        name = names.get(model_type)
        if name:
            found[auto] = name if isinstance(name, str) else str(name[0])
    return found
