"""Decoding a mixture of experts on a CPU: packed hybrid weights against transformers' own experts.

python -m benchmarks.studies.mixture_decode --csv benchmarks/results/mixture_decode_cpu.csv

Models have the layer shapes of published mixtures, few layers, a small vocabulary and random bf16 weights; every token
is drawn at random, so that each step goes to other experts. Of every masked matrix a random share 2*sparsity of the
128x128 tiles is 2:4. The dense model has the same zeros and runs with each of transformers' implementations of experts;
the packed one must give its logits before anything is timed. Steps of all are interleaved.

  decode   a token of each sequence after a prompt of 16
  prompt   a prompt of so many tokens, without a cache
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch import nn

from benchmarks import harness
from patch.models.structure import maskable_linears
from patch.packed.convert import pack_model

COMMON = {
    "vocab_size": 1024,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# {name: (configuration of transformers, its sizes, layers of which dense and packed fit 24 GB together)}
MODELS: dict[str, tuple[str, dict[str, Any], int]] = {
    "Qwen3-30B-A3B": (
        "Qwen3MoeConfig",
        {
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
        },
        2,
    ),
    "Mixtral-8x7B": (
        "MixtralConfig",
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        },
        1,
    ),
}
# transformers' names. batched_mm copies the experts of every token and is hopeless for more than one.
RIVALS = ("eager", "grouped_mm", "batched_mm")
CONTEXT = 16
# Largest distance of logits from those expected, relative to their norm: bf16 kernels differ by 0.01, wrong ones by 1.
LOGITS_BOUND = 0.05


def dense_model(name: str, layers: int | None) -> Any:
    """A model with random bf16 weights."""
    kind, sizes, usual = MODELS[name]
    config = getattr(transformers, kind)(**COMMON, **sizes, num_hidden_layers=layers or usual)
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # else the weights are made in float32 first
    try:
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    finally:
        torch.set_default_dtype(default)


@torch.no_grad()
def packed_copy(dense: Any, sparsity: float) -> Any:
    """The model packed; the dense one gets the same zeros."""
    generator = torch.Generator().manual_seed(1)
    pattern = torch.tensor([True, True, False, False])
    packed = copy.deepcopy(dense)
    masks = {}
    for name, linear in maskable_linears(packed).items():
        rows, cols = linear.weight.shape
        sparse = torch.rand(-(-rows // 128), -(-cols // 128), generator=generator) < 2 * sparsity
        tiles = sparse.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :cols]
        masks[name] = pattern.repeat(cols // 4).expand(rows, cols) | ~tiles
        linear.weight.masked_fill_(~masks[name], 0)
    dense.load_state_dict(packed.state_dict())
    pack_model(packed, masks)
    return packed


def tokens(batch: int, count: int, seed: int) -> torch.Tensor:
    return torch.randint(3, COMMON["vocab_size"], (batch, count), generator=torch.Generator().manual_seed(seed))


def decoder(model: Any, batch: int) -> Callable[[], object]:
    """A function that decodes one more token of each sequence, the same ones for every model."""
    past = model(tokens(batch, CONTEXT, 0), use_cache=True).past_key_values
    seeds = iter(range(1, 1 << 30))
    return lambda: model(tokens(batch, 1, next(seeds)), past_key_values=past, use_cache=True)


def with_experts(model: Any, implementation: str, call: Callable[[], object]) -> Callable[[], object]:
    """The call with one of transformers' implementations of experts."""

    def run() -> object:
        model.config._experts_implementation = implementation
        return call()

    return run


def check(dense: Any, packed: Any) -> None:
    """Refuse a packed model whose logits are not those of the dense one with the same zeros."""
    ids = tokens(2, CONTEXT, 0)
    dense.config._experts_implementation = "grouped_mm"
    expected, got = (model(ids, use_cache=False).logits.float() for model in (dense, packed))
    if (error := float((got - expected).norm() / expected.norm())) > LOGITS_BOUND:
        raise SystemExit(
            f"expected the logits of the dense model with the same zeros, got others (distance {error:.3f})"
        )


