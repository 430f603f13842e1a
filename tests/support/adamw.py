"""Problems of the optimiser op."""

from __future__ import annotations

import hashlib

import torch

from patch_kernels import adamw_step

PARAM_DTYPES = (torch.float32, torch.bfloat16)


MOMENT_DTYPES = (torch.float32, torch.bfloat16, torch.uint8)


SETTINGS = dict(lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)


def adamw_state(elems, dtype, moments, generator):
    """param, moments and scales before the first step, by their names in adamw_step."""
    state = {"param": torch.randn(elems, generator=generator).to(dtype)}
    state |= {name: torch.zeros(elems, dtype=moments) for name in ("exp_avg", "exp_avg_sq")}
    if moments == torch.uint8:
        state |= {f"{name}_scale": torch.zeros(-(-elems // 256)) for name in ("exp_avg", "exp_avg_sq")}
    return state


def random_gradient(elems, dtype, generator):
    """Magnitudes over 15 decades, so that a block of 8-bit moments has values far below its scale."""
    exponents = torch.randint(-12, 3, (elems,), generator=generator)
    return (torch.randn(elems, generator=generator) * 10.0**exponents).to(dtype)


def same_bits(a, b):
    kinds = {2: torch.int16, 4: torch.int32}
    kind = kinds.get(a.element_size(), a.dtype)
    return a.dtype == b.dtype and torch.equal(a.view(kind), b.view(kind))


def run_steps(function, elems, dtype, moments, steps=4):
    generator = torch.Generator().manual_seed(0)
    state = adamw_state(elems, dtype, moments, generator)
    for step in range(1, steps + 1):
        grad = random_gradient(elems, dtype, generator)
        function(**state, grad=grad, step=step, grad_scale=torch.tensor([0.3]), seed=-7, stream=3, **SETTINGS)
    return state


def digest():
    """Of the results for all dtypes."""
    hashed = hashlib.sha256()
    for dtype in PARAM_DTYPES:
        for moments in MOMENT_DTYPES:
            for value in run_steps(adamw_step, 3001, dtype, moments, steps=3).values():
                hashed.update(value.view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()
