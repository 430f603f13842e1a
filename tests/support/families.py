"""Model families: a tiny model of each, taken through every step, and the table of docs that says how far each gets."""

from __future__ import annotations

import copy
import re
import traceback
from collections.abc import Callable, Sequence
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
from patch.models.structure import block_weights, maskable_linears
from patch.packed.convert import pack_model, unpack_model
from patch.packed.experts import PackedExperts
from patch.packed.save import save_dense, save_packed
from patch.packed.swap import cast_model, packed_layers, packed_zeros
from patch.pruning import prune_model
from patch.pruning.compensation import compensate
from patch_kernels import TiledLinear
from support import ROOT

DOCUMENT = ROOT / "docs" / "reference" / "families.md"
STEPS = ("prune", "learn", "compensate", "pack", "load", "generate", "eval")
WORKS = "works"
VOCABULARY = 64
# Longer than every sliding window below.
WINDOW = 24
SLIDING = {"sliding_window": 8}
INTRODUCTION = f"""\
# Model families

Written by `python tools/families_table.py`. A test takes a tiny model of every family (2 blocks, random weights, fp32)
through all steps, and compares what happens with this table. Layers are found by structure, so other families work too
if their blocks are built like these.

- *masked*: share of the weights of the decoder's blocks that get masks; embeddings, the output head and norms are not
  counted. *Stays dense*: what else the blocks hold. Experts count whatever form they are kept in. Routers stay dense,
  and so do layers whose weight the model reads itself, past the layer (Mamba's `dt_proj`); there is
  no flag to mask them. Masks of an earlier version that hold them still apply.
- *prune*: Wanda 2:4 from calibration windows; the zeros in the weights are those that are reported.
- *learn*: joint, two steps; the model that trained with its masks is the model that has them applied.
- *compensate*: no layer's output error grows in the update, no block's in its training, nothing comes back at a
  pruned place.
- *pack*: every packed weight is the masked one bit for bit, and the logits agree.
- *load*: the packed folder (the dense one, where packing is refused) opens with the same logits bit for bit.
- *generate*: three tokens behind a prompt of {WINDOW}, longer than the sliding windows of {SLIDING["sliding_window"]};
  they are the likeliest of a pass without a cache.
- *eval*: perplexity on {4 * WINDOW} tokens.

"works" is what was checked, with text as the only input; images are not part of it. The Python API gives these answers,
the commands call it. Kernels for state spaces (`mamba-ssm`, `causal-conv1d`) are not installed in the test: with them
training may go past a layer, and learning then stops and names it.
"""
REFUSED = """\
## Refused
"""


