"""The model card of an artifact: what it was made from, how it is used, whether it is the model that was trained.

What the user wrote stays: the text outside of two markers, and every key of the metadata.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any
from urllib.parse import quote

from fossil_export.errors import FossilExportError
from fossil_export.merging.survival import WARNING_BELOW
from fossil_export.publishing.snippets import fenced, pipeline_tag, plain, task, usage

KINDS = ("merged", "lora", "miss", "gguf-lora", "onnx")
BEGIN, END = "<!-- fossil-export: begin -->", "<!-- fossil-export: end -->"

_HUB = "https://huggingface.co"
_PAPER = "https://arxiv.org/abs/2409.15371"
_FILLER = "[More Information Needed]"
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)?")
_FRONT = re.compile(r"\s*---[ \t]*(?:\r\n|\r|\n)((?:[\s\S]*?(?:\r\n|\r|\n))??)---[ \t]*(?:\r\n|\n|$)")
_OPENED = re.compile(r"\s*---[ \t]*(?:\r\n|\r|\n)")
_MARKED = re.compile(rf"^{BEGIN}[ \t]*\r?$[\s\S]*?^{END}[ \t]*(?=\r?$)", re.MULTILINE)
_MARKER = re.compile(rf"^(?:{BEGIN}|{END})[ \t]*\r?$", re.MULTILINE)
_OWN_LORA_CARD = re.compile(
    r"\s*# LoRA form of a FOSSIL adapter\n\nFor [^\n]*; [^\n]*\. Made by fossil-export [^`]*?"
    r'```python\n[^`]*"this-folder"\)\n```\s*'
)
# What `convert --to lora` writes; see `_card` in converting/lora.py.
_COMMENT = re.compile("<!--.*?-->")
_FILLED = re.compile(
    r"|# Model Card for .*|- \*\*[^*]+:\*\* \[More Information Needed\]|## Training procedure|### Framework versions"
    r"|- PEFT [\w.+]+"
)
# What PEFT adds, and fields that came and went.
_PARTS = ("adapter", "base")
_PACKAGES = ("torch", "transformers", "peft")


@dataclass(frozen=True)
class Facts:
    """What is known of an artifact. `base` and `adapter` are ids on the Hub, None for what is not there: the path
    of a folder is never published. `files` are the names of what is; `config` is config.json or adapter_config.json,
    `base_card` the metadata of the base's README.md."""

    repo_id: str
    kind: str
    files: tuple[str, ...]
    record: Mapping[str, Any] | None
    certificate: Mapping[str, Any] | None
    config: Mapping[str, Any] | None
    base: str | None
    base_revision: str | None
    adapter: str | None
    adapter_revision: str | None
    base_card: Mapping[str, Any] | None


def model_card(facts: Facts, existing: str | None = None) -> str:
    """The README.md of `facts`, which keeps what `existing` (read without changing its line ends) says.

    Raises FossilExportError when the metadata or the markers of `existing` cannot be read.
    """
    block, text, data = _read(existing)
    newline = "\r\n" if existing is not None and "\r\n" in existing else "\n"
    template = _is_template(text)
    front = _edited(block, data, _changes(facts, data, template), newline)
    part = f"{BEGIN}\n{_generated(facts)}\n{END}".replace("\n", newline)
    if _MARKED.search(text):
        body = _MARKED.sub(lambda _: part, text)
    elif text.strip() and not template:
        gap = "" if re.search(r"\n\r?\n\Z", text) else newline if text.endswith("\n") else newline * 2
        body = f"{text}{gap}{part}{newline}"
    else:
        body = f"{newline}# {plain(facts.repo_id.rpartition('/')[2])}{newline}{newline}{part}{newline}"
    if not block and not body.startswith(("\n", "\r\n")):
        body = newline + body
    return f"---{newline}{front}---{newline}{body}"


def warnings(facts: Facts, existing: str | None = None) -> list[str]:
    """What the one who publishes should know before it happens; one line each. Raises as `model_card` does."""
    return list(_warnings(facts, *_read(existing)[1:]))


