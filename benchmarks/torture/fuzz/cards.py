"""README.md of a folder that is pushed. The judge reads the card that would go by PyYAML and the Hub's client."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from random import Random

from torture.fuzz.mutations import damage_file
from torture.fuzz.records import make_artifacts
from torture.fuzz.subject import Subject, Unjudged

CARDS = (
    "---\nlicense: mit\ntags: [a, b]  # mine\nlanguage:\n- en\nbase_model: ada/base\n---\n\n# Mine\n\nWords.\n",
    "---\nlicense: other\nmodel-index:\n- name: x\n  results: []\n---\n# Mine\n<!-- fossil-export: begin -->\nold\n"
    '<!-- fossil-export wrote: {"tags": ["fossil"]} -->\n<!-- fossil-export: end -->\nafter\n',
    "# No metadata\n\n![picture](picture.png) [link](<a b.txt>)\n",
)
PIECES = (
    *(
        "---\n",
        "\r\n",
        "\r",
        "\ufeff",
        "\u2028",
        "\x85",
        "\x00",
        "\x1b[2J",
        "\t",
        "é",
        "- ",
        ": ",
        "#",
        "'",
        '"',
        "{",
        "]",
    ),
    *(
        "&a [*a]",
        "a: &a [x,x]\nb: &b [*a,*a]\nc: &c [*b,*b]\n",
        "? [1, 2]\n: 3\n",
        "!!python/object:os.system x",
        "<<: {}",
    ),
    *(
        "license: 2020-01-01\n",
        "tags: null\n",
        "tags: {a: b}\n",
        "base_model: [1, null]\n",
        "1: 2\n",
        "license: .nan\n",
    ),
    *("<!-- fossil-export: begin -->\n", "<!-- fossil-export: end -->\n", "<!-- fossil-export wrote: {} -->\n"),
    *("a: " + "[" * 3000, "x: " + "&b " * 20, "language: [no, yes]\n", "a: 0o17\nb: 1e999\n", "license: mit\n" * 2),
    *("bomb0: &b0 [x]\n" + "".join(f"bomb{i}: &b{i} [{', '.join([f'*b{i - 1}'] * 9)}]\n" for i in range(1, 9)),),
)


@dataclass(frozen=True)
class Cards:
    name: str = "README.md"

    def make(self, folder: Path) -> None:
        make_artifacts(folder)

    def mutate(self, folder: Path, random: Random) -> str:
        path, text = folder / "lora" / "README.md", random.choice(CARDS)
        path.write_text(text, newline="")
        if random.random() < 0.25:
            return damage_file(path, random)
        pieces = random.sample(PIECES, random.choice((1, 1, 2)))
        for piece in pieces:
            lines = text.splitlines(keepends=True)
            at = random.randrange(len(lines) + 1)
            text = "".join([*lines[:at], piece, *lines[at:]])
            if random.random() < 0.3:
                at = random.randrange(len(text))
                text = text[:at] + piece + text[at:]
        encoding = random.choice(("utf-8", "utf-8", "utf-8", "utf-8", "utf-16", "latin-1"))
        path.write_bytes(text.encode(encoding, errors="replace"))
        return f"{[piece[:60] for piece in pieces]} in {encoding}"

    def command(self, folder: Path, random: Random) -> list[str]:
        return ["push", "--dry-run", str(folder / "lora"), "ada/model", "--json"]

    def judge(self, folder: Path) -> str | None:
        import yaml  # type: ignore[import-untyped]
        from huggingface_hub import ModelCard

        from fossil_export.publishing._about import extended_card
        from fossil_export.publishing._push_plan import facts_for, plan_files

        given = (folder / "lora" / "README.md").read_bytes().decode()
        plan = plan_files(folder / "lora", "ada/model", False, None, False, None)
        content = extended_card(facts_for(plan.parts, "ada/model")[0], given, None)[0].decode()
        told = json.loads((folder.parent / "stdout").read_text())["card"]
        try:
            before, after = (
                ModelCard(given, ignore_metadata_errors=True),
                ModelCard(content, ignore_metadata_errors=True),
            )
            block = content.split("---")[1]
            read = json.loads(json.dumps(yaml.safe_load(block), default=str))
        except Exception as problem:
            raise Unjudged(f"{type(problem).__name__}: {problem}"[:300]) from problem
        if read != told:
            return f"the plan tells {told}, the card has {read}"[:500]
        kept = before.data.to_dict()
        found = after.data.to_dict()
        lost = [key for key, value in kept.items() if key not in found and value not in (None, [], {})]
        if not is_id(str(kept.get("base_model"))):  # left out, and a warning says so
            lost = [key for key in lost if key != "base_model"]
        if lost:
            return f"{lost} is lost"
        outside = given.split("<!-- fossil-export: begin -->")[0].split("---")[-1].strip()
        return None if outside in content else "the user's text is not in it"


SUBJECTS: list[Subject] = [Cards()]


def is_id(name: str) -> bool:
    """Whether the Hub may have a model of this name."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
