"""Routers, layers that their model reads itself and layers that are linear by name only are left dense."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from patch.artifacts.apply import apply_artifact
from patch.artifacts.artifact import load_artifact, save_artifact
from patch.models.facts import fingerprints
from patch.models.keep_masks import apply_keep_masks, keep_masks
from patch.models.stay_dense import directly_read_linears, router_linears
from patch.models.structure import block_linears, maskable_linears


class Fused(nn.Module):
    """Experts as one tensor, beside a convolution whose first size is no number of experts."""

    def __init__(self, experts):
        super().__init__()
        self.up = nn.Parameter(torch.randn(experts, 8, 8))
        self.scale = nn.Parameter(torch.randn(experts))


class Router(nn.Module):
    def __init__(self, experts):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.layer = nn.Linear(8, experts)


class Mixture(nn.Module):
    def __init__(self, router, experts):
        super().__init__()
        self.gate = router
        self.experts = experts
        self.shared = nn.Linear(8, 8)
        self.attention = nn.ModuleDict({"k_proj": nn.Linear(8, 4), "o_proj": nn.Linear(4, 8)})
        self.conv = nn.Conv1d(8, 8, 2, groups=8)


def listed(experts):
    return nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(experts)])


class Decoder(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.layers = nn.ModuleList(blocks)


MIXTURES = {
    "list": (lambda: Mixture(nn.Linear(8, 4), listed(4)), {"gate"}),
    "fused": (lambda: Mixture(nn.Linear(8, 4), Fused(4)), {"gate"}),
    "router module": (lambda: Mixture(Router(4), Fused(4)), {"gate.layer"}),
    "no router": (lambda: Mixture(nn.Linear(8, 2), Fused(4)), set()),
    "one expert": (lambda: Mixture(nn.Linear(8, 1), listed(1)), set()),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_routers_are_found_by_structure(name):
    make, routers = MIXTURES[name]
    assert router_linears(make()) == routers
    linears = maskable_linears(Decoder(make()))
    assert not {f"layers.0.{router}" for router in routers} & linears.keys()
    assert {"layers.0.shared", "layers.0.attention.k_proj", "layers.0.attention.o_proj"} <= linears.keys()
    assert len(block_linears(Decoder(make()))) == len(linears) + len(routers)


class Reads(nn.Module):
    """Computes with some of its layers' weights, calls others, and asks for facts of a third kind."""

    def __init__(self):
        super().__init__()
        for name in ("called", "asked", "weighted", "biased", "otherwise", "fused"):
            setattr(self, name, nn.Linear(8, 8))
        self.init_read()

    def init_read(self):
        nn.init.normal_(self.called.weight)

    def forward(self, x):
        if self.training:
            return functional.linear(x, self.fused.weight)
        x = self.called(x.to(self.asked.weight.dtype).to(self.called.weight.device))
        x = self.asked(self.fused(x)) + self.weighted.weight @ x
        return self.rest(x)

    def rest(self, x):
        if hasattr(self, "fast"):
            return self.otherwise(x)
        return x @ self.otherwise.weight[:4].T + self.biased.bias.float()


def test_layers_that_their_model_reads_itself_are_found_in_its_source():
    assert directly_read_linears(nn.ModuleList([Reads()])) == {"0.weighted", "0.biased", "0.otherwise"}
    assert list(maskable_linears(Decoder(Reads()))) == ["layers.0.called", "layers.0.asked", "layers.0.fused"]
    scope = {"Base": nn.Module}
    exec("class Made(Base):\n    def forward(self, x):\n        return x @ self.layer.weight", scope)
    made = scope["Made"]()
    made.layer = nn.Linear(4, 4)
    assert directly_read_linears(made) == set()  # no source to read


def test_layers_that_a_module_further_up_reads_are_found():
    class Rescaled(Decoder):
        def forward(self, x):
            for block in self.layers:
                block.shared.weight.div_(2)
                x = block(x)
            return x.to(self.layers[0].conv.weight.dtype)

        def names(self):
            return "layers.0.attention.k_proj.weight"

    assert directly_read_linears(Rescaled(Mixture(nn.Linear(8, 4), Fused(4)))) == {"layers.0.shared"}


def test_a_linear_by_name_only_is_left_dense():
    class Grouped(nn.Linear):
        def __init__(self, groups):
            super().__init__(8, 8)
            self.groups = groups

        def forward(self, x):
            return super().forward(x).chunk(self.groups, -1)

    class Rewritten(nn.Linear):
        def forward(self, x):
            return x @ self.weight.T + self.bias

    block = nn.ModuleDict({"grouped": Grouped(2), "rewritten": Rewritten(8, 8)})
    assert list(maskable_linears(Decoder(block))) == ["layers.0.rewritten"]


def test_masks_that_hold_a_router_still_apply(tmp_path):
    model = Decoder(Mixture(nn.Linear(8, 4), Fused(4)))
    masks = {name: torch.rand(layer.weight.shape) < 0.5 for name, layer in block_linears(model).items()}
    assert "layers.0.gate" in masks
    save_artifact(tmp_path / "old", masks, meta=fingerprints(model))
    apply_artifact(model, load_artifact(tmp_path / "old", model=model))
    assert keep_masks(model).keys() == masks.keys()
    assert not model.layers[0].gate.weight[~masks["layers.0.gate"]].any()


def test_masks_of_layers_that_were_excluded_are_still_refused():
    model = Decoder(Mixture(nn.Linear(8, 4), Fused(4)))
    masks = {name: torch.rand(layer.weight.shape) < 0.5 for name, layer in maskable_linears(model).items()}
    with pytest.raises(ValueError, match=r"not maskable layers of the model 1 \(layers.0.shared\)"):
        apply_keep_masks(model, masks, exclude=["*.shared"])
