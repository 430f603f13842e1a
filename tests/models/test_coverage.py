"""Coverage: what is said of a model's sparsity counts all of its decoder."""

from __future__ import annotations

import json

import pytest
import torch
from support.commands import run
from support.models import build_byte_tokenizer, build_tiny_model
from transformers import MixtralConfig, MixtralForCausalLM

from patch.artifacts.artifact import load_artifact
from patch.models.coverage import coverage, warn_of_dense_rest
from patch.models.keep_masks import keep_masks
from patch.models.structure import block_weights, maskable_linears
from patch.pruning import prune_model


@pytest.fixture
def mixture():
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    return MixtralForCausalLM(config).eval()


def test_all_layers_of_a_dense_model_are_covered():
    model = build_tiny_model("llama")
    masks = prune_model(model, "magnitude", progress=False)
    found = coverage(model, masks)
    assert (found.share, found.sparsity, found.decoder_sparsity) == (1.0, 0.5, 0.5)
    assert found.left_dense == {} and found.warning() is None
    zeros = sum(int((linear.weight == 0).sum()) for linear in maskable_linears(model).values())
    assert found.pruned_weights == zeros and found.decoder_weights == sum(block_weights(model).values())


def test_experts_left_dense_are_counted_and_named(mixture, caplog):
    masks = prune_model(mixture, "magnitude", exclude=["*.experts.*"], progress=False)
    found = coverage(mixture, masks)
    zeros = sum(int((p == 0).sum()) for name, p in mixture.model.layers.named_parameters() if p.dim() > 1)
    assert found.sparsity == 0.5 and found.decoder_sparsity == zeros / found.decoder_weights < 0.1
    largest = next(iter(found.left_dense))
    assert largest == "model.layers.*.mlp.experts.*.gate_proj.weight"
    assert (
        f"only {found.share:.1%} of the decoder's weights are in masked layers, left dense: {largest} (" in caplog.text
    )


def test_excluded_layers_are_counted_and_named(caplog):
    model = build_tiny_model("llama")
    masks = prune_model(model, "magnitude", exclude=["*.down_proj", "*.up_proj"], progress=False)
    found = coverage(model, masks)
    assert set(found.left_dense) == {"model.layers.*.mlp.down_proj.weight", "model.layers.*.mlp.up_proj.weight"}
    assert "down_proj" in caplog.text and found.decoder_sparsity == 0.5 * found.share
    caplog.clear()
    warn_of_dense_rest(model, maskable_linears(model, ["*.k_proj"]))
    assert caplog.text == ""  # less than a tenth


def test_the_command_says_and_saves_it(tmp_path, capsys, mixture):
    mixture.save_pretrained(tmp_path / "m")
    build_byte_tokenizer().save_pretrained(tmp_path / "m")
    flags = ["--model", tmp_path / "m", "--method", "magnitude", "--out", tmp_path / "a"]
    status, out, _ = run(capsys, "prune", *flags)
    assert status == 0
    meta = load_artifact(tmp_path / "a").meta["coverage"]
    assert f"sparsity 0.5000 in the masked layers, {meta['decoder_sparsity']:.4f} over the whole decoder" in out
    (tmp_path / "t.txt").write_text("words and more words " * 60)
    flags = ["--model", tmp_path / "m", "--masks", tmp_path / "a", "--data", tmp_path / "t.txt", "--window", "32"]
    status, out, _ = run(capsys, "eval", *flags, "--max-windows", 4, "--json", tmp_path / "r.json")
    assert status == 0 and f"{meta['decoder_sparsity']:.4f} over the whole decoder" in out
    entry = json.loads((tmp_path / "r.json").read_text())["models"][1]
    assert entry["coverage"]["decoder_sparsity"] == meta["decoder_sparsity"]
    status, out, _ = run(capsys, "report", tmp_path / "r.json", "--out", tmp_path / "report")
    table = (tmp_path / "report" / "report.md").read_text()
    assert status == 0 and f"{meta['decoder_sparsity']:.1%}" in table and f"{meta['share']:.1%}" in table
    assert keep_masks(mixture) == {}
