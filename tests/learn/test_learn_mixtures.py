"""Mask learning on mixtures: each matrix of an expert has its own masks, also where no token comes by."""

from __future__ import annotations

import pytest
import torch
from support.families import FAMILIES, build
from transformers import TrainerCallback

from patch.learn import learn
from patch.learn.config import LearnConfig
from patch.learn.masked_linear import MaskedLayers
from patch.models.coverage import coverage
from patch.models.structure import maskable_linears

IDS = torch.randint(3, 60, (8, 24), generator=torch.Generator().manual_seed(0))
IDLE = "model.layers.0.mlp.experts.3"


@pytest.fixture
def model():
    """Expert 3 of the first block gets no token."""
    model = build(FAMILIES["Mixtral"])
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 1
        model.model.layers[0].mlp.gate.weight[3] = torch.eye(32)[0] * -100
    return model


def config_of(mode, **settings):
    sparsity = None if mode == "maskllm" else 0.4
    return LearnConfig.from_preset(mode, sparsity, tile=(8, 8), global_batch_size=2, lr=0.1, seed=1, **settings)


def test_experts_without_tokens_count_in_the_sparsity(model):
    """Their sums are in the regulariser, and its gradient is all that their logits get."""
    layers = MaskedLayers(model, maskable_linears(model), config_of("joint"))
    assert f"{IDLE}.up_proj" in layers.layers and len(layers.layers) == 32
    layers.state.collect = True
    model.requires_grad_(False).train()
    for parameter in layers.parameters().values():
        parameter.requires_grad_()
    loss = model(IDS[:2], labels=IDS[:2], use_cache=False).loss
    sums = layers.take_sums()  # of every layer, or it says which were not called
    assert len(sums) == len(layers.layers)
    loss.backward(retain_graph=True)
    idle, other = (layers.layers[f"{name}.up_proj"].tile_logits for name in (IDLE, IDLE[:-1] + "0"))
    assert not idle.grad.any() and other.grad.any()
    torch.stack([s[0] for s in sums]).sum().backward()
    assert (idle.grad > 0).all()


class Noted(TrainerCallback):
    def on_train_end(self, args, state, control, **kwargs):
        with torch.no_grad():
            self.logits = kwargs["model"].eval()(IDS, use_cache=False).logits


@pytest.mark.parametrize("mode", ["joint", "tile", "maskllm"])
def test_masks_of_experts_are_learned_and_applied(model, mode):
    """The model that trained with masks is the one that has them; the sparsity is that of the weights."""
    during, before = Noted(), {name: layer.weight.clone() for name, layer in maskable_linears(model).items()}
    prior = {name: (torch.arange(w.numel()) % 4 < 2).view_as(w) for name, w in before.items()}
    priors = prior if mode == "tile" else None
    result = learn(model, IDS, config_of(mode), prior_masks=priors, progress=False, callbacks=[during])
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(IDS, use_cache=False).logits, during.logits, rtol=1e-4, atol=1e-5)
    layers = maskable_linears(model)
    assert result.masks.keys() == layers.keys()
    for name, layer in layers.items():
        assert torch.equal(layer.weight, before[name] * result.masks[name]), name
    found = coverage(model, result.masks)
    assert found.share > 0.98
    assert found.sparsity == pytest.approx(1 - result.hard_density, abs=1e-9)


def test_the_budget_is_met_over_all_experts(model):
    result = learn(model, IDS, config_of("joint", exact_budget=True), progress=False)
    assert coverage(model, result.masks).sparsity == pytest.approx(0.4, abs=1e-3)
