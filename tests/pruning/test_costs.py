"""What one-shot pruning will cost: counts against real runs, the table of docs, what is said of memory."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from support.models import build_tiny_model
from support.scale import DOCUMENT, LLAMA_7B, LLAMA_8B, costs_of, document
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from patch.models.structure import decoder_blocks, maskable_linears
from patch.pruning import compensate, costs, prune_model
from patch.pruning.costs import CPU_BOX, GB, H100, Rates, Work, fits_text, measured_rates, oneshot_costs
from patch.pruning.counts import _ATTENTION, counted
from patch.pruning.fisher import tile_losses
from patch.pruning.one_shot_settings import OneShotSettings
from patch.pruning.options import BlockOptions, TileOptions

SEQLEN = 24


@pytest.fixture(scope="module")
def model():
    return build_tiny_model("llama", intermediate_size=160)


@pytest.fixture(scope="module")
def counts(model):
    return counted(model.config, seqlen=SEQLEN, dtype=torch.bfloat16)


class Products(TorchDispatchMode):
    """Counts operations as FlopCounterMode does, whose hooks on modules do not go with gradients of one tensor."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
        elif func._overloadpacket in _ATTENTION:
            self.total += _ATTENTION[func._overloadpacket](args[0].shape, args[1].shape)
        return result


def flops_of(function):
    with Products() as products:
        function()
    return products.total


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gemma3", "opt"])
def test_operations_are_those_of_a_real_forward_pass(arch):
    model = build_tiny_model(arch)
    found = counted(model.config, seqlen=SEQLEN, dtype=torch.bfloat16)
    ids = torch.zeros(1, SEQLEN, dtype=torch.int64)
    with torch.no_grad():
        total = flops_of(lambda: model(input_ids=ids, use_cache=False))
    assert sum(block.flops for block in found.blocks) + found.around_flops == total
    assert found.elems == sum(parameter.numel() for parameter in model.parameters())
    assert found.masked_elems == sum(layer.weight.numel() for layer in maskable_linears(model).values())
    assert found.around_flops >= 2 * SEQLEN * 260 * 128  # the head
    assert (found.hidden_elems, found.logits_elems, found.itemsize) == (SEQLEN * 128, SEQLEN * 260, 2)


def test_layers_that_read_one_tensor_share_statistics(counts):
    for block in counts.blocks:
        assert len(block.layers) == 7
        # q, k and v; o; gate and up; down
        assert block.inputs == (128, 128, 128, 160)


def test_excluded_layers_are_not_counted(model):
    found = counted(model.config, seqlen=SEQLEN, dtype=torch.float32, exclude=["*.down_proj"])
    assert all(len(block.layers) == 6 and block.inputs == (128, 128, 128) for block in found.blocks)
    assert found.itemsize == 4


def test_saved_bytes_are_those_of_a_real_backward_pass(model, counts):
    saved, seen = Counter(), {id(parameter.untyped_storage()) for parameter in model.parameters()}
    kept, now = [], [None]

    def save(tensor):
        storage = tensor.untyped_storage()
        if now[0] is not None and id(storage) not in seen:
            seen.add(id(storage))
            kept.append(storage)
            saved[now[0]] += storage.nbytes()
        return tensor

    handles = []
    for index, block in enumerate(decoder_blocks(model)[1]):
        handles.append(block.register_forward_pre_hook(lambda *_, index=index: now.__setitem__(0, index)))
        handles.append(block.register_forward_hook(lambda *_: now.__setitem__(0, None)))
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        # With a mask, as of tensors without values, whose padding nobody can know.
        causal = torch.ones(1, 1, SEQLEN, SEQLEN, dtype=torch.bool).tril()
        model(input_ids=torch.zeros(1, SEQLEN, dtype=torch.int64), attention_mask=causal, use_cache=False)
    for handle in handles:
        handle.remove()
    assert [block.saved_bytes for block in counts.blocks] == [saved[0], saved[1]]


def test_work_adds_up_and_takes_time_at_its_rates():
    rates = Rates("a machine", 1, 2, 4, 8, 16, 32, 64)
    work = Work(model=1, fit=2) + Work(model=1, fp32=4, solve=8, memory=16, link=32, starts=64)
    assert work == Work(2, 2, 4, 8, 16, 32, 64)
    assert work.seconds(rates) == 8.0


def costs_with(counts, placement="cpu", nsamples=4, **settings):
    return oneshot_costs(counts, OneShotSettings(**settings), nsamples=nsamples, windows=2, placement=placement)


def names(found):
    return [step.name for step in found.steps if step.name not in ("perplexity", "read the reconstructed weights")]


def test_steps_are_those_of_the_settings(counts):
    last = "pack, open again, perplexity"
    assert names(costs_with(counts, reorder=True)) == [
        *("order of the channels", "provisional patterns", "Fisher information", "sweep"),
        *("least squares", "block fit", last),
    ]
    assert names(costs_with(counts, tiles_by="error", reconstruct="least_squares")) == [
        *("errors of tiles", "sweep", "least squares", last),
    ]
    assert names(costs_with(counts, tiles_by="share", reconstruct="sparsegpt")) == [
        *("provisional patterns", "unstructured reference", "sweep", "sweep", last),
    ]
    fit = {
        epochs: next(step for step in costs_with(counts, epochs=epochs).steps if step.name == "block fit")
        for epochs in (1, 2)
    }
    large = next(step for step in costs_with(counts, batch_size=4).steps if step.name == "block fit")
    saved = max(block.saved_bytes for block in counts.blocks)
    assert large.device_bytes - fit[1].device_bytes == 3 * saved  # few samples are taken one by one
    blocks = sum(block.flops for block in counts.blocks)
    assert fit[2].work.fit - fit[1].work.fit == 4 * 3 * blocks
    sweep = next(step for step in costs_with(counts, method="wanda").steps if step.name == "sweep")
    assert sweep.work.fp32 == sweep.work.solve == 0


