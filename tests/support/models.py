"""Tiny random models of every supported family and a byte tokenizer; nothing needs a network."""

from __future__ import annotations

import torch

from patch.models.keep_masks import apply_keep_masks
from patch.models.structure import maskable_linears

VOCAB_SIZE = 260


ARCHITECTURES = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    # One sliding-window block and one global block: their attention masks differ.
    "gemma3": (
        "Gemma3TextConfig",
        {"head_dim": 32, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "opt": ("OPTConfig", {"ffn_dim": 192, "word_embed_proj_dim": 128}),
}


def build_tiny_model(arch: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides):
    """Causal LM of two decoder blocks with random weights; overrides go to its transformers config."""
    import transformers

    name, extra = ARCHITECTURES[arch]
    kwargs = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 258,
    } | extra
    if arch == "opt":
        for key in ("intermediate_size", "num_key_value_heads"):
            kwargs.pop(key)
    config = getattr(transformers, name)(**(kwargs | overrides))
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def build_spread_model(arch: str = "llama", *, scale: float, dtype: torch.dtype = torch.float32, **overrides):
    """A tiny model with normal weights of this deviation in its layers, large enough that a mask matters."""
    model = build_tiny_model(arch, dtype=dtype, **overrides)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for linear in maskable_linears(model).values():
            linear.weight.copy_(torch.randn(linear.weight.shape, generator=generator) * scale)
    return model


def build_tiny_multimodal(arch: str, *, seed: int = 0, dtype: torch.dtype = torch.bfloat16):
    """Wrapper of a tiny text decoder and a tinier vision tower: "gemma3", "qwen2_5_vl" or "llava"."""
    import transformers

    text = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    }
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 8}
    if arch == "gemma3":
        model_class, config = (
            transformers.Gemma3ForConditionalGeneration,
            transformers.Gemma3Config(
                text_config=transformers.Gemma3TextConfig(**text, head_dim=32, sliding_window=16),
                vision_config=transformers.SiglipVisionConfig(**vision),
                mm_tokens_per_image=4,
            ),
        )
    elif arch == "qwen2_5_vl":
        rope = {"mrope_section": [4, 6, 6], "rope_type": "default", "rope_theta": 10000.0}
        vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 128}
        model_class, config = (
            transformers.Qwen2_5_VLForConditionalGeneration,
            transformers.Qwen2_5_VLConfig(text_config=text | {"rope_parameters": rope}, vision_config=vision),
        )
    else:
        model_class, config = (
            transformers.LlavaForConditionalGeneration,
            transformers.LlavaConfig(
                text_config=transformers.LlamaConfig(**text), vision_config=transformers.CLIPVisionConfig(**vision)
            ),
        )
    torch.manual_seed(seed)
    return model_class._from_config(config, dtype=dtype).eval()


def build_byte_tokenizer():
    """Tokenizer with one symbol per byte plus <s> </s> <pad> <unk>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: i for i, symbol in enumerate([*symbols, "<s>", "</s>", "<pad>", "<unk>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def random_keep(shape, share_sparse, generator):
    """Random mask: 2 of 4 in a share of the 128x128 tiles, everything kept in the others."""
    rows, cols = shape
    pairs = torch.rand(rows, cols // 4, 4, generator=generator).argsort(2) < 2
    keep = pairs.reshape(rows, cols)
    for r in range(0, rows, 128):
        for c in range(0, cols, 128):
            if torch.rand(1, generator=generator) >= share_sparse:
                keep[r : r + 128, c : c + 128] = True
    return keep


def mask_model(model, share_sparse=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    linears = maskable_linears(model)
    apply_keep_masks(model, {n: random_keep(m.weight.shape, share_sparse, generator) for n, m in linears.items()})
    return model