def _warnings(facts: Facts, text: str, data: Mapping[str, Any]) -> Iterator[str]:
    template = _is_template(text)
    after = {**data, **_changes(facts, data, template)}
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
    elif parity is not True:
        yield "this was not verified; run `fossil-export verify DIR` first and the card will quote it"
    survived = _survived(facts)
    if survived is not None and survived < WARNING_BELOW:
        yield f"rounding left {survived:.1%} of the trained update, and the card says so; merge with --dtype float32"
    text = "" if template else _MARKED.sub("", text)
    if count := text.count(_FILLER):
        yield f"README.md still says {_FILLER!r} in {count} places; fill them in or remove them"
    for name in _paths(facts):
        if name in text:
            yield f"README.md holds the path {name!r} of this machine; remove it"


def _read(existing: str | None) -> tuple[str, str, dict[str, Any]]:
    """The YAML, the text and the metadata of a card. Raises FossilExportError with the line that is wrong."""
    import yaml  # type: ignore[import-untyped]

    given = (existing or "").removeprefix("\ufeff")
    match = _FRONT.match(given)
    if match is None and _OPENED.match(given):
        line = given[: given.index("---")].count("\n") + 1
        raise FossilExportError(
            f"README.md: line {line}: opens metadata with --- that is not closed; add a line of ---"
        )
    block, text = (match[1], given[match.end() :]) if match else ("", given)
    first = given[: match.start(1)].count("\n") + 1 if match else 1
    remedy = "correct the metadata between the two lines of ---"
    try:
        data = yaml.safe_load(block)
    except (yaml.YAMLError, ValueError, RecursionError) as problem:
        mark = getattr(problem, "problem_mark", None)
        if mark is not None and mark.index >= len(block.rstrip()):
            mark = getattr(problem, "context_mark", None) or mark  # what is never closed, not where the block ends
        position = mark.index if mark is not None else getattr(problem, "position", 0)
        why = getattr(problem, "problem", None) or getattr(problem, "reason", None) or str(problem)
        line = first + block[:position].count("\n")
        raise FossilExportError(f"README.md: line {line}: {' '.join(str(why).split())}; {remedy}") from problem
    if data is not None and not isinstance(data, dict):
        raise FossilExportError(f"README.md: line {first}: is {type(data).__name__}, expected `key: value`; {remedy}")
    markers = [found[0].strip() for found in _MARKER.finditer(text)]
    if markers not in ([], [BEGIN, END]):
        place = given.index(markers[0], match.end() if match else 0)
        line = given[:place].count("\n") + 1
        raise FossilExportError(
            f"README.md: line {line}: {BEGIN} and {END} must stand once, in this order; remove them"
        )
    return block, text, data or {}


def _edited(block: str, data: Mapping[str, Any], changes: Mapping[str, Any], newline: str) -> str:
    """The YAML with `changes`, where None takes a key away; the user's lines stay as they are wherever they can."""
    import yaml
    from huggingface_hub import ModelCardData
    from huggingface_hub.utils import yaml_dump

    def dumped(found: Mapping[str, Any]) -> str:
        if not found:
            return ""
        return str(ModelCardData(**found).to_yaml(line_break=newline, original_order=list(found))) + newline

    if not changes:
        return block
    wanted = {key: value for key, value in {**data, **changes}.items() if value is not None or key not in changes}
    try:
        keys = [key for key, _ in yaml.compose(block, Loader=yaml.SafeLoader).value] if data else []
        starts = [key.start_mark.index for key in keys] + [len(block)]
        result = block[: starts[0]]
        for key, start, end in zip(keys, starts[:-1], starts[1:], strict=True):
            name, piece = str(key.value), block[start:end]
            if name in changes:
                # Comments below a value belong to the next key.
                kept = re.search(r"(?:^[ \t]*(?:#[^\n]*)?\n)*\Z", piece, re.MULTILINE)
                piece = dumped({name: changes[name]} if name in wanted else {}) + (kept[0] if kept else "")
            result += piece
        result += dumped({key: value for key, value in wanted.items() if key not in data})
        if yaml.safe_load(result) == wanted:
            return result
    except (yaml.YAMLError, ValueError):
        pass  # anchors, a mapping in braces and the like
    return str(yaml_dump(wanted, sort_keys=False, line_break=newline))


