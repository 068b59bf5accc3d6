"""What cards call a method, where it was published, and its tags, by `peft_type` and variant.

Titles, names and years are those of the papers' pages on arXiv. A method that is not in the table is named by PEFT's
own word, without a paper.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from fossil_export.cards._facts import Facts, adapters_of
from fossil_export.cards._markdown import plain

ARXIV = "https://arxiv.org/abs/"


@dataclass(frozen=True)
class Paper:
    """One on arXiv; `key` is for BibTeX."""

    key: str
    number: str
    title: str
    author: str
    year: str

    @property
    def url(self) -> str:
        return ARXIV + self.number

    def bibtex(self) -> str:
        """Its entry."""
        fields = {"title": self.title, "author": self.author, "year": self.year, "eprint": self.number}
        fields |= {"archivePrefix": "arXiv", "url": self.url}
        return "\n".join([f"@misc{{{self.key},", *(f"  {name} = {{{value}}}," for name, value in fields.items()), "}"])


@dataclass(frozen=True)
class Named:
    """`name` in text, `more` what follows it there, `tags` in the metadata."""

    name: str
    tags: tuple[str, ...]
    paper: Paper | None = None
    more: str = ""

    def markdown(self) -> str:
        return (f"[{self.name}]({self.paper.url})" if self.paper is not None else self.name) + self.more


FOSSIL = Named(
    "FOSSIL",
    ("fossil", "miss"),
    Paper(
        "kang2024fossil",
        "2409.15371",
        "MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure",
        # That of the paper's latest version; earlier ones were called otherwise.
        "Kang, Jiale and Yin, Qingyu",
        "2024",
    ),
    " (MiSS in PEFT, earlier Bone and DiSHA)",
)
_FOSSIL_TYPES = ("MISS", "BONE", "RWKV")

_LORA = Paper(
    "hu2021lora",
    "2106.09685",
    "LoRA: Low-Rank Adaptation of Large Language Models",
    "Hu, Edward J. and Shen, Yelong and Wallis, Phillip and Allen-Zhu, Zeyuan and Li, Yuanzhi and Wang, Shean and "
    "Wang, Lu and Chen, Weizhu",
    "2021",
)
_DORA = Paper(
    "liu2024dora", "2402.09353", "DoRA: Weight-Decomposed Low-Rank Adaptation", "Liu, Shih-Yang and others", "2024"
)
_OTHERS = {
    "LORA": Named("LoRA", ("lora", "peft"), _LORA),
    "DORA": Named("DoRA", ("dora", "lora", "peft"), _DORA),
    "ADALORA": Named("AdaLoRA", ("adalora", "peft"), Paper(
        "zhang2023adalora", "2303.10512", "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning",
        "Zhang, Qingru and others", "2023",
    )),
    "LOHA": Named("LoHa", ("loha", "peft"), Paper(
        "hyeonwoo2021fedpara", "2108.06098",
        "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning",
        "Hyeon-Woo, Nam and Ye-Bin, Moon and Oh, Tae-Hyun", "2021",
    )),
    "LOKR": Named("LoKr", ("lokr", "peft"), Paper(
        "yeh2023lycoris", "2309.14859",
        "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation",
        "Yeh, Shih-Ying and others", "2023",
    )),
    "IA3": Named("(IA)³", ("ia3", "peft"), Paper(
        "liu2022ia3", "2205.05638",
        "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
        "Liu, Haokun and others", "2022",
    )),
    "OFT": Named("OFT", ("oft", "peft"), Paper(
        "qiu2023oft", "2306.07280", "Controlling Text-to-Image Diffusion by Orthogonal Finetuning",
        "Qiu, Zeju and others", "2023",
    )),
    "BOFT": Named("BOFT", ("boft", "peft"), Paper(
        "liu2023boft", "2311.06243", "Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization",
        "Liu, Weiyang and others", "2023",
    )),
    "VERA": Named("VeRA", ("vera", "peft"), Paper(
        "kopiczko2023vera", "2310.11454", "VeRA: Vector-based Random Matrix Adaptation",
        "Kopiczko, Dawid J. and Blankevoort, Tijmen and Asano, Yuki M.", "2023",
    )),
    "FOURIERFT": Named("FourierFT", ("fourierft", "peft"), Paper(
        "gao2024fourierft", "2405.03003", "Parameter-Efficient Fine-Tuning with Discrete Fourier Transform",
        "Gao, Ziqi and others", "2024",
    )),
    "HRA": Named("HRA", ("hra", "peft"), Paper(
        "yuan2024hra", "2405.17484",
        "Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection Adaptation",
        "Yuan, Shen and Liu, Haotian and Xu, Hongteng", "2024",
    )),
    "VBLORA": Named("VB-LoRA", ("vblora", "peft"), Paper(
        "li2024vblora", "2405.15179", "VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks",
        "Li, Yang and Han, Shaobo and Ji, Shihao", "2024",
    )),
    "RANDLORA": Named("RandLoRA", ("randlora", "peft"), Paper(
        "albert2025randlora", "2502.00987",
        "RandLoRA: Full-rank parameter-efficient fine-tuning of large models", "Albert, Paul and others", "2025",
    )),
}  # fmt: skip


def method_of(peft_type: Any, variant: Any) -> Named:
    """The method of an adapter, whatever stands in its record; FOSSIL's if that does not say."""
    variants = str(variant or "").split("+")
    if not isinstance(peft_type, str) or peft_type in _FOSSIL_TYPES:
        return FOSSIL
    if peft_type == "LORA" and any("dora" in name for name in variants):
        return _OTHERS["DORA"]
    word = re.sub(r"\W", "-", peft_type.lower(), flags=re.ASCII)
    return _OTHERS.get(peft_type) or Named(plain(peft_type), (word, "peft"))


def methods_of(facts: Facts) -> list[Named]:
    """Those of the adapters in the record, each once; if there is none, that of adapter_config.json."""
    config = facts.config or {}
    own = {"peft_type": config.get("peft_type"), "variant": "dora" if config.get("use_dora") else None}
    adapters = [one for one in adapters_of(facts.record) if one] or [own]
    return list(dict.fromkeys(method_of(one.get("peft_type"), one.get("variant")) for one in adapters))
