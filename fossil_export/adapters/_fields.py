"""Fields of adapter_config.json that other trainers than PEFT write.

| field | writer |
|---|---|
| `merge_weights`, `enable_lora` | PEFT up to 0.3, and the forks of it in LLM-Adapters, SBoRA, NEAT and LoRAPrune |
| `swift_type`, `model_key_mapping`, `use_qa_lora`, `use_merged_linear` | `SwiftConfig` and `LoRAConfig` of ms-swift (swift/tuners/utils.py, swift/tuners/lora.py) |
| `lora_dtype`, `lorap_lr_ratio`, `lorap_emb_lr` | the same |
| `adapter_name` | `SboraConfig` in SBoRA (peft/src/peft/tuners/sbora.py); the tensors say it too |
| `num_A`, `num_B` | `ColaConfig` in CoLA (peft/tuners/cola/config.py) |
| `num_experts`, `top_k`, `init_type`, `init_cof` | `GOATConfig` in GOAT (goat/peta/src/goat/config.py) |

unsloth adds `unsloth_fixed` within `auto_mapping`, which only says who wrote it. TRL, axolotl and LLaMA-Factory write what
PEFT writes.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Mapping

from fossil_export.methods._method import Field, unset

_EXPERTS = unset("a module has several experts in the place of one LoRA; merge it with the code that trained it")

OTHERS: Mapping[str, Field] = {
    "merge_weights": Field(),
    "enable_lora": unset("it trains parts of a fused weight, by a convolution; merge it with the PEFT that trained it"),
    "swift_type": Field(
        "LORA", lambda value: value in (None, "LORA"), why="which is another method of ms-swift; merge it with ms-swift"
    ),
    "model_key_mapping": Field(),
    "use_qa_lora": unset("its inputs are pooled; merge it with ms-swift"),
    "use_merged_linear": unset("it trains parts of a fused weight; merge it with ms-swift"),
    "lora_dtype": Field(),
    "lorap_lr_ratio": Field(),
    "lorap_emb_lr": Field(),
    "adapter_name": Field("sbora_fa or sbora_fb", lambda value: value in (None, "sbora_fa", "sbora_fb")),
    "num_A": _EXPERTS,
    "num_B": _EXPERTS,
    "num_experts": _EXPERTS,
    "top_k": _EXPERTS,
    "init_type": _EXPERTS,
    "init_cof": _EXPERTS,
}
