"""The metadata of a model card, and what the Hub has against it."""

from __future__ import annotations

import base64
import re
from typing import Any

import yaml

from loopback.git import Refusal

# As the Hub lists them when it refuses one (huggingface_hub issue 4218).
LICENSES = re.findall(
    r"[^\s,]+",
    "apache-2.0, mit, openrail, bigscience-openrail-m, creativeml-openrail-m, bigscience-bloom-rail-1.0, "
    "bigcode-openrail-m, afl-3.0, artistic-2.0, bsl-1.0, bsd, bsd-2-clause, bsd-3-clause, bsd-3-clause-clear, c-uda, "
    "cc, cc0-1.0, cc-by-2.0, cc-by-2.5, cc-by-3.0, cc-by-4.0, cc-by-sa-3.0, cc-by-sa-4.0, cc-by-nc-2.0, cc-by-nc-3.0, "
    "cc-by-nc-4.0, cc-by-nd-4.0, cc-by-nc-nd-3.0, cc-by-nc-nd-4.0, cc-by-nc-sa-2.0, cc-by-nc-sa-3.0, cc-by-nc-sa-4.0, "
    "cdla-sharing-1.0, cdla-permissive-1.0, cdla-permissive-2.0, wtfpl, ecl-2.0, epl-1.0, epl-2.0, etalab-2.0, "
    "eupl-1.1, eupl-1.2, agpl-3.0, gfdl, gpl, gpl-2.0, gpl-3.0, lgpl, lgpl-2.1, lgpl-3.0, isc, h-research, "
    "intel-research, lppl-1.3c, ms-pl, apple-ascl, apple-amlr, mpl-2.0, odc-by, odbl, openmdw-1.0, openrail++, "
    "osl-3.0, postgresql, ofl-1.1, ncsa, unlicense, zlib, pddl, lgpl-lr, deepfloyd-if-license, "
    "fair-noncommercial-research-license, llama2, llama3, llama3.1, llama3.2, llama3.3, llama4, grok2-community, "
    "gemma, unknown, other",
)
_RELATIONS = ("adapter", "merge", "quantized", "finetune")
_TEXTS = ("library_name", "pipeline_tag", "license_name", "license_link", "thumbnail")
_LISTS = ("tags", "datasets", "metrics", "language", "base_model")
_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)


def refuse_card(lines: list[dict[str, Any]]) -> None:
    """A commit that would put a card there which the Hub does not take."""
    for line in lines:
        if line["key"] == "file" and line["value"]["path"] == "README.md":
            errors, _ = said_of(base64.b64decode(line["value"]["content"]).decode())
            if errors:
                raise Refusal(400, f"Invalid metadata in README.md: {'; '.join(errors)}")


def front_matter(text: str) -> dict[str, Any]:
    match = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", text, re.DOTALL)
    card = yaml.safe_load(match[1]) if match else {}
    if not isinstance(card or {}, dict):
        raise ValueError("The metadata of a card must be a mapping")
    return card or {}


def said_of(text: str) -> tuple[list[str], list[str]]:
    """Errors, for which a commit with this card is refused, and warnings."""
    try:
        card = front_matter(text)
    except (yaml.YAMLError, ValueError) as error:
        return [str(error)], []
    if not card:
        return [], ["empty or missing yaml metadata in repo card"]
    return list(_errors(card)), []


def _errors(card: dict[str, Any]) -> list[str]:
    found = []
    licenses = card.get("license")
    for one in licenses if isinstance(licenses, list) else [] if licenses is None else [licenses]:
        if one not in LICENSES:
            found.append(f'"license" must be one of [{", ".join(LICENSES)}, array]')
    for key in _TEXTS:
        if key in card and not isinstance(card[key], str):
            found.append(f'"{key}" must be a string')
    for key in _LISTS:
        value = card.get(key, [])
        for number, one in enumerate(value if isinstance(value, list) else [value]):
            if not isinstance(one, str):
                found.append(f'"{key}[{number}]" must be a string')
            elif key in ("base_model", "datasets") and not _ID.fullmatch(one):
                found.append(f'"{key}[{number}]" with value "{one}" is not valid')
    relation = card.get("base_model_relation")
    if relation is not None and relation not in _RELATIONS:
        found.append(f'"base_model_relation" must be one of [{", ".join(_RELATIONS)}]')
    return found
