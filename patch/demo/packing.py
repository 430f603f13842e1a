"""The end of the demo: the reconstructed hybrid packed, saved, read again, timed, and at work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from patch.artifacts.apply import apply_artifact
from patch.artifacts.artifact import load_artifact
from patch.demo.methods import Bench
from patch.demo.report import of_dense
from patch.evaluate.decode import decode_milliseconds
from patch.evaluate.tables import format_table
from patch.packed.convert import pack_model
from patch.packed.load import load
from patch.packed.save import save_dense, save_packed
from patch.packed.swap import packed_layers

PACKED, PRUNED = "packed", "pruned"
PROMPT = "def __init__(self"


def pack_and_generate(
    bench: Bench, tokenizer: Any, name: str, rows: tuple[dict[str, Any], dict[str, Any]], echo: Callable[[str], None]
) -> None:
    """Pack the artifact of a stage, save it, read it again, compare, time both models and generate.

    name    stage with masks and reconstructed weights
    rows    of the table: the dense model's, the stage's
    raises  RuntimeError when the saved model has other logits than the one in memory
    """
    model: Any = bench.dense_model()
    apply_artifact(model, load_artifact(bench.out / name))
    pack_model(model, dtype=torch.bfloat16)
    save_packed(model, tokenizer, bench.out / PACKED)
    save_dense(model, tokenizer, bench.out / PRUNED)
    loaded: Any = load(bench.out / PACKED).eval()
    window = bench.heldout[: bench.settings.model.block_size][None]
    with torch.inference_mode():
        expected, got = model(input_ids=window).logits, loaded(input_ids=window).logits
    if not torch.equal(expected, got):
        differ = f"they differ by up to {(expected - got).abs().max().item()}. Please report this"
        raise RuntimeError(f"expected the logits of the saved model, {differ} with `patch-llm info --json`.")
    held = sum(layer.payload.numel() for _, layer in packed_layers(loaded))
    dense_row, row = rows
    bench.say(f"packed {row['method']}, reconstructed ({held:,} bytes of weights), saved, reloaded: logits equal")
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    tokens, dense_bytes = bench.settings.new_tokens, dense_row["dense_linear_bytes"]
    models = {
        "dense": (bench.dense_model(torch.bfloat16), dense_row["perplexity"], dense_bytes),
        f"{row['method']}, reconstructed, packed": (loaded, row["reconstructed"], held),
    }
    timed = [
        {
            "model": label,
            "perplexity": f"{perplexity:.2f}",
            "linear bytes": f"{size:,}",
            "of dense": of_dense(size, dense_bytes),
            "tokens/s": f"{1000 / decode_milliseconds(measured, ids[0], tokens):.0f}",
        }
        for label, (measured, perplexity, size) in models.items()
    ]
    echo("\n" + format_table(timed) + "\n")
    what = f"bf16, one sequence, the median of {tokens} new tokens"
    echo(f"Perplexity: as above, in fp32. Tokens/s: {what}.")
    with torch.inference_mode():
        output = loaded.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
    echo(f"\nThe packed model continues {PROMPT!r}:\n{tokenizer.decode(output[0])}\n")
