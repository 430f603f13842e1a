"""Which models fit which GPU memory while their masks are learned: the estimates of `patch-llm learn --dry-run`.

python -m benchmarks.studies.memory_table --csv benchmarks/results/learn_memory.csv

One block of 4096 tokens per forward pass, bf16 weights, gradient checkpointing on; the other settings are the presets'.
Nothing is loaded or downloaded.
"""

from __future__ import annotations

import torch
from transformers import LlamaConfig, PretrainedConfig, Qwen2Config

from benchmarks import harness, shapes
from patch.learn.config import LearnConfig
from patch.learn.memory import CARDS_GB, GB, learning_memory

SEQLEN = 4096
# Configuration class and what is not in shapes.CONFIGS.
MODELS = {
    "Qwen2.5-0.5B": (Qwen2Config, {"tie_word_embeddings": True}),
    "Llama-3.2-1B": (LlamaConfig, {"tie_word_embeddings": True, "head_dim": 64}),
    "Llama-2-7B": (LlamaConfig, {}),
    "Llama-3.1-8B": (LlamaConfig, {}),
    "Llama-2-13B": (LlamaConfig, {}),
}
# (preset, settings that differ from it)
RUNS = (
    ("joint", {}),
    ("joint", {"moments": "bfloat16"}),
    ("joint", {"logits_dtype": "bfloat16", "moments": "bfloat16"}),
    ("joint", {"logits_dtype": "bfloat16", "moments": "int8"}),
    ("tile", {}),
    ("maskllm", {}),
    ("maskllm", {"logits_dtype": "bfloat16", "moments": "int8"}),
)


def model_config(name: str, layers: int | None = None) -> PretrainedConfig:
    """Configuration of a published model, as far as its sizes go; with fewer decoder layers where `layers` is given."""
    cls, more = MODELS[name]
    sizes = shapes.config_sizes(shapes.CONFIGS[name])
    if layers is not None:
        sizes["num_hidden_layers"] = layers
    return cls(**sizes, max_position_embeddings=SEQLEN, **more)


def row(name: str, mode: str, settings: dict[str, str]) -> dict[str, str]:
    """A line of the table, sizes in GB (10^9 bytes)."""
    sparsity = None if mode == "maskllm" else 0.45
    config = LearnConfig.from_preset(mode, sparsity, grad_checkpoint=True, **settings)
    found = learning_memory(model_config(name), config, seqlen=SEQLEN, dtype=torch.bfloat16)
    result = {"model": name, "mode": mode, "settings": " ".join(f"{k}={v}" for k, v in settings.items())}
    result |= {f"{kind.replace(' ', '_')}_GB": f"{size / GB:.2f}" for kind, size in found.by_kind.items()}
    result |= {"peak_GB": f"{found.peak / GB:.2f}", "peak_phase": found.peak_phase}
    return result | {f"fits_{size}_GB": "yes" if found.peak <= size * GB else "no" for size in CARDS_GB}


def main(arguments: list[str] | None = None) -> None:
    parser = harness.parser(__doc__, repeats=False)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME")
    options = parser.parse_args(arguments)
    rows = [row(name, mode, settings) for mode, settings in RUNS for name in options.models]
    harness.show(rows, options.csv)


if __name__ == "__main__":
    main()
