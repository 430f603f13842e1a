"""Model families: a tiny model of each, taken through every step, and the table of docs that says how far each gets."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

import patch
from patch.evaluate.cross_entropy import perplexity
from patch.learn import learn
from patch.learn.config import LearnConfig
from patch.models.keep_masks import measured_sparsity
from patch.models.structure import maskable_linears
from patch.packed.convert import pack_model, unpack_model
from patch.packed.save import save_dense, save_packed
from patch.packed.swap import cast_model, packed_layers
from patch.pruning import prune_model
from patch.pruning.compensation import compensate
from support import ROOT

DOCUMENT = ROOT / "docs" / "reference" / "families.md"
STEPS = ("prune", "learn", "compensate", "pack", "load", "generate", "eval")
WORKS = "works"
VOCABULARY = 64
# Longer than every sliding window below.
WINDOW = 24
SLIDING = {"sliding_window": 8}


@dataclass(frozen=True)
class Family:
    """A row of the table: a name, a configuration of transformers, and its settings beyond SIZES."""

    name: str
    config: str
    settings: dict[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    auto: str = "AutoModelForCausalLM"


SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
FAMILIES = {
    family.name: family
    for family in (
        Family("Llama", "LlamaConfig"),
        Family("Mistral", "MistralConfig", SLIDING),
        Family("Qwen2", "Qwen2Config"),
        Family("Qwen3", "Qwen3Config"),
        Family("Gemma2", "Gemma2Config", SLIDING),
        Family("Gemma3", "Gemma3TextConfig", SLIDING | {"layer_types": ["sliding_attention", "full_attention"]}),
        Family("Phi-3", "Phi3Config"),
        Family("OPT", "OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
        Family("GPT-2", "GPT2Config", GPT),
        Family("GPT-J", "GPTJConfig", GPT | {"rotary_dim": 4}),
        Family("GPT-NeoX, Pythia", "GPTNeoXConfig"),
        Family("Falcon", "FalconConfig", {"new_decoder_architecture": True, "num_kv_heads": 2}, ("head_dim",)),
        Family("Bloom", "BloomConfig", {"n_layer": 2, "n_head": 4}),
        Family("MPT", "MptConfig", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}),
        Family("StarCoder2", "Starcoder2Config"),
        Family("StableLM", "StableLmConfig"),
        Family("Granite", "GraniteConfig"),
        Family("Cohere", "CohereConfig"),
        Family("OLMo2", "Olmo2Config"),
        Family("SmolLM3", "SmolLM3Config"),
        Family("GLM-4", "Glm4Config"),
        Family("Mixtral", "MixtralConfig", EXPERTS | SLIDING),
        Family("OLMoE", "OlmoeConfig", {"num_experts": 4, "num_experts_per_tok": 2}),
        Family(
            "Qwen3-MoE", "Qwen3MoeConfig", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        ),
        Family("Phi-3.5-MoE", "PhimoeConfig", EXPERTS),
        Family("GPT-OSS", "GptOssConfig", EXPERTS | SLIDING),
        Family(
            "DeepSeek-V3",
            "DeepseekV3Config",
            {
                "n_routed_experts": 4,
                "moe_intermediate_size": 16,
                "num_experts_per_tok": 2,
                "n_group": 2,
                "topk_group": 1,
                "kv_lora_rank": 8,
                "q_lora_rank": 16,
                "qk_rope_head_dim": 8,
                "qk_nope_head_dim": 8,
                "v_head_dim": 8,
                "first_k_dense_replace": 1,
                "num_key_value_heads": 4,
            },
        ),
        Family("Mamba", "MambaConfig", {"state_size": 8, "time_step_rank": 4}),
        Family(
            "Mamba2", "Mamba2Config", {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8}
        ),
        Family(
            "RecurrentGemma",
            "RecurrentGemmaConfig",
            {"lru_width": 32, "attention_window_size": 8, "block_types": ("recurrent", "attention")},
        ),
        Family(
            "Jamba",
            "JambaConfig",
            {
                "attn_layer_period": 2,
                "attn_layer_offset": 1,
                "expert_layer_period": 2,
                "expert_layer_offset": 1,
                "num_experts": 4,
                "mamba_d_state": 8,
                "mamba_dt_rank": 4,
            },
        ),
    )
}


class Model:
    """A family's model on its way: dense, then pruned, packed, loaded; what a refused step leaves out stays dense."""

    def __init__(self, family: Family, folder: Path):
        self.dense = build(family)
        self.folder = folder
        generator = torch.Generator().manual_seed(1)
        self.tokens = torch.randint(3, VOCABULARY, (4, WINDOW), generator=generator)
        self.masks: dict[str, Tensor] = {}
        self.newest = copy.deepcopy(self.dense)

    def prune(self) -> None:
        model = copy.deepcopy(self.dense)
        masks = prune_model(model, "wanda", calibration=self.tokens, progress=False)
        zeros = 0
        for name, layer in maskable_linears(model).items():
            groups = layer.weight.reshape(-1, 4).count_nonzero(1)
            assert (groups == 2).all(), name
            zeros += layer.weight.numel() - int(groups.sum())
        assert measured_sparsity(masks) == zeros / sum(keep.numel() for keep in masks.values()) == 0.5
        assert not near(self.logits(model), self.logits(self.dense)), "pruning changed nothing"
        self.masks, self.newest = masks, model

    def learn(self) -> None:
        model, during = copy.deepcopy(self.dense), AtTheEnd(self)
        config = LearnConfig.from_preset("joint", 0.4, tile=(8, 8), global_batch_size=2, lr=0.1, seed=1)
        prior = self.masks or None
        result = learn(model, self.tokens, config, prior_masks=prior, progress=False, callbacks=[during])
        # The model that ends with masks is the one whose masks were trained: no layer went past its mask.
        assert near(self.logits(model), during.logits)
        layers = maskable_linears(model)
        zeros = sum(layer.weight.numel() - int(layer.weight.count_nonzero()) for layer in layers.values())
        counted = zeros / sum(layer.weight.numel() for layer in layers.values())
        assert abs(1 - counted - result.hard_density) < 1e-9
        self.masks, self.newest = result.masks, model

    def compensate(self) -> None:
        model = copy.deepcopy(self.dense)
        result = compensate(model, self.masks, calibration=self.tokens, progress=False)
        for name, layer in maskable_linears(model).items():
            assert not layer.weight[~self.masks[name]].any(), name
            before, after = result.layer_errors.get(name, (0.0, 0.0))
            assert after <= before, name
        self.newest = model

    def pack(self) -> None:
        masked = copy.deepcopy(self.newest)
        packed = pack_model(copy.deepcopy(self.newest), dtype=torch.bfloat16)
        cast_model(masked, torch.bfloat16)
        unpacked = unpack_model(copy.deepcopy(packed))
        for name, layer in maskable_linears(masked).items():
            assert torch.equal(unpacked.get_submodule(name).weight, layer.weight), name
        assert {name for name, _ in packed_layers(packed)} == set(self.masks)
        assert near(self.logits(packed), self.logits(masked), 0.02)
        self.newest = packed

    def load(self) -> None:
        save = save_packed if any(packed_layers(self.newest)) else save_dense
        save(self.newest, None, self.folder / "model")
        loaded = patch.load(self.folder / "model", dtype="auto")
        assert type(loaded) is type(self.newest)
        assert torch.equal(self.logits(loaded), self.logits(self.newest))
        self.newest = loaded

    def generate(self) -> None:
        prompt = self.tokens[:1]
        output = self.newest.generate(prompt, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        assert output.shape == (1, WINDOW + 3)
        assert torch.equal(output[:, :WINDOW], prompt)

    def eval(self) -> None:
        assert 1 < perplexity(self.newest, self.tokens.reshape(-1), WINDOW) < 10 * VOCABULARY

    @torch.no_grad()
    def logits(self, model: nn.Module) -> Tensor:
        return model.eval()(self.tokens, use_cache=False).logits.float()


class AtTheEnd(TrainerCallback):
    """Logits of the model with trained masks in it."""

    def __init__(self, owner: Model):
        self.owner = owner

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.logits = self.owner.logits(kwargs["model"])


def near(a: Tensor, b: Tensor, share: float = 1e-4) -> bool:
    """Whether logits differ by less than a share of their spread; by the median, as rounding may change a route."""
    return bool((a - b).abs().median() < share * b.std())


def build(family: Family) -> Any:
    """The family's tiny model with random weights."""
    import transformers

    settings = {key: value for key, value in SIZES.items() if key not in family.without} | family.settings
    config = getattr(transformers, family.config)(**settings)
    torch.manual_seed(0)
    return getattr(transformers, family.auto).from_config(config, dtype=torch.float32).eval()


def outcomes(family: Family, folder: Path) -> dict[str, str]:
    """What each step says: WORKS, or the sentence of its refusal. Any other failure is raised."""
    model = Model(family, folder)
    return {step: outcome(getattr(model, step)) for step in STEPS}


def outcome(step: Callable[[], None]) -> str:
    try:
        step()
    except (ValueError, TypeError) as error:
        *_, last = traceback.extract_tb(error.__traceback__)
        if not Path(last.filename).is_relative_to(ROOT / "patch"):
            raise
        return str(error)
    return WORKS
