"""LoRA of the peft package on packed layers: trained, saved and loaded beside a packed weight that stays as it is.

    from peft import LoraConfig, get_peft_model
    config = for_packed(LoraConfig(target_modules=["q_proj", "v_proj"]))
    model = get_peft_model(patch.load("packed"), config)
    ...
    model.save_pretrained("adapter")
    config = for_packed(LoraConfig.from_pretrained("adapter"))
    model = PeftModel.from_pretrained(patch.load("packed"), "adapter", config=config)

peft knows its layers by their classes; a configuration may name more, but does not save them.
"""

from __future__ import annotations

import warnings
from typing import Any, NoReturn

from peft import LoraConfig
from peft.tuners.lora.layer import Linear

from patch_kernels import TiledLinear

_INITS = (True, False, "gaussian")


def for_packed(config: LoraConfig) -> LoraConfig:
    """Let a LoRA configuration apply to TiledLinear layers as well; returns it.

    Give it to get_peft_model, to PeftModel.from_pretrained(..., config=), or to a model's add_adapter.
    raises  (when it is applied) ValueError for kinds of LoRA that read the weight below, such as DoRA or PiSSA.
    """
    config._register_custom_module({TiledLinear: PackedLora})
    return config


class PackedLora(Linear):
    """A TiledLinear with the adapters of peft beside it: y = layer(x) + scaling * B(A(dropout(x)))."""

    def __init__(self, base_layer: TiledLinear, adapter_name: str, config: LoraConfig, **kwargs: Any):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Unsupported layer type")  # which this class is for
            super().__init__(base_layer, adapter_name, config, **kwargs)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        reads = config.init_lora_weights not in _INITS or self.resolve_lora_variant(config=config) is not None
        if reads:
            got = f"init_lora_weights={config.init_lora_weights!r} or a variant such as DoRA, which read the weight"
            raise ValueError(
                f"LoRA on a packed layer: expected plain LoRA, got {got}. Leave them out, or unpack_model."
            )
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        got = "got a packed one, whose pruned places hold no value"
        advice = "Keep the adapter beside it, or load the adapter on a dense copy (unpack_model), merge and prune again"
        raise ValueError(f"merging LoRA: expected a dense layer, {got}. {advice}.")
