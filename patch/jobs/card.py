"""The model card that is written beside a packed model: what was done, the numbers, the command."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CARD = "README.md"
_WHERE = {"model": "the model", "block": "every block", "layer": "every layer"}


def card_text(facts: Mapping[str, Any], numbers: Mapping[str, Mapping[str, Any]], warnings: Sequence[str]) -> str:
    """Markdown with the front matter that the Hugging Face hub reads.

    facts     model, folder, command, text (patch.data.split.Texts), settings (OneShotSettings), machine, versions
    numbers   of the stages dense, prune, reconstruct, pack (patch.jobs.oneshot)
    warnings  about the result, which stand first
    """
    model, text, settings = facts["model"], facts["text"], facts["settings"]
    packed, dense = numbers["pack"], numbers["dense"]["perplexity"]
    samples, seqlen = text.calibration.shape
    windows = len(text.heldout)
    covered, errors = numbers["prune"]["coverage"], numbers["reconstruct"]
    what = "blocks" if settings.reconstruct == "blocks" else "layers"
    front = ["library_name: transformers", "pipeline_tag: text-generation", "tags: [patch, sparse, pruned]"]
    if not Path(model).exists():
        front.insert(0, f"base_model: {model}")
    rows = [
        ("dense", dense, "1.000"),
        (f"pruned ({settings.method})", numbers["prune"]["perplexity"], _share(packed)),
        (f"reconstructed ({settings.reconstruct})", numbers["reconstruct"]["perplexity"], _share(packed)),
        (f"packed, {packed['dtype']}: this folder", packed["perplexity"], _share(packed)),
    ]
    rows_of_tile, columns = settings.tile
    lines = [
        "---",
        *front,
        "---",
        f"# {Path(model).name}, {covered['sparsity']:.1%} of the weights in its linear layers zero",
        "",
        *(f"**{warning}**\n" for warning in warnings),
        f"Made from `{model}` by `patch-llm oneshot`. Weights are in tiles of {rows_of_tile}x{columns}: those that",
        f"{_WHERE[settings.budget]} can best do without (by {settings.tiles_by}) are 2:4 sparse, the others dense.",
        "What is kept was then changed to make up for what is not.",
        *_reordered(numbers.get("reorder", {})),
        "",
        "| | held-out perplexity | of dense | bytes of these layers |",
        "|---|---|---|---|",
        *(f"| {label} | {value:.4f} | {value / dense:.3f} | {share} |" for label, value, share in rows),
        "",
        f"- Calibration: {samples} samples of {seqlen} tokens ({samples * seqlen:,} tokens) of a text with SHA-256",
        f"  `{text.text_sha256}`.",
        f"- Measured on {windows} windows of {seqlen} tokens: {text.where}.",
        f"- The layers hold {covered['share']:.1%} of the decoder's weights: {packed['dense_bytes']:,} bytes as dense",
        f"  16-bit weights, {packed['bytes']:,} here. Embeddings and head are dense.",
        f"- Mean relative error of the {what}' outputs on the calibration text: {errors['error_before']:.5f}, "
        f"{errors['error_after']:.5f} after reconstruction.",
        *_speed(packed, facts["machine"]),
        "- This folder was opened again before it got its name: its logits are those of the model that was packed.",
        "",
        "Plain transformers refuses the folder; with the package `patch-llm`:",
        "```python",
        "import patch",
        "",
        f'model = patch.load("{facts["folder"]}")',
        "```",
        "",
        "The command",
        "```",
        facts["command"],
        "```",
        f"was run on {datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d} (UTC) on {facts['machine']} with "
        + ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
        + ".",
    ]
    return "\n".join(lines) + "\n"


def _reordered(orders: Mapping[str, Any]) -> list[str]:
    if not orders.get("layers"):
        return []
    stream = " and the residual stream" if orders["residual"] else ""
    return [
        f"Before, the channels that {orders['layers']} layers read{stream} were reordered, which changes no result."
    ]


def _share(packed: Mapping[str, Any]) -> str:
    return f"{packed['bytes'] / packed['dense_bytes']:.3f}"


def _speed(packed: Mapping[str, Any], machine: str) -> list[str]:
    if packed["dense_ms"] is None:
        return []
    took = f"{packed['dense_ms']:.2f} ms dense, {packed['packed_ms']:.2f} ms packed"
    return [f"- A new token, batch 1, {packed['dtype']}: {took} (a few tokens only, on {machine})."]
