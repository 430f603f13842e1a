"""What is said of weights that are zero, whatever the masks say."""

from __future__ import annotations

import pytest
import torch
from support.models import build_tiny_model, mask_model
from torch import nn

from patch.models.keep_masks import keep_masks, measured_sparsity, sparsity_text, zero_share, zeros_already
from patch.models.structure import maskable_linears


def test_zero_share_counts_exact_zeros():
    layer, other = nn.Linear(8, 4), nn.Linear(8, 1100)
    layer.weight.data[:, :2] = torch.tensor([0.0, -0.0])
    assert zero_share(layer) == 0.25
    assert zero_share(layer, other) == pytest.approx(8 / (32 + 8800))


def test_a_pruned_export_is_noticed_and_a_dense_model_is_not():
    model = build_tiny_model("llama", dtype=torch.bfloat16)
    linears = maskable_linears(model)
    assert zero_share(*linears.values()) < 0.001 and zeros_already(linears) is None
    name = list(linears)[3]
    linears[name].weight.data[:8] = 0
    share = 100 * zero_share(*linears.values())
    said = zeros_already(linears)
    assert said.startswith(f"{share:.1f} % of the weights to mask are zero already (in 1 of 14 layers, '{name}' for")
    mask_model(model, 1.0)
    assert zeros_already(linears).startswith("50.")


def test_both_sparsities_where_they_differ():
    model = mask_model(build_tiny_model("llama"), 0.5)
    linears, masks = maskable_linears(model), keep_masks(model)
    assert sparsity_text(masks, linears) == f"sparsity {measured_sparsity(masks):.4f}"
    every = {name: torch.ones_like(keep) for name, keep in masks.items()}
    share = zero_share(*linears.values())
    assert sparsity_text(every, linears) == f"sparsity 0.0000 by the masks, but {share:.4f} of the weights are 0"