def _changes(facts: Facts, data: Mapping[str, Any], template: bool) -> dict[str, Any]:
    """The metadata that is missing in the user's, and what must not stay there (None). A `template`'s base is no
    word of the user's."""
    base = _id(facts.base)
    wanted: dict[str, Any] = {"base_model": base, "base_model_relation": _relation(facts) if base else None}
    wanted |= {"library_name": {"merged": "transformers", "lora": "peft", "miss": "peft"}.get(facts.kind)}
    wanted |= {"pipeline_tag": pipeline_tag(facts)}
    card = facts.base_card or {}
    terms = {key: card.get(key) for key in ("license", "license_name", "license_link")}
    link = terms["license_link"]
    if isinstance(link, str) and link and not re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*:", link):
        terms["license_link"] = f"{_HUB}/{base}/blob/main/{quote(link.lstrip('./'))}" if base else None
    if all(data.get(key) in (None, value) for key, value in terms.items()):
        wanted |= terms  # one license, not half of the user's and half of the base's
    language = card.get("language")
    # YAML 1.1 reads Norwegian as false.
    names = ["no" if name is False else name for name in (language if isinstance(language, list) else [language])]
    wanted["language"] = names if isinstance(language, list) else names[0]
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
    adapter = _part(facts.record, "adapter")
    found = ["fossil", "miss"] + ["bone"] * (adapter.get("peft_type") == "BONE")
    if adapter.get("variant") in ("tile", "mini", "bat"):
        found.append(adapter["variant"])
    found.append("fossil-export")
    found += {"lora": ["lora"], "gguf-lora": ["lora", "gguf"], "onnx": ["onnx"]}.get(facts.kind, [])
    if facts.kind == "onnx" and "genai_config.json" in facts.files:
        found.append("onnxruntime-genai")
    return found + ["text2text-generation"] * (task(facts) == "text2text")


def _relation(facts: Facts) -> str:
    if facts.kind in ("lora", "miss", "gguf-lora"):
        return "adapter"
    return "quantized" if (facts.record or {}).get("precision") == "int4" and facts.kind == "onnx" else "finetune"


def _id(name: Any) -> str | None:
    """`name` if it can be a model on the Hub."""
    return name if isinstance(name, str) and _ID.fullmatch(name) and "--" not in name and ".." not in name else None


def _ids(given: Any) -> list[str]:
    return [name for name in (given if isinstance(given, list) else [given]) if isinstance(name, str)]


def _paths(facts: Facts) -> list[str]:
    """What record and config call base and adapter where that is a path, the longest first."""
    found = {_part(source, part).get("name") for source in (facts.record, facts.certificate) for part in _PARTS}
    found |= {(facts.certificate or {}).get("base"), (facts.config or {}).get("base_model_name_or_path")}
    paths = [name for name in found if isinstance(name, str) and re.match(r"(?:[A-Za-z]:|~|\.{1,2})?[/\\].", name)]
    return sorted(paths, key=lambda name: (-len(name), name))


def _is_local(name: str, facts: Facts, template: bool) -> bool:
    """Whether `name` is a folder's, such as a trainer leaves where an id belongs."""
    if _id(name) is None or name == facts.base:
        return _id(name) is None
    named = _part(facts.record, "base").get("name"), (facts.config or {}).get("base_model_name_or_path")
    return template or (facts.base is None and name in named)


def _is_local_tag(tag: Any, facts: Facts, template: bool) -> bool:
    """PEFT writes the base's name into a tag too."""
    match = re.fullmatch(r"base_model:(?:\w+:)?(.*)", tag, re.DOTALL) if isinstance(tag, str) else None
    return match is not None and _is_local(match[1], facts, template)


@cache
def _template() -> tuple[frozenset[str], tuple[str, ...]]:
    """Lines of huggingface_hub's empty card, and how its comments begin, whose wording has changed over time."""
    from huggingface_hub.repocard import TEMPLATE_MODELCARD_PATH

    text = re.sub(r"\{\{[^{}]*?default\(\s*\"(.*?)\"[^{}]*\}\}", r"\1", TEMPLATE_MODELCARD_PATH.read_text("utf-8"))
    comments = tuple(comment[:20] for comment in _COMMENT.findall(text))
    return frozenset(line.strip() for line in _COMMENT.sub("", text).splitlines()), comments