def measured(
    dense: Any, packed: Any, batches: list[int], prompts: list[int], rounds: int
) -> Iterator[tuple[str, int, int, dict[str, float]]]:
    """(measure, batch, tokens of a call, {method: median seconds})."""
    cells = [("decode", batch, 1) for batch in batches] + [("prompt", 1, prompt) for prompt in prompts]
    for measure, batch, count in cells:
        calls: dict[str, Callable[[], object]] = {}
        for name in RIVALS:
            if name == "batched_mm" and batch * count > 1:
                continue
            dense.config._experts_implementation = "grouped_mm"
            calls[f"dense, {name}"] = with_experts(dense, name, _call(dense, measure, batch, count))
        calls["packed"] = _call(packed, measure, batch, count)
        times = harness.interleaved_times(calls, rounds)
        yield measure, batch, count, {name: statistics.median(found) for name, found in times.items()}


def _call(model: Any, measure: str, batch: int, count: int) -> Callable[[], object]:
    if measure == "decode":
        return decoder(model, batch)
    ids = tokens(batch, count, 0)
    return lambda: model(ids, use_cache=False)


def weight_bytes(model: nn.Module) -> int:
    """Of the decoder: parameters and buffers."""
    layers = model.get_submodule("model.layers")
    return sum(tensor.nbytes for tensor in (*layers.parameters(), *layers.buffers()))


def main(argv: list[str] | None = None) -> None:
    parser = harness.parser(__doc__ or "", repeats=False)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--layers", type=int, help="instead of what fits 24 GB")
    parser.add_argument("--sparsity", type=float, default=0.45)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--prompts", type=int, nargs="*", default=[512])
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args(argv)
    ranges = [("layers", 1, math.inf), ("sparsity", 0, 0.5), ("rounds", 2, math.inf), ("batches", 1, math.inf)]
    harness.in_range(arguments, parser, [*ranges, ("prompts", 1, COMMON["max_position_embeddings"])])
    rows = []
    for name in arguments.models:
        dense = dense_model(name, arguments.layers)
        begin = time.perf_counter()
        packed = packed_copy(dense, arguments.sparsity)
        layers, seconds = dense.config.num_hidden_layers, time.perf_counter() - begin
        held = {"dense": weight_bytes(dense), "packed": weight_bytes(packed)}
        share = f"{held['packed'] / 1e9:.2f} of {held['dense'] / 1e9:.2f} GB, {held['packed'] / held['dense']:.2f}x"
        print(f"{name}: {layers} layers, packed in {seconds:.0f} s, weights {share}", flush=True)
        with torch.inference_mode():
            check(dense, packed)
            for measure, batch, count, medians in measured(
                dense, packed, arguments.batches, arguments.prompts, arguments.rounds
            ):
                best = min(seconds for method, seconds in medians.items() if method != "packed")
                said = ", ".join(f"{method} {1e3 * seconds:.2f} ms" for method, seconds in medians.items())
                print(
                    f"  {measure}, batch {batch}, {count} tokens: {said}; {best / medians['packed']:.2f}x", flush=True
                )
                for method, seconds in medians.items():
                    is_packed = method == "packed"
                    rows.append(
                        {
                            "model": name,
                            "layers": layers,
                            "measure": measure,
                            "batch": batch,
                            "tokens": count,
                            "method": method,
                            "sparsity": arguments.sparsity if is_packed else 0.0,
                            "median_ms": f"{1e3 * seconds:.3f}",
                            "tokens_per_s": f"{batch * count / seconds:.1f}",
                            "weight_bytes": held["packed" if is_packed else "dense"],
                            "over_best_dense": f"{best / seconds:.2f}",
                        }
                    )
        del dense, packed
    if arguments.csv:
        harness.save_csv(arguments.csv, rows)


if __name__ == "__main__":
    main()
