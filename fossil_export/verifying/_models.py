"""The models that are compared: trainer and truth (PEFT, unmerged), and the artifact.

Each is a `Runner`: something that gives logits for tokens. A new kind of artifact is a new runner.
"""

from __future__ import annotations

import contextlib
import gc
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fossil_export._extras import FORWARD, require, required
from fossil_export._foreign import load_model, load_tokenizer, model_class, read_config
from fossil_export._libraries import tame_bitsandbytes, without_panics
from fossil_export._progress import begin
from fossil_export._spellings import cuda_missing
from fossil_export._threads import import_torch
from fossil_export.errors import FossilExportError

if TYPE_CHECKING:
    import torch

Tokens = list[int]

_TOKENS = ("bos_token_id", "eos_token_id", "decoder_start_token_id")
"""What greedy search takes from generation_config.json."""


class Runner(Protocol):
    """One model, loaded. Prompts are run one at a time, so that nothing depends on padding."""

    def logits(self, tokens: Tokens) -> torch.Tensor:
        """(positions, vocabulary) for a language model, (labels,) or hidden states otherwise; float64 on the CPU."""

    def generate(self, tokens: Tokens, count: int) -> Tokens | None:
        """The greedy continuation by up to `count` tokens; None where the model does not generate."""

    def modules(self, tokens: Tokens) -> dict[str, torch.Tensor] | None:
        """The output of each module by its name in the plain model, in the order they ran; None if unknown."""

    def close(self) -> None:
        """Give the memory back."""


class TorchRunner:
    """A transformers model, plain or with an adapter beside it."""

    def __init__(self, model: Any, device: str) -> None:
        self._model = model.to(device).eval()
        self._device = device

    def logits(self, tokens: Tokens) -> torch.Tensor:
        import torch

        with torch.no_grad(), _full_precision():
            output = self._model(input_ids=torch.tensor([tokens], device=self._device))
        result: torch.Tensor = (output.logits if "logits" in output else output[0])[0].double().cpu()
        return result

    def generate(self, tokens: Tokens, count: int) -> Tokens | None:
        import torch

        if not getattr(self._model, "can_generate", lambda: False)():
            return None
        ids = torch.tensor([tokens], device=self._device)
        with torch.no_grad(), _full_precision(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            output = self._model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=self._greedy(count)
            )
        result: Tokens = output[0, len(tokens) :].tolist()
        return result

    def _greedy(self, count: int) -> Any:
        """Plain greedy search, whatever generation_config.json has: some ways of it are code of the Hub's or the
        folder's own (`custom_generate`)."""
        import transformers

        kept = {name: getattr(self._model.generation_config, name, None) for name in _TOKENS}
        self._model.generation_config = transformers.GenerationConfig(**kept)  # what is not given comes from it
        return transformers.GenerationConfig(**kept, max_new_tokens=count, do_sample=False, pad_token_id=0)

    def modules(self, tokens: Tokens) -> dict[str, torch.Tensor] | None:
        outputs: dict[str, torch.Tensor] = {}
        handles = []
        # PEFT's own modules in a layer all begin so.
        prefix = getattr(getattr(self._model, "base_model", None), "prefix", None) or "\0"
        for name, module in self._model.named_modules():
            plain = _plain_name(name, prefix)
            if plain is not None:
                handles.append(module.register_forward_hook(_record(outputs, plain)))
        try:
            self.logits(tokens)
        finally:
            for handle in handles:
                handle.remove()
        return outputs

    def close(self) -> None:
        import torch

        del self._model
        gc.collect()
        if self._device.startswith("cuda"):
            torch.cuda.empty_cache()


def _record(outputs: dict[str, torch.Tensor], name: str) -> Any:
    import torch

    def hook(module: Any, arguments: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(first, torch.Tensor) and first.is_floating_point():
            outputs[name] = first.detach().double().cpu()

    return hook


def _plain_name(name: str, own: str) -> str | None:
    """A module's name without what PEFT or our layers put around it; None for parts of those wrappings, of which PEFT's
    begin with `own`."""
    for prefix in ("base_model.model.", "base_model"):
        name = name.removeprefix(prefix)
    parts = name.split(".")
    wrapped = {"base_layer", "original_module", "trained"} & set(parts) or any(part.startswith(own) for part in parts)
    if not name or wrapped or parts[-1] == "modules_to_save":
        return None
    return re.sub(r"\.modules_to_save\.[^.]+", "", name)


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """float32 means float32 on a GPU too: no TF32."""
    import torch

    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def check_device(device: str) -> None:
    """Raise unless `device` is there; a missing GPU is never quietly the CPU."""
    libraries()
    import torch

    if line := cuda_missing(device, torch):
        raise FossilExportError(line)


def libraries() -> None:
    """Raise MissingExtraError unless what the forward level needs is installed."""
    require("the forward level", FORWARD)
    begin("loading PyTorch")  # seconds, in which nothing else would be told
    import_torch()
    tame_bitsandbytes()
    for package in FORWARD.modules:
        required(package, "peft", "the forward level")


def open_lora(folder: Path, base: Path, described_by: Path, dtype: str, device: str) -> TorchRunner:
    """A LoRA folder on its base in `dtype`, by PEFT; the model's class is the one `described_by`'s config names."""
    import torch
    from peft import PeftModel

    kind, config = class_and_config(described_by, base)
    with quiet():
        model = load_model(kind, base, config, dtype=getattr(torch, dtype), ignore_mismatched_sizes=True)
        resize(model, described_by)
        return TorchRunner(PeftModel.from_pretrained(model, str(folder)), device)


def open_artifact(path: Path, device: str, missing: Callable[[str, str], None]) -> TorchRunner:
    """The artifact, loaded as a user would: its own class, in its own dtype.

    `missing` is told the class and each parameter that is not in the files, or is there in another shape.
    """
    kind, config = class_and_config(path, path)
    with quiet():
        model, report = load_model(kind, path, config, dtype="auto", output_loading_info=True)
    for name in [*report["missing_keys"], *(entry[0] for entry in report["mismatched_keys"])]:
        missing(kind.__name__, name)
    return TorchRunner(model, device)


def tokenize(artifact: Path, prompts: tuple[str, ...]) -> list[Tokens]:
    """Token ids by the artifact's tokenizer; without a usable one, fixed pseudo-random ids of the vocabulary."""
    import torch

    config = read_config(artifact)
    try:
        with quiet(), without_panics():
            tokenizer = load_tokenizer(artifact)
            found = [tokenizer(prompt)["input_ids"] for prompt in prompts]
        if all(found):  # without files, some classes make a tokenizer that knows no words
            return found
    except FossilExportError:
        raise
    except Exception:  # what libraries raise for the files of a tokenizer is not ours to list
        pass
    vocabulary = config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(vocabulary, (12,), generator=generator).tolist() for _ in prompts]


def class_and_config(named_by: Path, weights: Path) -> tuple[Any, Any]:
    """The model class that `named_by`'s config names, and the config of `weights` with the labels of `named_by`."""
    config, own = read_config(named_by), read_config(weights)
    if own.num_labels != config.num_labels:
        own.num_labels = config.num_labels
    return model_class(config, "AutoModelForCausalLM"), own


def resize(model: Any, artifact: Path) -> None:
    rows = read_config(artifact).get_text_config().vocab_size
    if rows != model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(rows, mean_resizing=False)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Load without the libraries' bars and reports; errors still come through."""
    import transformers

    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()
