"""The page of docs about large models, from the functions that `patch-llm oneshot --dry-run` uses."""

from __future__ import annotations

from functools import cache

import torch
from transformers import LlamaConfig

from patch.evaluate.tables import format_table
from patch.files.progress import duration
from patch.pruning.costs import CPU_BOX, GB, H100, RTX_4090, Costs, Placement, Rates, oneshot_costs, table
from patch.pruning.counts import Counts, counted
from patch.pruning.one_shot_settings import OneShotSettings, default_nsamples
from support import ROOT

DOCUMENT = ROOT / "docs" / "inside" / "scale.md"
SEQLEN, WINDOWS = 2048, 64
SIZES = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 8192}
LLAMA_8B = SIZES | {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256}
LLAMA_7B = SIZES | {"intermediate_size": 11008, "num_key_value_heads": 32, "vocab_size": 32000}
INTRODUCTION = """\
# One-shot pruning of large models, on paper

Written by `python tools/scale_table.py`. **A model, not a measurement**: nothing of this size was run. Operations are
counted by walking the model on tensors without contents (`patch/pruning/counts.py`), the rest is in
`patch/pruning/costs.py`; `patch-llm oneshot` says its plan, and `--dry-run` its table, by the same functions.

What is done: `patch-llm oneshot --sparsity 0.45` with its defaults, {samples} samples of {seqlen} tokens ({tokens:,}
tokens), {windows} held-out windows, bf16.
"""
FORMULAS = """\
## Formulas
n samples of S tokens, T = n S; F operations of a forward pass of the blocks on a sample, F' of what is around them
(counted, attention's full square included); a masked layer is (N, K); s is the share of zeros; E passes of the fit.

| step | operations | bytes beside the model |
|---|---|---|
| perplexity | W (F + F') for W windows | logits twice, once in float32 |
| order of the channels | 2 n F, 2 T K^2, K^3 a layer, 12,800 K min(N, 4096) bytes; n at most 128 | as the sweep |
| provisional patterns | 2 n F | 20 N K |
| Fisher information | m (4 F + 2 F'), 30 bytes a weight and sample | gradients of a block; host: states of 8 samples |
| sweep | 2 n F, 2 T K^2 a tensor that layers read, 4/3 K^3 + N K^2 a layer | 4 K^2 a tensor in a block, 20 N K |
| least squares | 2 n F, 2 T K^2, K^3 + 2 N K^2 a layer, (K/2)^3 / 3 in 2 s N rows | as the sweep |
| block fit | 2 n F + 3 E n F | 24 bytes a weight of a block, activations of a step of 2 samples, states four times |
| pack | W (F + F'), ten readings of all weights | host: the masked weights; then the packed model a second time |

m is at most 64. States are the hidden states of all n samples, on the device where blocks are worked on: once in every
pass but the block fit, twice with least squares before it. The Fisher pass has those of 8 samples between all blocks in
host memory.

With `--offload` a block goes to the card and back in every pass over the blocks, and for every sample in whole forward
passes.

## Assumed rates
Reached, not peak; steps one after the other, nothing overlapping.

{rates}

The largest doubt is `solve`, batched Cholesky factorizations of some thousand rows: least squares solves a system for
every row of every layer, which grows with K^3. `--reconstruct sparsegpt` needs no such system.
"""


@cache
def _counts(*sizes: tuple[str, int]) -> Counts:
    return counted(LlamaConfig(**dict(sizes)), seqlen=SEQLEN, dtype=torch.bfloat16)


def costs_of(sizes: dict[str, int], placement: Placement, **settings: object) -> Costs:
    """Of `patch-llm oneshot` with its defaults for a Llama of these sizes."""
    sizes_of_run = {"nsamples": default_nsamples(SEQLEN), "windows": WINDOWS}
    counts = _counts(*sizes.items())
    return oneshot_costs(counts, OneShotSettings(**settings), **sizes_of_run, placement=placement)


def document() -> str:
    """The page."""
    samples = default_nsamples(SEQLEN)
    parts = [INTRODUCTION.format(samples=samples, seqlen=SEQLEN, tokens=samples * SEQLEN, windows=WINDOWS)]
    for name, sizes, placement, rates in (
        ("Llama-3.1-8B", LLAMA_8B, "gpu", H100),
        ("Llama-3.1-8B", LLAMA_8B, "cpu", CPU_BOX),
        ("Llama-2-7B with `--offload`", LLAMA_7B, "offload", RTX_4090),
    ):
        parts.append(_section(name, costs_of(sizes, placement), rates))
    rates = format_table([_rates(rates) for rates in (H100, RTX_4090, CPU_BOX)], markdown=True)
    parts.append(FORMULAS.format(rates=rates))
    return "\n".join(parts)


def _section(name: str, costs: Costs, rates: Rates) -> str:
    device, host = costs.peaks
    memory = (
        f"{host / GB:.1f} GB" if costs.placement == "cpu" else f"{device / GB:.1f} GB on the card, {host / GB:.1f} GB"
    )
    text = f"{duration(costs.seconds(rates))} in all, peak memory {memory} of host memory."
    return f"## {name} on {rates.name}\n{text}\n\n{format_table(table(costs, rates), markdown=True)}\n"


def _rates(rates: Rates) -> dict[str, str]:
    tera = {name: getattr(rates, name) / 1e12 for name in ("model", "fit", "fp32", "solve")}
    row = {"machine": rates.name} | {f"{name}, TFLOP/s": f"{value:g}" for name, value in tera.items()}
    link = "-" if rates is CPU_BOX else f"{rates.link / GB:g}"
    return row | {"memory, GB/s": f"{rates.memory / GB:g}", "link, GB/s": link}