def _is_template(text: str) -> bool:
    """Whether `text` is the card that PEFT and huggingface_hub write, with nothing filled in, or the one of
    `convert --to lora`, which the generated part replaces."""
    if _OWN_LORA_CARD.fullmatch(text.replace("\r\n", "\n")):
        return True
    if _FILLER not in text:
        return False
    lines, comments = _template()
    visible = _COMMENT.sub(lambda found: "" if found[0].startswith(comments) else found[0], text)
    return all(line in lines or _FILLED.fullmatch(line) for line in map(str.strip, visible.splitlines()))


def _generated(facts: Facts) -> str:
    """All of the part between the markers."""
    found = [
        _summary(facts),
        "## How it was made",
        _table(("Item", "Value"), _made(facts)),
        "## How to use it",
        usage(facts),
    ]
    found += ["## Is it the model that was trained?", *_verdict(facts)]
    survived = _survived(facts)
    if survived is not None:
        found += ["## What rounding left of the update"]
        rows = _part(facts.record, "survival").get("sample_rows_per_tensor")
        measured = f", measured on {rows} rows of each" if isinstance(rows, int) else ""
        found += [f"{survived:.1%} of the trained update is in the stored weights{measured}."]
        if survived < WARNING_BELOW:
            found += [
                "**That is little**: steps of the weights' number format are larger than much of what was trained. "
                "A merge with `--dtype float32`, or the adapter apart from the weights, keeps all of it."
            ]
    fields = {"author": "Kang, Jiale and Yin, Qingyu", "year": "2024", "eprint": "2409.15371"}
    fields |= {"archivePrefix": "arXiv", "url": _PAPER}
    entry = "\n".join(["@misc{kang2024fossil,", *(f"  {key} = {{{value}}}," for key, value in fields.items()), "}"])
    return "\n\n".join([*found, "## Citation", "The method:", fenced("bibtex", entry)])


def _summary(facts: Facts) -> str:
    base = _link(facts.base, facts.base_revision) or "a base model that is not on the Hub"
    link = _link(facts.adapter, facts.adapter_revision)
    adapter = f"the adapter {link}" if link else "an adapter"
    method = f"[FOSSIL]({_PAPER}) (MiSS in PEFT, earlier Bone and DiSHA)"
    if facts.kind == "merged":
        line = f"{base}, fine-tuned with {method}: {adapter} is merged into its weights."
    elif facts.kind == "onnx":
        apart = (facts.record or {}).get("mode") == "swappable"
        where = "in a file of its own, which a session takes and leaves as it runs" if apart else "part of it"
        line = f"{base}, fine-tuned with {method}, as an ONNX graph: {adapter} is {where}."
    elif facts.kind == "miss":
        line = f"{adapter} for {base}, trained with {method}, as PEFT loads it."
    else:
        near = _part(facts.record, facts.kind).get("exact") is False and facts.kind == "lora"
        form = "the LoRA nearest to its update" if near else "the LoRA that it is"
        line = f"{adapter} for {base}, trained with {method}, as {form}."
    return line[0].upper() + line[1:]


def _made(facts: Facts) -> Iterator[tuple[str, Any]]:
    record, config = facts.record or {}, facts.config or {}
    adapter, details = _part(record, "adapter"), _part(record, facts.kind)
    yield "Adapter", _link(facts.adapter, facts.adapter_revision) or "not on the Hub"
    yield "Adapter's revision", plain(facts.adapter_revision or "") if facts.adapter else None
    yield "Base", _link(facts.base, facts.base_revision) or "not on the Hub"
    yield "Base's revision", plain(facts.base_revision or "") if facts.base else None
    yield "Variant", plain(adapter.get("variant") or "")
    yield "Rank", plain(adapter.get("rank") or "")
    if isinstance(parameters := adapter.get("parameters"), int):
        yield "Trained parameters", f"{parameters:,}"
    if facts.kind == "merged":
        dtype = record.get("dtype")
        own = config.get("dtype") or config.get("torch_dtype")
        yield "Dtype", plain((own or "the base's") if dtype in (None, "auto") else dtype)
    if facts.kind == "onnx":
        yield "Mode", plain(record.get("mode") or "")
        yield "Precision", plain(record.get("precision") or "")
    if facts.kind in ("lora", "gguf-lora"):
        if details.get("rank") != adapter.get("rank"):
            yield "Rank of the LoRA", plain(details.get("rank") or "")
        yield "Numbers", plain(details.get("outtype") or "")
        error = details.get("relative_error")
        yield "Error of the conversion", f"{_number(error, '.2g')} of the update" if error else None
    if tool := _part(record, "tool"):
        yield "Made by", plain(f"{tool.get('name', 'fossil-export')} {tool.get('version', '')}")


