"""`patch.oneshot`: what becomes of a model, what is measured, what is refused before any work."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch

import patch
from patch.data.split import calibration_and_heldout
from patch.evaluate.cross_entropy import perplexity
from patch.mask import tile_counts
from patch.models.keep_masks import keep_masks
from patch.models.packed_size import packed_bytes
from patch.models.structure import maskable_linears
from patch.pruning import one_shot, permutation
from patch.pruning.one_shot import verdict
from patch.pruning.one_shot_settings import OneShotSettings, default_nsamples, hybrid_methods

TILE = (64, 64)
QUICK = {"tile": TILE, "progress": False}


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    """A short search of the order of channels."""
    monkeypatch.setattr(one_shot, "DEFAULT_STEPS", 3)


@pytest.fixture
def windows():
    return torch.randint(0, 250, (6, 32), generator=torch.Generator().manual_seed(0))


def ppl(model, windows):
    return perplexity(model, windows.reshape(-1), windows.shape[1])


def test_a_model_is_made_hybrid_in_place_and_measured(tiny_model, windows):
    model, dense = tiny_model("llama"), tiny_model("llama")
    result = patch.oneshot(model, calibration=windows[:4], heldout=windows[4:], sparsity=0.4, **QUICK)
    assert result.masks.keys() == maskable_linears(model).keys()
    for name, keep in result.masks.items():
        weight = model.get_submodule(name).weight
        assert not weight[~keep].any() and torch.equal(keep_masks(model)[name], keep)
        counts = tile_counts(keep, TILE)
        assert torch.equal(counts, torch.where(result.tile_is_sparse[name], 64 * 32, 64 * 64))
    # A tile of 60 holds 0.83 % of the zeros.
    assert 0.4 <= result.sparsity < 0.4 + 0.5 / 60
    assert result.dense == ppl(dense, windows[4:]) and result.reconstructed == ppl(model, windows[4:])
    assert result.pruned not in (result.dense, result.reconstructed)
    assert (result.packed_bytes, result.dense_bytes) == packed_bytes(result.masks)
    assert len(result.compensation.layer_errors) > 7 and len(result.compensation.block_errors) == 2
    assert all(after < before for before, after in result.compensation.layer_errors.values())


def test_it_is_pruning_and_compensating_the_dense_weights(tiny_model, windows):
    model, other = tiny_model("llama"), tiny_model("llama")
    result = patch.oneshot(model, calibration=windows, reorder=True, **QUICK)
    assert (result.dense, result.pruned, result.reconstructed) == (None, None, None)
    settings = OneShotSettings(tile=TILE)
    orders = one_shot.reordered(other, windows, progress=False)
    assert torch.equal(orders.hidden, result.orders.hidden) and orders.inner.keys() == result.orders.inner.keys()
    masks = one_shot.prune_hybrid(copy.deepcopy(other), windows, settings, progress=False).masks
    one_shot.reconstruct(other, masks, windows, settings, progress=False)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name)), name


def test_channels_keep_their_order_unless_asked(tiny_model, windows):
    model, other = tiny_model("llama"), tiny_model("llama")
    cheap = QUICK | {"reconstruct": "least_squares"}
    result = patch.oneshot(model, calibration=windows, **cheap)
    assert result.orders is None
    assert torch.equal(model.get_input_embeddings().weight, other.get_input_embeddings().weight)
    settings = OneShotSettings(tile=TILE)
    masks = one_shot.prune_hybrid(other, windows, settings, progress=False).masks
    assert all(torch.equal(keep, masks[name]) for name, keep in result.masks.items())


def test_a_model_without_movable_channels_keeps_their_order(tiny_model, windows, monkeypatch, capsys):
    monkeypatch.setattr(permutation, "_folds", lambda *_: {})
    options = {"tile": TILE, "reconstruct": "least_squares", "reorder": True}
    result = patch.oneshot(tiny_model("llama"), calibration=windows, **options)
    assert result.orders is None
    said = "channels of LlamaForCausalLM stay in their order: none is known that can be moved"
    assert capsys.readouterr().err.splitlines().count(said) == 1


def test_a_text_is_cut_in_two(tiny_model, tokenizer, text_file, capsys):
    model, other = tiny_model("llama"), tiny_model("llama")
    sizes = {"nsamples": 3, "seqlen": 32, "seed": 5}
    given = {"calibration": text_file, "heldout_windows": 2, "reconstruct": "least_squares"}
    result = patch.oneshot(model, tokenizer, **given, **sizes, **QUICK)
    assert capsys.readouterr() == ("", "")
    texts = calibration_and_heldout(tokenizer, text_file, max_windows=2, **sizes)
    assert len(texts.heldout) == 2
    assert result.dense == ppl(other, texts.heldout)
    patch.oneshot(other, calibration=texts.calibration, reconstruct="least_squares", **QUICK)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("seqlen", "message"),
    [
        (129, "seqlen: expected 2 to 128 tokens (max_position_embeddings), got 129. Choose a shorter one."),
        (1, "seqlen: expected an integer >= 2, got 1"),
        ("long", "seqlen: expected an integer >= 2, got 'long'"),
    ],
)
def test_a_length_is_refused_before_the_text_is_read(tiny_model, tokenizer, seqlen, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        patch.oneshot(tiny_model("llama"), tokenizer, calibration="absent.txt", seqlen=seqlen)


def test_tokens_to_measure_on_are_others(tiny_model, windows):
    with pytest.raises(ValueError, match="heldout: expected other windows than calibration, got 2 of the same"):
        patch.oneshot(tiny_model("llama"), calibration=windows, heldout=windows[1:3].clone(), **QUICK)


def test_a_result_that_packs_to_more_is_said():
    said = one_shot.verdict(10.0, 10.5, 260, 11.0, packed_bytes=200, dense_bytes=100)
    assert said == [
        "WARNING: packed, the layers are LARGER than dense (200 of 100 bytes): tiles of 128x128 at the edges of its "
        "layers hold padding"
    ]
    assert one_shot.verdict(10.0, 10.5, 260, 11.0, packed_bytes=60, dense_bytes=100) == []


def test_excluded_layers_stay_as_they_are(tiny_model, windows):
    model, dense = tiny_model("llama"), tiny_model("llama")
    result = patch.oneshot(model, calibration=windows, exclude=["*.k_proj"], reconstruct="least_squares", **QUICK)
    assert len(result.masks) == 12
    name = "model.layers.1.self_attn.k_proj.weight"
    assert torch.equal(model.get_parameter(name), dense.get_parameter(name))


def test_progress_says_what_is_wrong_with_a_result(tiny_model, windows, monkeypatch, capsys):
    values = iter([10.0, 12.0, 300.0])
    monkeypatch.setattr(one_shot, "heldout_perplexity", lambda *_, **__: next(values))
    patch.oneshot(tiny_model("llama"), calibration=windows, heldout=windows + 1, tile=TILE, reconstruct="least_squares")
    err = capsys.readouterr().err
    assert "WARNING: the perplexity of the result, 300, is worse than a uniform guess over 260 tokens" in err
    assert "WARNING: reconstruction made it WORSE (12.0000 before, 300.0000 after); give it more text" in err


def test_verdicts():
    assert verdict(10.0, 11.0, 260) == verdict(10.0, 15.0, 260, 15.0) == []
    (line,) = verdict(10.0, 15.1, 260)
    assert line == (
        "WARNING: the result's perplexity is 1.51 times the dense model's. Use a smaller sparsity, more calibration "
        "text, or text like the one the model is for"
    )
    assert verdict(10.0, math.inf, None)[0].startswith("WARNING: the result's perplexity is inf times")
    assert "worse than a uniform guess over 260 tokens" in verdict(10.0, 261.0, 260)[0]


def test_samples_make_up_the_tokens():
    assert [default_nsamples(seqlen) for seqlen in (64, 256, 1024, 2048, 4096)] == [2048, 512, 128, 128, 128]


def test_methods_are_those_that_leave_tiles_dense():
    assert hybrid_methods() == ["magnitude", "wanda", "sparsegpt", "thanos"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"sparsity": 45}, ValueError, "sparsity: expected a share of zeros from 0 to 0.5, got 45"),
        ({"method": "prox_sparse"}, ValueError, "method: expected one of magnitude, wanda, sparsegpt, thanos, got"),
        ({"sparsitty": 0.4}, ValueError, "expected known keys, got 'sparsitty'. Did you mean 'sparsity'?"),
        (
            {"epochs": 2, "reconstruct": "sparsegpt"},
            ValueError,
            "epochs: expected none with reconstruct sparsegpt",
        ),
        (
            {"calibration": "text.txt", "heldout": None},
            TypeError,
            "tokenizer: expected the model's tokenizer for texts, got None",
        ),
        (
            {"calibration": "text.txt", "heldout": None, "tokenizer": "models/llama"},
            TypeError,
            "tokenizer: expected the model's tokenizer for texts, got str. Pass it, or token ids.",
        ),
        (
            {"calibration": [1, 2]},
            TypeError,
            "calibration: expected a tensor of token ids, or a text: a file or the name of a set, got list",
        ),
        ({"heldout": 5}, TypeError, "heldout: expected a tensor of token ids, or a text: a file or the name of a set"),
        ({"nsamples": 4}, ValueError, "nsamples: expected none beside token ids, got 4. Cut the tokens instead."),
        ({"seqlen": 16}, ValueError, "seqlen: expected none beside token ids, got 16. Cut the tokens instead."),
        ({"heldout": torch.ones(3, 1, dtype=torch.int64)}, ValueError, "heldout: expected samples of 2 to 128 tokens"),
        ({"heldout_windows": 0}, ValueError, "heldout_windows: expected an integer >= 1, got 0"),
        ({"heldout": "text.txt"}, TypeError, "heldout: expected token ids beside token ids, or a text beside a text"),
        ({"calibration": torch.full((2, 8), 999)}, ValueError, "calibration: expected token ids from 0 below the"),
        ({"heldout": torch.full((2, 8), 999)}, ValueError, "heldout: expected token ids from 0 below the vocabulary"),
        ({"exclude": ["*.nothing"]}, ValueError, "matches none"),
        ({"device": "abacus"}, ValueError, "device: expected a torch device"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(tiny_model, windows, monkeypatch, arguments, error, message):
    monkeypatch.setattr(one_shot, "heldout_perplexity", lambda *_, **__: pytest.fail("work before the checks"))
    with pytest.raises(error, match=message):
        patch.oneshot(tiny_model("llama"), **{"calibration": windows, "heldout": windows + 1} | arguments)


def test_a_damaged_model_is_refused_before_any_work(tiny_model, windows, monkeypatch):
    monkeypatch.setattr(one_shot, "heldout_perplexity", lambda *_, **__: pytest.fail("work before the checks"))
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(ValueError, match=r"model: expected finite weights, 1 \(model\.norm\.weight\) of 21 tensors"):
        patch.oneshot(model, calibration=windows, heldout=windows + 1)
