"""Trainable tokens: rows of an embedding that were trained, and take the place of the base's.

    W'[t] = rows[k] for the k-th trained token t, W'[t] = W[t] for all others        rows (n, dims), W (tokens, dims)

They are values, no differences, so that whoever places them puts them there as they are (`Piece` in merging/_change.py)
and never asks for an update. Source: peft/tuners/trainable_tokens/layer.py, and `set_additional_trainable_modules` in
peft/utils/other.py for `trainable_token_indices` of LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fossil_export.errors import AdapterError
from fossil_export.methods._base import Base
from fossil_export.methods._method import Combination, Field, Numbers, Shapes


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, int) and not isinstance(one, bool) for one in value)


def _is_map(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_list, value.values()))


class TokenRows(Base):
    COMBINES: Combination = "alone"

    def indices(self, config: Mapping[str, Any], module: str, where: str) -> Any:
        """The numbers of the tokens whose rows `module` has; None if the config does not say."""
        raise NotImplementedError

    def read(self, config: Mapping[str, Any], module: str, shapes: Shapes, where: str) -> Numbers | None:
        found, rows = self.indices(config, module, where), shapes["rows"]
        if found is None:
            raise AdapterError(f"{where}: the config does not say which tokens these are; mend it, or save it again")
        if len(rows) != 2 or rows[0] != len(found):
            raise AdapterError(f"{where} is not a row for each of the {len(found)} tokens of the config; save it again")
        if len(set(found)) < len(found) or min(found) < 0:
            what = "negative" if min(found) < 0 else "twice the same"
            raise AdapterError(
                f"{where}: the config names {what} token numbers ({sorted(found)[0]} …), of which it cannot be told "
                "what was trained; train it with each token once"
            )
        return {"tokens": tuple(found)}

    def mismatch(self, shapes: Shapes, numbers: Numbers, weight: tuple[int, int]) -> str | None:
        last = max(numbers["tokens"])
        if last >= weight[0]:
            return f"token {last} was trained, and the weight has {weight[0]} rows"
        if shapes["rows"][1] != weight[1]:
            return f"its rows have {shapes['rows'][1]} values, the weight's {weight[1]}"
        return None


class TrainableTokens(TokenRows):
    """A `peft_type` of its own."""

    PEFT = {"TRAINABLE_TOKENS": {"trainable_tokens_delta": "rows"}}
    FIELDS = {
        "token_indices": Field("a list of integers", _is_list, []),
        "init_weights": Field(),  # how training began
    }

    def indices(self, config: Mapping[str, Any], module: str, where: str) -> Any:
        return config.get("token_indices") or None


class LoraTokens(TokenRows):
    """`trainable_token_indices` of LoRA."""

    PEFT = {"LORA": {"token_adapter.trainable_tokens_delta": "rows"}}
    FIELDS = {
        "trainable_token_indices": Field(
            "a list of integers, or one by module", lambda value: value is None or _is_list(value) or _is_map(value)
        ),
    }

    def indices(self, config: Mapping[str, Any], module: str, where: str) -> Any:
        given = config.get("trainable_token_indices")
        if not isinstance(given, dict):
            return given or None
        found = [tokens for end, tokens in given.items() if module.endswith(end)]
        if any(one != found[0] for one in found):
            raise AdapterError(f"{where}: the config names several lists of tokens for it; name its module in full")
        return (found or [None])[0]


ROWS = ("trainable_tokens", "lora_tokens")
"""The names of these in `METHODS`."""