def test_memory_is_where_the_model_is(counts):
    here, whole, offloaded = (costs_with(counts, placement) for placement in ("cpu", "gpu", "offload"))
    weights = 2 * counts.elems
    assert here.peaks[0] == 0
    for step, on_gpu, in_turn in zip(here.steps, whole.steps, offloaded.steps, strict=True):
        device, host = whole.memory(on_gpu)
        assert here.memory(step)[1] == device + host
        assert host <= here.memory(step)[1]
        assert offloaded.memory(in_turn)[0] < device and offloaded.memory(in_turn)[1] >= host + weights
    assert offloaded.seconds(H100) > whole.seconds(H100)
    assert whole.seconds(H100) == pytest.approx(
        sum(whole.seconds(H100, s) for s in ("dense", "reorder", "prune", "reconstruct", "pack"))
    )


def test_a_7b_fits_a_card_of_24_gb_with_offload_and_not_whole():
    whole, offloaded = (costs_of(LLAMA_7B, placement) for placement in ("gpu", "offload"))
    assert offloaded.peaks[0] < 23 * GB < 24 * GB < whole.peaks[0]
    first, *_, host, note = fits_text(whole, offloaded)
    assert first.startswith("a GPU of 24 GB: the whole model does not fit, ")
    assert "; with --offload it fits, " in first
    assert host == f"--offload needs {offloaded.peaks[1] / GB:.1f} GB of host memory"
    assert note.startswith("note: not in these figures: CUDA context")


def test_an_8b_fits_an_h100_and_a_cpu_box_of_64_gb():
    assert costs_of(LLAMA_8B, "gpu").peaks[0] < 80 * GB
    assert costs_of(LLAMA_8B, "cpu").peaks[1] < 64 * GB
    quick = costs_of(LLAMA_8B, "cpu", reconstruct="sparsegpt")
    assert quick.seconds(CPU_BOX) < costs_of(LLAMA_8B, "cpu").seconds(CPU_BOX) / 2


def test_the_page_is_what_the_functions_say():
    assert DOCUMENT.read_text(encoding="utf-8") == document(), "write it with: python tools/scale_table.py"


def test_rates_are_measured_on_the_spot(monkeypatch):
    ticks = iter(range(10**6))
    monkeypatch.setattr(costs.time, "perf_counter", lambda: next(ticks))
    rates = measured_rates(torch.device("cpu"), torch.bfloat16)
    assert (rates.model, rates.fit, rates.fp32) == (2 * 1024**3,) * 3
    assert rates.solve == 8 * 256**3 / 3 and rates.memory == 2 * 4 * 1024**2


# -- the steps themselves, run and counted ---


@pytest.fixture
def eager():
    """A model whose attention is plain products, which are counted in backward passes too; and its counts."""
    model = build_tiny_model("llama", intermediate_size=160, attn_implementation="eager")
    return model, counted(model.config, seqlen=SEQLEN, dtype=torch.float32)


def windows(samples):
    return torch.randint(0, 250, (samples, SEQLEN), generator=torch.Generator().manual_seed(0))


def work_of(found, name):
    return next(step.work for step in found.steps if step.name == name)


def first_products(counts):
    """Operations of the gradient of a block's input in q, k and v, which is left out where nothing is before it."""
    return 2 * SEQLEN * sum(rows * cols for rows, cols in counts.blocks[0].layers[:3])


def test_the_fisher_pass_does_the_operations_of_its_formula(eager):
    model, counts = eager
    masks = {name: torch.ones_like(layer.weight, dtype=torch.bool) for name, layer in maskable_linears(model).items()}
    done = flops_of(lambda: tile_losses(model, masks, windows(3), (64, 64), progress=False))
    assert done == work_of(costs_with(counts, nsamples=3), "Fisher information").model - 3 * first_products(counts)


def test_a_pass_over_the_blocks_does_the_operations_of_its_formula(eager):
    model, counts = eager
    first, last = (block.flops for block in counts.blocks)
    options = {"sparsity": 0.4, "calibration": windows(5), "tiles": TileOptions(by="error"), "progress": False}
    done = flops_of(lambda: prune_model(model, "wanda", pattern="tiles", **options))
    by_formula = work_of(costs_with(counts, nsamples=5, method="wanda", tiles_by="error"), "sweep").model
    # Two passes. Each asks two samples how blocks are called and needs no outputs of the last block; the first looks
    # with one whether all layers are reached.
    assert by_formula == 2 * 5 * (first + last)
    assert done == 2 * (by_formula - 5 * last + 2 * first) + first + last


def test_an_epoch_of_the_block_fit_does_the_operations_of_its_formula(eager):
    model, counts = eager
    masks = {name: torch.rand(layer.weight.shape) < 0.6 for name, layer in maskable_linears(model).items()}
    done, by_formula = {}, {}
    for epochs in (1, 2):
        own = copy.deepcopy(model)
        options = {"calibration": windows(4), "blocks": BlockOptions(epochs=epochs, batch_size=2), "progress": False}
        done[epochs] = flops_of(lambda own=own, options=options: compensate(own, masks, **options))
        by_formula[epochs] = work_of(costs_with(counts, nsamples=4, epochs=epochs), "block fit").fit
    assert done[2] - done[1] == by_formula[2] - by_formula[1] - 4 * 2 * first_products(counts)
