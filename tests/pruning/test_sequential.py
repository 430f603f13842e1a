"""Statistics of a block: checked and counted once for layers that read the same tensors, apart for all others."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from support.models import build_tiny_model
from torch import nn

from patch.models.keep_masks import keep_masks
from patch.pruning import compensate, hessian, prune_model, selection, sequential, wanda


class Block(nn.Module):
    """Two layers that may read the same tensor, in several ways; some by the sample, which channel 0 numbers."""

    def __init__(self, style):
        super().__init__()
        self.one, self.two, self.style = nn.Linear(8, 8), nn.Linear(8, 8), style
        self.register_buffer("others", torch.arange(8) > 0)

    def forward(self, h):
        return h + self.added(torch.tanh(h), int(h[0, 0, 0].nan_to_num())) * self.others

    def added(self, x, sample):
        if self.style == "equal values":
            return self.one(x) + self.two(x.clone())
        if self.style == "written into":
            return self.one(x) + self.two(x.add_(1))
        if self.style == "view":
            return self.one(x) + self.two(x.view(x.shape))
        if self.style == "twice":
            return self.one(x) + self.one(x) + self.two(x)
        if self.style == "another later":  # the same tensor for the first samples only
            return self.one(x) + self.two(x if sample < 2 else x * 2)
        if self.style == "left out later":
            return self.one(x) + (0 if sample == 2 else self.two(x))
        if self.style == "left out at the end":
            return self.one(x) + (0 if sample == 3 else self.two(x))
        if self.style == "joins later":
            return self.two(x) + (0 if sample < 2 else self.one(x))
        if self.style == "order" and sample % 2:
            return self.two(x) + self.one(x)
        return self.one(x) + self.two(x)


class Decoder(nn.Module):
    def __init__(self, style, blocks=2):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, 8)
        self.embed.weight.data[:, 0] = torch.arange(50)
        self.blocks = nn.ModuleList([Block(style) for _ in range(blocks)])

    def forward(self, ids, use_cache=None):
        h = self.embed(ids)
        for block in self.blocks:
            h = block(h)
        return h


STYLES = ["same", "equal values", "written into", "view", "twice", "another later", "left out later"]
STYLES += ["left out at the end", "joins later", "order"]
IDS = torch.randint(0, 50, (4, 12), generator=torch.Generator().manual_seed(1))
IDS[:, 0] = torch.arange(4)


def pruned(style, monkeypatch, *, is_shared):
    """(state, masks, number of tensors that were summed) of a model pruned with or without shared statistics."""
    sums, model = [], Decoder(style)
    init, add = sequential._Gathering.__init__, hessian.Statistics.add
    with monkeypatch.context() as patched:
        patched.setattr(hessian.Statistics, "add", lambda self, x: sums.append(1) or add(self, x))
        if not is_shared:
            apart = lambda self, new, *, is_shared: init(self, new, is_shared=False)  # noqa: E731
            patched.setattr(sequential._Gathering, "__init__", apart)
        masks = prune_model(model, "sparsegpt", calibration=IDS, progress=False)
    return model.state_dict(), masks, len(sums)


@pytest.mark.parametrize("style", STYLES)
def test_shared_statistics_are_those_of_each_layer_alone(style, monkeypatch):
    shared, alone = (pruned(style, monkeypatch, is_shared=is_shared) for is_shared in (True, False))
    assert all(torch.equal(value, alone[0][key]) for key, value in shared[0].items())
    assert all(torch.equal(keep, alone[1][name]) for name, keep in shared[1].items())
    if style in ("same", "order"):
        assert (shared[2], alone[2]) == (2 * 4, 2 * 2 * 4)
    if style in ("equal values", "written into", "view", "joins later"):
        assert shared[2] == alone[2]


def test_q_k_v_and_gate_up_share_what_they_read(monkeypatch):
    """Per block and sample: four different tensors for seven layers, each checked and summed once."""
    made, checked, added = [], [], []
    init, add = wanda.Statistics.__init__, wanda.Statistics.add
    monkeypatch.setattr(wanda.Statistics, "__init__", lambda self, *a, **k: made.append(1) or init(self, *a, **k))
    monkeypatch.setattr(wanda.Statistics, "add", lambda self, x: added.append(1) or add(self, x))
    monkeypatch.setattr(sequential, "check_inputs", lambda *a: checked.append(1) or selection.check_inputs(*a))
    model = build_tiny_model("llama", hidden_size=32, intermediate_size=48)
    prune_model(model, "wanda", calibration=torch.zeros(3, 8, dtype=torch.int64), progress=False)
    assert len(made) == 4 * 2 + 1  # one is asked on the meta device whether it is a Hessian
    assert len(checked) == len(added) == 4 * 2 * 3


def test_inference_mode_is_gathered_apart():
    ids = torch.randint(0, 256, (2, 8), generator=torch.Generator().manual_seed(1))
    plain, inferred = build_tiny_model("llama"), build_tiny_model("llama")
    masks = prune_model(plain, "wanda", calibration=ids, progress=False)
    with torch.inference_mode():
        again = prune_model(inferred, "wanda", calibration=ids, progress=False)
    assert all(torch.equal(keep, again[name]) for name, keep in masks.items())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_inputs_that_are_not_finite_are_still_refused(value):
    model = Decoder("same")
    block = model.blocks[0]
    scale = torch.ones(8)
    scale[3] = value
    block.forward = lambda h: h + (block.one(h * scale) + block.two(h)) * 0
    message = r"'blocks.0.one', calibration inputs: expected finite values, got 12 that are NaN or infinite"
    with pytest.raises(ValueError, match=message):
        prune_model(model, "wanda", calibration=IDS[:, :12], exclude=["blocks.1.*"], progress=False)


class Routed(nn.Module):
    """A mixture with a list of experts; a token goes to the expert of its number, those without tokens get none."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])

    def forward(self, h, expert):
        out = torch.zeros_like(h)
        for index, layer in enumerate(self.experts):
            chosen = expert == index
            out[chosen] = layer(h[chosen])
        return h + out


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, 8)
        self.blocks = nn.ModuleList([Routed() for _ in range(2)])

    def forward(self, ids, use_cache=None):
        h = self.embed(ids)
        for block in self.blocks:
            h = block(h, ids % 4)
        return h


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_experts_without_tokens_are_all_named_before_anything_changes(method):
    model = Mixture()
    before = copy.deepcopy(model.state_dict())
    ids = torch.tensor([[0, 4, 8], [2, 0, 4]])  # experts 0 and 2
    missing = "blocks.0.experts.1,blocks.0.experts.3,blocks.1.experts.1,blocks.1.experts.3"
    with pytest.raises(ValueError, match=rf"inputs in every layer to prune, got none in 4: {missing}\. Give more"):
        prune_model(model, method, calibration=ids, progress=False)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert keep_masks(model) == {}
    masks = {name: torch.ones(8, 8, dtype=torch.bool) for name in map("blocks.{}.experts.{}".format, *_all_experts())}
    masks["blocks.0.experts.1"][0, 0] = masks["blocks.1.experts.0"][0, 0] = False
    with pytest.raises(ValueError, match=r"got none in 1: blocks\.0\.experts\.1\. Give more"):
        compensate(model, masks, calibration=ids, progress=False)
    prune_model(model, method, calibration=ids, exclude=missing.split(","), progress=False)
    prune_model(Mixture(), method, calibration=torch.tensor([[0, 4, 8], [2, 1, 3]]), progress=False)


