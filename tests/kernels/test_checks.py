"""Checks that many functions share."""

from __future__ import annotations

import pytest
import torch

from patch_kernels.checks import FLOATS, all_finite, require_finite


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", FLOATS)
def test_one_value_that_is_not_finite_is_found_at_every_place(dtype, value):
    values = torch.linspace(-3, 3, 131).to(dtype)
    assert all_finite(values)
    for place in range(len(values)):
        bad = values.clone()
        bad[place] = value
        assert not all_finite(bad)
        assert not all_finite(torch.stack([values, bad]).T)
    with pytest.raises(ValueError, match=r"weight: expected finite values, got 1 that are NaN or infinite\. Look"):
        require_finite("weight", bad, "Look.")


def test_the_largest_values_are_finite_and_nothing_is_too():
    for dtype in FLOATS:
        limits = torch.finfo(dtype)
        assert all_finite(torch.tensor([limits.min, limits.max, limits.tiny, -0.0], dtype=dtype))
        assert all_finite(torch.empty(0, 4, dtype=dtype))
    assert all_finite(torch.tensor(1.0, requires_grad=True))
