"""A model whose blocks visit a device one at a time: where each tensor is, during a run and after it."""

from __future__ import annotations

import pytest
import torch

from patch.models.modes import streamed
from patch.models.structure import decoder_blocks

IDS = torch.arange(12)[None]


@pytest.mark.parametrize("arch", ["llama", "gemma3", "opt"])
def test_logits_are_those_of_the_model(tiny_model, arch):
    model = tiny_model(arch)
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        with streamed(model, "cpu"):
            assert torch.equal(model(input_ids=IDS).logits, expected)
        assert torch.equal(model(input_ids=IDS).logits, expected)


def test_one_block_at_a_time_is_fetched_and_put_back(tiny_model, monkeypatch):
    model = tiny_model("llama")
    moves = []
    monkeypatch.setattr("patch.models.modes._fetch", lambda block, device: moves.append((block, str(device))))
    first, second = decoder_blocks(model)[1]
    with streamed(model, "cpu:0"), torch.no_grad():
        model(input_ids=IDS)
    assert moves == [(first, "cpu:0"), (first, "cpu"), (second, "cpu:0"), (second, "cpu")]


def test_what_is_around_the_blocks_goes_along_and_comes_back(tiny_model, monkeypatch):
    model = tiny_model("llama", tie_word_embeddings=True)
    sent = []
    monkeypatch.setattr("patch.models.modes._send", lambda tensors, device: sent.append((tensors, str(device))))
    with streamed(model, "cpu:0"):
        pass
    (there, to), (back, home) = sent
    assert (to, home) == ("cpu:0", "cpu") and there is back
    names = {id(t): name for name, t in (*model.named_parameters(), *model.named_buffers())}
    assert [names[id(tensor)] for tensor in there] == [
        *("model.embed_tokens.weight", "model.norm.weight"),
        *("model.rotary_emb.inv_freq", "model.rotary_emb.original_inv_freq"),
    ]


def test_an_error_in_a_block_leaves_nothing_behind(tiny_model):
    model = tiny_model("llama")
    block = decoder_blocks(model)[1][1]

    def fail(*_):
        raise RuntimeError("broken")

    handle = block.mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="broken"), streamed(model, "cpu"), torch.no_grad():
        model(input_ids=IDS)
    handle.remove()
    assert not block._forward_pre_hooks and not block._forward_hooks


def test_no_device_changes_nothing(tiny_model):
    model = tiny_model("llama")
    with streamed(model, None):
        assert not any(block._forward_hooks for block in decoder_blocks(model)[1])