def _verdict(facts: Facts) -> Iterator[str]:
    found = facts.certificate or {}
    if found.get("parity") not in (True, False):
        yield "It was not verified: `fossil-export verify` compares weights and answers with the trainer's."
        return
    yield "`fossil-export verify` compared it with the adapter on its base:"
    yield _table(("Check", "Result"), _figures(facts, found))


def _figures(facts: Facts, found: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    reason = plain(_without_paths(str(found.get("reason") or ""), facts))
    yield "Verdict", "parity" if found["parity"] else f"**no parity**{': ' + reason if reason else ''}"
    if weights := _part(found, "weights"):
        yield "Weights", ", ".join(f"{_number(weights.get(key), 'd')} {key}" for key in ("tensors", "merged", "wrong"))
        worst = _number(weights.get("worst_error_in_steps"), ".4f")
        yield "Worst error", f"{worst} steps of the dtype (0.5 is exact rounding)"
    if forward := _part(found, "forward"):
        trainer = _part(forward, "trainer")
        yield "Trainer", f"{_distance(trainer)} ({plain(trainer.get('dtype') or '–')})"
        yield "This model", _distance(_part(forward, "artifact"))
        same = forward.get("same_continuations")
        same = same if isinstance(same, list) and len(same) == 2 else ["–", "–"]
        asked = f"{_number(forward.get('prompts'), 'd')} prompts, truth in {plain(forward.get('truth') or '–')}"
        yield "Same continuations", f"{_number(same[0], 'd')} of {_number(same[1], 'd')} ({asked})"
        yield "Leaves the band at", plain(forward.get("first_module_outside") or "")
    yield "Device", plain(found.get("device") or "")
    versions = _part(found, "versions")
    yield "Versions", ", ".join(f"{name} {plain(versions[name])}" for name in _PACKAGES if versions.get(name))


def _distance(found: Mapping[str, Any]) -> str:
    error, top = _number(found.get("relative_error"), ".2e"), _number(found.get("top1"), ".1%")
    return f"{error} from the truth, KL {_number(found.get('kl'), '.1e')}, top-1 {top}"


def _number(value: Any, form: str) -> str:
    good = isinstance(value, int if form == "d" else (int, float)) and not isinstance(value, bool)
    return format(value, form) if good else "–"


def _survived(facts: Facts) -> float | None:
    value = _part(facts.record, "survival").get("survived")
    return float(value) if isinstance(value, (int, float)) and value == value else None


def _without_paths(line: str, facts: Facts) -> str:
    for name in _paths(facts):
        line = line.replace(name, name.rstrip("/\\").rpartition("/")[2])
    return re.sub(r"(?<![\w.:/-])(?:[A-Za-z]:|~|\.{1,2})?[/\\](?:[^\s/\\:;,'\"]+[/\\])*([^\s/\\:;,'\"]+)", r"\1", line)


def _link(name: str | None, revision: str | None) -> str | None:
    if _id(name) is None or name is None:
        return None
    return f"[{plain(name)}]({_HUB}/{quote(name)}" + (f"/tree/{quote(revision, safe='')})" if revision else ")")


def _table(head: tuple[str, str], rows: Iterator[tuple[str, Any]]) -> str:
    lines = [f"| {name} | {value} |" for name, value in rows if value]
    return "\n".join([f"| {head[0]} | {head[1]} |", "|---|---|", *lines])


def _part(source: Mapping[str, Any] | None, key: str) -> Mapping[str, Any]:
    found = (source or {}).get(key)
    return found if isinstance(found, Mapping) else {}
