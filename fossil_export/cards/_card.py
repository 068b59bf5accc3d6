"""The model card of an artifact: what it was made from, how it is used, whether it is the model that was trained.

What the user wrote stays: the text outside of two markers, and every key of the metadata. What was written here is
noted between the markers, and gives way when the next model differs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote

from fossil_export.artifacts._kinds import KINDS
from fossil_export.cards._facts import Facts, adapters_of, hub_id, part, paths_of, survived
from fossil_export.cards._frontmatter import BEGIN, END, FILLER, MARKED, NOTE, edited, is_template, noted, read_card
from fossil_export.cards._markdown import plain
from fossil_export.cards._methods import methods_of
from fossil_export.cards._section import generated
from fossil_export.cards._task import pipeline_tag, task
from fossil_export.cards.kinds._table import CARDS
from fossil_export.merging._survival import WARNING_BELOW


def model_card(facts: Facts, existing: str | None = None) -> str:
    """The README.md of `facts`, which keeps what `existing` (read without changing its line ends) says.

    Raises FossilExportError when the metadata or the markers of `existing` cannot be read.
    """
    block, text, data = read_card(existing)
    newline = "\r\n" if existing is not None and "\r\n" in existing else "\n"
    template = is_template(text)
    own = _of_user(data, noted(text))
    wanted = _wanted(facts, own, template)
    changes = {key: value for key, value in wanted.items() if data.get(key) != value}
    changes |= {key: None for key in data if key not in own and key not in wanted}
    if "tags" not in wanted and data.get("tags") != own.get("tags"):
        changes["tags"] = own.get("tags")
    front = edited(block, data, changes, newline)
    section = f"{BEGIN}\n{generated(facts)}\n\n{_note(own, wanted)}\n{END}".replace("\n", newline)
    if MARKED.sub("", text).strip() and MARKED.search(text):
        body = MARKED.sub(lambda _: section, text)
    elif MARKED.sub("", text).strip() and not template:
        gap = "" if re.search(r"\n\r?\n\Z", text) else newline if text.endswith("\n") else newline * 2
        body = f"{text}{gap}{section}{newline}"
    else:
        body = f"{newline}# {plain(facts.repo_id.rpartition('/')[2])}{newline}{newline}{section}{newline}"
    if not block and not body.startswith(("\n", "\r\n")):
        body = newline + body
    return f"---{newline}{front}---{newline}{body}"


def warnings(facts: Facts, existing: str | None = None) -> list[str]:
    """What the one who publishes should know before it happens; one line each. Raises as `model_card` does."""
    return list(_warnings(facts, *read_card(existing)[1:]))


def _warnings(facts: Facts, text: str, data: Mapping[str, Any]) -> Iterator[str]:
    template = is_template(text)
    data = _of_user(data, noted(text))
    after = {**data, **_wanted(facts, data, template)}
    base = after.get("base_model")
    for name in _ids(data.get("base_model")):
        if name not in _ids(base):
            then = f"{base!r} stands there now" if base else "it is left out"
            yield f"README.md names {name!r} as base_model, which is not the base's name on the Hub; {then}"
        elif facts.base is not None and facts.base not in _ids(base):
            yield f"README.md names {name!r} as base_model, the record {facts.base!r}; README.md's is kept"
    if not base:
        yield "the base is not on the Hub, so the card names none; add `base_model:` to README.md if it is"
    if not after.get("license"):
        yield "the base's license is not known, so the card names none; add `license:` to README.md"
    parity = (facts.certificate or {}).get("parity")
    if parity is False:
        reason = (facts.certificate or {}).get("reason") or "see fossil_parity.json"
        yield f"verification found that this is not the model that was trained, and the card says so: {reason}"
    elif parity is not True and KINDS[facts.kind].verified:
        yield "this was not verified; run `fossil-export verify DIR` first and the card will quote it"
    kept = survived(facts)
    if kept is not None and kept < WARNING_BELOW:
        yield f"rounding left {kept:.1%} of the trained update, and the card says so; merge with --dtype float32"
    text = "" if template else MARKED.sub("", text)
    if count := text.count(FILLER):
        yield f"README.md still says {FILLER!r} in {count} places; fill them in or remove them"
    for name in paths_of(facts):
        if name in text:
            yield f"README.md holds the path {name!r} of this machine; remove it"


def _of_user(data: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata without what an earlier card was given here, as far as it is still that."""
    found = {key: value for key, value in data.items() if key == "tags" or key not in ours or ours[key] != value}
    tags, given = data.get("tags"), ours.get("tags")
    if isinstance(tags, list) and isinstance(given, list):
        found["tags"] = [tag for tag in tags if tag not in given]
        if not found["tags"]:
            del found["tags"]
    return found


