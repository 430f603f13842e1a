"""Fixtures shared by all tests: tiny random models of every supported family, a byte tokenizer, a text file.

Nothing here needs a network: models are built from configs, the tokenizer from the 256 byte symbols.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

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


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)  # the models are tiny: more threads only wait for each other


@pytest.fixture
def tiny_model():
    return build_tiny_model


@pytest.fixture(scope="session")
def tokenizer():
    return build_byte_tokenizer()


@pytest.fixture
def text_file(tmp_path):
    """About 60 kB of text with structure, one paragraph a line."""
    lines = [
        f"Paragraph {i}: the {'quick' if i % 3 else 'slow'} fox number {i * i} jumps over {i % 7} lazy dogs."
        for i in range(800)
    ]
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path
