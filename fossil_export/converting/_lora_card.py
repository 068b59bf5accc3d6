"""What a converted LoRA's folder says of itself; `push` puts the whole model card in its place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fossil_export.adapters import Adapter
from fossil_export.cards._frontmatter import BEGIN, END
from fossil_export.cards._methods import method_of
from fossil_export.version import __version__


def card(adapter: Adapter, base: str | None, rank: int, details: Mapping[str, Any]) -> str:
    """The README.md of a LoRA of this rank that was made of `adapter`."""
    base = base or "the base model"
    method = method_of(adapter.peft_type, adapter.variant)
    if "relative_error_by_module" in details:
        how = f"the nearest LoRA of rank {rank} (relative error of the update: {details['relative_error']:.2g})"
    elif not details["exact"]:
        how = f"the {method.name} adapter as a LoRA, with scales rounded ({details['relative_error']:.1g} of a matrix)"
    else:
        how = f"exactly the {method.name} adapter, as a LoRA of the same rank {rank}"
    tags = "\n".join(f"- {tag}" for tag in dict.fromkeys(("lora", method.tags[0])))
    article = "an" if method.name[0] in "AEIO" else "a"
    return f"""---
library_name: peft
tags:
{tags}
---

{BEGIN}
# LoRA form of {article} {method.name} adapter

For {base}; {how}. Made by fossil-export {__version__} from a {adapter.peft_type} adapter
({adapter.variant}, r = {adapter.rank}).

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "this-folder")
```
{END}
"""