def _all_experts():
    return [0] * 4 + [1] * 4, [0, 1, 2, 3] * 2


def test_an_expert_that_only_the_last_sample_reaches_is_enough():
    ids = torch.tensor([[0, 1, 2], [0, 1, 2], [0, 1, 3]])
    masks = prune_model(Mixture(), "wanda", calibration=ids, progress=False)
    assert len(masks) == 8


def test_too_few_tokens_are_said_before_and_for_experts_after(caplog):
    with caplog.at_level(logging.WARNING):
        prune_model(Decoder("same"), "wanda", calibration=IDS[:1, :4], progress=False)
        prune_model(Decoder("same"), "sparsegpt", calibration=IDS[:1, :8], progress=False)
    assert caplog.text == ""
    with caplog.at_level(logging.WARNING):
        prune_model(Decoder("same"), "sparsegpt", calibration=IDS[:1, :7], progress=False)
    assert "4 of 4 layers have more inputs than calibration has tokens for them" in caplog.text
    assert "'blocks.0.one' 8 for 7 tokens" in caplog.text and "(--nsamples, --seqlen)" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        ids = torch.tensor([[0, 1, 2, 3] + [0] * 6, [0, 1, 2, 3] + [3] * 6])
        prune_model(Mixture(), "thanos", calibration=ids, progress=False)
    assert "4 of 8 layers have more inputs" in caplog.text and "'blocks.0.experts.1' 8 for 2 tokens" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        model = Decoder("same")
        keep = {f"blocks.{i}.{name}": torch.rand(8, 8) < 0.5 for i in range(2) for name in ("one", "two")}
        compensate(model, keep, calibration=IDS[:1, :7], progress=False)
    assert "4 of 4 layers have more inputs" in caplog.text


def test_the_plan_is_said_before_the_work(capsys):
    model = build_tiny_model("llama")
    ids = torch.zeros(4, 16, dtype=torch.int64)
    prune_model(model, "wanda", calibration=ids)
    prune_model(build_tiny_model("llama"), "magnitude", pattern="unstructured", sparsity=0.25)
    compensate(build_tiny_model("llama"), keep_masks(model), calibration=ids)
    prune_model(build_tiny_model("llama"), "wanda", calibration=ids, progress=False)
    out, err = capsys.readouterr()
    assert out == ""
    text = "4 samples of 16 tokens (64 tokens); peak memory about 0.5 GB"
    assert err.splitlines() == [
        f"pruning 14 layers in 2 blocks with wanda, 2:4: {text}",
        "pruning 14 layers with magnitude, unstructured 0.25; peak memory about 0.5 GB",
        f"compensating 14 layers in 2 blocks with blocks: {text}",
    ]
