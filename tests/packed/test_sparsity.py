"""Zeros of packed layers, counted exactly."""

from __future__ import annotations

import pytest
import torch
from support.models import mask_model

from patch.models.keep_masks import keep_masks, measured_sparsity
from patch.packed.convert import pack_model
from patch.packed.swap import packed_zeros


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_zeros_of_packed_layers_are_those_of_the_masks(tiny_model, dtype):
    # 200 is no multiple of a tile: the padding of the last tiles is no weight of the model.
    model = mask_model(tiny_model(dtype=dtype, intermediate_size=200), share_sparse=0.6)
    for parameter in model.parameters():
        parameter.data[parameter.data == 0] = 1e-3  # what is kept is not zero by chance
    model.model.layers[0].mlp.up_proj.keep_mask[150:, 3] = False  # zeros in dense tiles count too
    masks = keep_masks(model)
    for name, keep in masks.items():
        model.get_submodule(name).weight.data[~keep] = 0
    expected = {name: (int((~keep).sum()), keep.numel()) for name, keep in masks.items()}
    sparsity = measured_sparsity(masks)
    pack_model(model)
    assert packed_zeros(model) == expected
    zeros, weights = (sum(counts) for counts in zip(*packed_zeros(model).values(), strict=True))
    assert zeros / weights == pytest.approx(sparsity, rel=1e-12)


def test_a_model_without_packed_layers_has_none(tiny_model):
    assert packed_zeros(tiny_model()) == {}