@dataclass(frozen=True)
class Family:
    """A row of the table: a name, a configuration of transformers, and its settings beyond SIZES."""

    name: str
    config: str
    settings: dict[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    auto: str = "AutoModelForCausalLM"
    nested: bool = False


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
IMAGES = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
MULTIMODAL = {"auto": "AutoModelForImageTextToText", "nested": True}
LAYERS = {"layer_types": ["sliding_attention", "full_attention"]}
FAMILIES = {
    family.name: family
    for family in (
        Family("Llama", "LlamaConfig"),
        Family("Mistral", "MistralConfig", SLIDING),
        Family("Qwen2", "Qwen2Config"),
        Family("Qwen3", "Qwen3Config"),
        Family("Gemma2", "Gemma2Config", SLIDING),
        Family("Gemma3 (text)", "Gemma3TextConfig", SLIDING | LAYERS),
        Family(
            "Gemma3 (images)",
            "Gemma3Config",
            {
                "text_config": SLIDING | LAYERS,
                "vision_config": IMAGES,
                "mm_tokens_per_image": 4,
                "boi_token_index": 60,
                "eoi_token_index": 61,
                "image_token_index": 62,
            },
            **MULTIMODAL,
        ),
        Family(
            "Llava",
            "LlavaConfig",
            {
                "text_config": {"model_type": "llama"},
                "vision_config": IMAGES | {"model_type": "clip_vision_model", "projection_dim": 16},
                "image_token_index": 62,
            },
            **MULTIMODAL,
        ),
        Family(
            "Qwen2.5-VL",
            "Qwen2_5_VLConfig",
            {
                "text_config": {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
                "vision_config": {
                    "depth": 1,
                    "hidden_size": 16,
                    "intermediate_size": 16,
                    "num_heads": 2,
                    "out_hidden_size": 32,
                    "patch_size": 8,
                    "spatial_merge_size": 1,
                    "fullatt_block_indexes": [0],
                    "window_size": 16,
                },
                "image_token_id": 60,
                "video_token_id": 61,
                "vision_start_token_id": 62,
                "vision_end_token_id": 63,
            },
            **MULTIMODAL,
        ),
        Family(
            "Gemma4 (text)",
            "Gemma4TextConfig",
            SLIDING
            | {
                "num_hidden_layers": 4,
                "num_kv_shared_layers": 2,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
                "global_head_dim": 8,
                "vocab_size_per_layer_input": VOCABULARY,
                "hidden_size_per_layer_input": 8,
            },
        ),
        Family("ModernBERT (decoder)", "ModernBertDecoderConfig", {"layer_types": ["sliding_attention"] * 2}),
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
        Family(
            "Qwen2-MoE",
            "Qwen2MoeConfig",
            {
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 16,
                "shared_expert_intermediate_size": 16,
                "mlp_only_layers": [0],
            },
        ),
        Family("Granite-MoE", "GraniteMoeConfig", EXPERTS),
        Family(
            "Llama 4 (text)",
            "Llama4TextConfig",
            {
                "num_local_experts": 4,
                "num_experts_per_tok": 1,
                "intermediate_size_mlp": 48,
                "interleave_moe_layer_step": 2,
            },
        ),
        Family("Aria (text)", "AriaTextConfig", {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1}),
        Family(
            "Nemotron-H",
            "NemotronHConfig",
            {
                "layers_block_type": ["attention", "moe"],
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
                "n_group": 1,
                "topk_group": 1,
                "moe_intermediate_size": 16,
                "moe_shared_expert_intermediate_size": 16,
                "mamba_num_heads": 8,
                "mamba_head_dim": 8,
                "n_groups": 1,
                "ssm_state_size": 8,
            },
        ),
        Family("JetMoE", "JetMoeConfig", EXPERTS | {"kv_channels": 8}),
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
        Family(
            "Zamba2",
            "Zamba2Config",
            {
                "layers_block_type": ["mamba", "hybrid"],
                "mamba_d_state": 8,
                "n_mamba_heads": 8,
                "mamba_headdim": 8,
                "mamba_ngroups": 1,
                "num_mem_blocks": 1,
                "chunk_size": 8,
                "adapter_rank": 4,
            },
        ),
        Family("LFM2", "Lfm2Config", {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
        Family(
            "Qwen3-Next",
            "Qwen3NextConfig",
            {
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 16,
                "shared_expert_intermediate_size": 16,
                "linear_num_key_heads": 2,
                "linear_num_value_heads": 4,
                "linear_key_head_dim": 8,
                "linear_value_head_dim": 8,
                "layer_types": ["linear_attention", "full_attention"],
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
        # Neither special tokens nor those that stand for images.
        self.tokens = torch.randint(3, VOCABULARY - 4, (4, WINDOW), generator=generator)
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
        assert all(after <= before for before, after in result.block_errors.values())
        self.newest = model

    def pack(self) -> None:
        masked = copy.deepcopy(self.newest)
        packed = pack_model(copy.deepcopy(self.newest), dtype=torch.bfloat16)
        cast_model(masked, torch.bfloat16)
        unpacked = maskable_linears(unpack_model(copy.deepcopy(packed)))
        for name, layer in maskable_linears(masked).items():
            assert torch.equal(unpacked[name].weight, layer.weight), name
        mixtures = [f"{name}." for name, module in packed.named_modules() if isinstance(module, PackedExperts)]
        alone = {name for name in self.masks if not name.startswith(tuple(mixtures))}
        assert {name for name, layer in packed_layers(packed) if isinstance(layer, TiledLinear)} == alone
        # What the tensors of the packed model hold is what the masks say.
        zeros = sum(zeros for zeros, _ in packed_zeros(packed).values())
        pruned = sum(keep.numel() - int(keep.sum()) for keep in self.masks.values())
        assert pruned <= zeros <= 1.001 * pruned
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
        # Step by step from a cache, the tokens are those that a pass over everything finds likeliest, but for rounding.
        logits = self.logits(self.newest, output[:, :-1])[:, WINDOW - 1 :]
        spread = logits.std()
        logits[:, :, SIZES["eos_token_id"]] = -torch.inf  # min_new_tokens forbids it
        chosen = logits.gather(2, output[:, WINDOW:, None])[:, :, 0]
        assert (logits.amax(2) - chosen < 0.1 * spread).all()

    def eval(self) -> None:
        assert 1 < perplexity(self.newest, self.tokens.reshape(-1), WINDOW) < 10 * VOCABULARY

    @torch.no_grad()
    def logits(self, model: nn.Module, tokens: Tensor | None = None) -> Tensor:
        return model.eval()(self.tokens if tokens is None else tokens, use_cache=False).logits.float()


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

    sizes = {key: value for key, value in SIZES.items() if key not in family.without}
    settings = sizes | family.settings
    if family.nested:
        settings = family.settings | {"text_config": sizes | family.settings["text_config"]}
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


def lines(family: Family, result: dict[str, str]) -> list[str]:
    """The family's row of the table, and a row for every reason of a refusal."""
    cells = ["works" if text == WORKS else "refused" for text in result.values()]
    reasons: dict[str, list[str]] = {}
    for step, text in result.items():
        if text != WORKS:
            reasons.setdefault(text, []).append(step)
    rows = [f"| {family.name} | {', '.join(steps)} | {text} |" for text, steps in reasons.items()]
    return [f"| {family.name} | {coverage(family)} | {' | '.join(cells)} |", *rows]


def coverage(family: Family) -> str:
    """Share of the weights of the decoder's blocks that get masks, and what stays dense."""
    model = build(family)
    try:
        masked = {f"{name}.weight" for name in maskable_linears(model)}  # opens mixtures: their weights get other names
    except ValueError:
        masked = set()
    weights = block_weights(model)
    dense = sorted({re.sub(r".*\.\d+\.", "", name) for name in weights.keys() - masked})
    share = sum(weights[name] for name in masked) / sum(weights.values())
    names = ", ".join(f"`{name.removesuffix('.weight')}`" for name in dense) if masked else "everything"
    return f"{100 * share:.0f} % | {names}"


def document(rows: Sequence[Sequence[str]]) -> str:
    """The page of docs: one row a family, below them the reasons."""
    table = [f"| family | masked | stays dense | {' | '.join(STEPS)} |", "|---" * (3 + len(STEPS)) + "|"]
    reasons = ["| family | step | reason |", "|---|---|---|"] + [reason for _, *more in rows for reason in more]
    return "\n".join([INTRODUCTION, *table, *(row for row, *_ in rows), "", REFUSED, *reasons]) + "\n"