def _note(own: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The line that remembers what of the metadata is not the user's."""
    ours = {key: value for key, value in wanted.items() if key != "tags" and own.get(key) is None}
    tags = [tag for tag in wanted.get("tags", []) if tag not in (own.get("tags") or [])]
    line = json.dumps(ours | ({"tags": tags} if tags else {}), ensure_ascii=False).replace(">", "\\u003e")
    return f"{NOTE} {line} -->"


def _wanted(facts: Facts, data: Mapping[str, Any], template: bool) -> dict[str, Any]:
    """The metadata that is missing in the user's, and what must not stay there (None). A `template`'s base is no
    word of the user's."""
    base, card_of_kind = hub_id(facts.base), CARDS[facts.kind]
    wanted: dict[str, Any] = {"base_model": base, "base_model_relation": card_of_kind.relation(facts) if base else None}
    wanted |= {"library_name": card_of_kind.library(facts)}
    wanted |= {"pipeline_tag": pipeline_tag(facts)}
    card = facts.base_card or {}
    terms = {key: card.get(key) for key in ("license", "license_name", "license_link")}
    link = terms["license_link"]
    if isinstance(link, str) and link and not re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*:", link):
        terms["license_link"] = f"{facts.hub}/{base}/blob/main/{quote(link.lstrip('./'))}" if base else None
    if all(data.get(key) in (None, value) for key, value in terms.items()):
        wanted |= terms  # one license, not half of the user's and half of the base's
    language = card.get("language")
    # YAML 1.1 reads Norwegian as false. The Hub refuses a card for what is no word.
    names = ["no" if name is False else name for name in (language if isinstance(language, list) else [language])]
    names = [name for name in names if isinstance(name, str)]
    wanted["language"] = names if isinstance(language, list) else next(iter(names), None)
    changes = {key: value for key, value in wanted.items() if value and data.get(key) is None}

    given = _ids(data.get("base_model"))
    kept = [name for name in given if not _is_local(name, facts, template)]
    if len(kept) < len(given):
        changes["base_model"] = (kept if len(kept) > 1 else kept[0]) if kept else base
    tags = data.get("tags")
    own = list(tags) if isinstance(tags, list) else [] if tags is None else [tags]
    merged = [tag for tag in own if not _is_local_tag(tag, facts, template)]
    merged += [tag for tag in _tags(facts) if tag not in merged]
    if merged != tags:
        changes["tags"] = merged
    return changes


def _tags(facts: Facts) -> list[str]:
    adapters = adapters_of(facts.record)
    found = [tag for method in methods_of(facts) for tag in method.tags]
    found += ["bone"] * any(adapter.get("peft_type") == "BONE" for adapter in adapters)
    variants = [adapter.get("variant") for adapter in adapters]
    found += [variant for variant in ("tile", "mini", "bat") if variant in variants]
    found.append("fossil-export")
    found += CARDS[facts.kind].tags(facts) + ["text2text-generation"] * (task(facts) == "text2text")
    return list(dict.fromkeys(found))


def _ids(given: Any) -> list[str]:
    return [name for name in (given if isinstance(given, list) else [given]) if isinstance(name, str)]


def _is_local(name: str, facts: Facts, template: bool) -> bool:
    """Whether `name` is a folder's, such as a trainer leaves where an id belongs."""
    if hub_id(name) is None or name == facts.base:
        return hub_id(name) is None
    named = part(facts.record, "base").get("name"), (facts.config or {}).get("base_model_name_or_path")
    return template or (facts.base is None and name in named)


def _is_local_tag(tag: Any, facts: Facts, template: bool) -> bool:
    """PEFT writes the base's name into a tag too."""
    match = re.fullmatch(r"base_model:(?:\w+:)?(.*)", tag, re.DOTALL) if isinstance(tag, str) else None
    return match is not None and _is_local(match[1], facts, template)
