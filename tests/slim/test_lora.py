"""Low-rank adapters and compression of models against float64 NumPy references written from the formulas."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from patch.models.adapted_linear import AdaptedLinear
from patch.models.keep_masks import keep_masks
from patch.models.structure import maskable_linears
from patch.pruning import prune_model
from patch.pruning.selection import keep_two_of_four
from patch.slim import CompressOptions, compress_model, compress_weight
from patch.slim.compress import adapters, restore_compression
from patch.slim.lora import make_adapter, prune_left

QUANTIZED = {"quantize_weight": True}
ADAPTED = {"lora_rank": 0.25}


def layer(rows=24, columns=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    energy = torch.rand(columns, generator=generator, dtype=torch.float64) ** 4 + 1e-3
    return weight, keep_two_of_four(weight.abs()), energy


def calibration(samples=3, seqlen=24):
    return torch.randint(0, 256, (samples, seqlen), generator=torch.Generator().manual_seed(1))


def masks_of(model):
    return prune_model(copy.deepcopy(model), "magnitude", progress=False)


def rounded(array):
    return torch.from_numpy(array).bfloat16().double().numpy()


@pytest.mark.parametrize("slim", [True, False])
def test_adapters_and_kept_weights_are_those_of_the_formulas(slim):
    weight, keep, energy = layer()
    made = compress_weight(weight, keep, CompressOptions(slim_lora=slim, **ADAPTED), energy=energy)

    dense, mask = weight.numpy(), keep.numpy()
    x = np.sqrt(energy.numpy()) if slim else np.ones(32)
    u, s, vt = np.linalg.svd((dense - dense * mask) * x, full_matrices=False)
    rank = int(0.25 * 24)
    product = rounded((vt[:rank].T * s[:rank]) / x[:, None]) @ rounded(u[:, :rank].T)
    left, right = made.left.double().numpy(), made.right.double().numpy()
    assert left.shape == (32, rank) and right.shape == (rank, 24) and made.left.dtype == torch.bfloat16
    # Singular vectors have a free sign, their product has none.
    np.testing.assert_allclose(left @ right, product, rtol=0, atol=1e-12)
    expected = np.where(mask, dense - (left @ right).T, 0)
    np.testing.assert_allclose(made.weight.numpy(), expected, rtol=0, atol=1e-12)
    residual = dense - expected - (left @ right).T
    weigh = np.sqrt(energy.numpy())
    assert made.error == pytest.approx(np.linalg.norm(residual * weigh) / np.linalg.norm(dense * weigh), rel=1e-9)


@pytest.mark.parametrize("quantization", [{}, QUANTIZED, QUANTIZED | {"slim_quant": False}])
def test_each_step_lowers_the_error(quantization):
    """No adapters > naive ones > those that know the inputs."""
    weight, keep, energy = layer(64, 96)
    errors = []
    for setting in ({}, ADAPTED | {"slim_lora": False}, ADAPTED):
        made = compress_weight(weight, keep, CompressOptions(**(quantization | setting)), energy=energy)
        assert not made.weight[~keep].any()
        errors.append(made.error)
    assert errors[2] < errors[1] < errors[0]


def test_kept_weights_are_quantised_again_without_the_adapters_part():
    weight, keep, energy = layer(64, 96)
    made = compress_weight(weight, keep, CompressOptions(slim_quant=False, **QUANTIZED, **ADAPTED), energy=energy)
    rest = (weight - (made.left.double() @ made.right.double()).T).masked_fill(~keep, 0).numpy()
    scale = 7 / np.abs(rest).max()
    np.testing.assert_allclose(made.weight.numpy(), np.clip(np.round(rest * scale), -8, 7) / scale, rtol=1e-12)
    assert torch.equal(made.weight, made.quantized.weight)


def test_updated_weights_stay_as_the_pruning_method_made_them():
    weight, keep, energy = layer()
    updated = (weight * 1.25).masked_fill(~keep, 0)
    made = compress_weight(weight, keep, CompressOptions(**ADAPTED), energy=energy, updated=updated)
    assert torch.equal(made.weight, updated)
    bare = ((weight - updated) * energy.sqrt()).norm() / (weight * energy.sqrt()).norm()
    assert made.error < bare.item()


@pytest.mark.parametrize("prune", [False, True])
def test_inputs_that_are_almost_dead_do_not_blow_up_rounding_errors(prune):
    weight, keep, energy = layer()
    energy[3] = 1e-20
    options = CompressOptions(prune_lora=prune, **ADAPTED)
    error = weight.masked_fill(keep, 0)
    expected, got = (
        (left.double() @ right.double())[3]
        for left, right in (make_adapter(error.to(dtype), options, energy) for dtype in (torch.float64, torch.float32))
    )
    assert expected.norm() <= error[:, 3].norm() and (got - expected).norm() < 0.02 * error[:, 3].norm()


def test_dead_inputs_get_no_adapter_and_do_no_harm():
    weight, keep, energy = layer()
    energy[[3, 30]] = 0
    made = compress_weight(weight, keep, CompressOptions(**ADAPTED), energy=energy)
    assert made.left.isfinite().all() and not made.left[[3, 30]].any() and made.left[4].any()
    naive = compress_weight(weight, keep, CompressOptions(slim_lora=False, **ADAPTED), energy=energy)
    assert made.error < naive.error


@pytest.mark.parametrize("setting", [{"pad_lora": True}, {"quantize_lora": True}])
def test_the_rank_is_padded_beyond_the_layer_if_need_be(setting):
    weight, keep, energy = layer(24, 32)
    for tile, rank in ((8, 8), (16, 16), (32, 32)):
        options = CompressOptions(lora_tile_size=tile, **ADAPTED, **setting)
        assert options.rank((24, 32)) == rank
        left, right = make_adapter(weight.masked_fill(keep, 0), options, energy)
        assert left.shape == (32, rank) and right.shape == (rank, 24)
        if rank > 24:
            assert not left[:, 24:].any() and not right[24:].any()


def test_quantised_adapters_have_few_values_in_each_group():
    weight, keep, energy = layer(24, 32)
    options = CompressOptions(quantize_lora=True, lora_tile_size=8, **ADAPTED)
    left, right = make_adapter(weight.masked_fill(keep, 0), options, energy)
    for part in (left, right):
        for group in part.reshape(-1, 8, part.shape[1]).transpose(1, 2).reshape(-1, 8).float():
            codes = group / group.abs().max() * 7
            assert torch.allclose(codes, codes.round(), rtol=0, atol=7 * 2**-7)  # bf16 has 8 bits


def test_a_pruned_left_adapter_is_two_of_four_and_readjusted():
    weight, keep, energy = layer(24, 32)
    options = CompressOptions(prune_lora=True, **ADAPTED)
    left, _ = make_adapter(weight.masked_fill(keep, 0), options, energy)
    assert (left.ne(0).T.reshape(-1, 4).sum(1) <= 2).all() and left.any()
    made = compress_weight(weight, keep, options, energy=energy)
    assert made.error < compress_weight(weight, keep, CompressOptions(**QUANTIZED, bitwidth=8), energy=energy).error


def test_readjusting_beats_least_squares_of_the_right_alone_and_ends_at_a_stationary_point():
    generator = torch.Generator().manual_seed(2)
    left, right = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((32, 6), (6, 24)))
    target = left @ right
    keep = keep_two_of_four(left.abs().T.contiguous()).T
    bare = left.masked_fill(~keep, 0)
    once = bare @ torch.linalg.lstsq(bare, target).solution
    pruned, adjusted = prune_left(left, right)
    assert torch.equal(pruned.ne(0), keep)
    assert (pruned @ adjusted - target).norm() < 0.9 * (once - target).norm()
    # The best right adapter for this left one, by the normal equations.
    assert (pruned.T @ (pruned @ adjusted - target)).abs().max() < 1e-8


def test_an_adapter_of_nothing():
    options = CompressOptions(prune_lora=True, slim_lora=False, **ADAPTED)
    left, right = make_adapter(torch.zeros(24, 32), options)
    assert not left.any() and right.isfinite().all()


def test_adapted_linear_is_a_linear_with_a_low_rank_term():
    torch.manual_seed(0)
    linear = nn.Linear(8, 12).double()
    adapted = AdaptedLinear.from_linear(linear, 3)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    assert torch.equal(adapted(x), linear(x)) and adapted.weight is linear.weight and adapted.bias is linear.bias
    with torch.no_grad():
        adapted.lora_left.normal_()
        adapted.lora_right.normal_()
    expected = x @ linear.weight.T + linear.bias + x @ adapted.lora_left.double() @ adapted.lora_right.double()
    assert torch.allclose(adapted(x), expected, rtol=0, atol=1e-12)
    other = AdaptedLinear(8, 12, 3, dtype=torch.float64)
    other.load_state_dict(adapted.state_dict())
    assert torch.equal(other(x), adapted(x)) and "rank=3" in repr(other)


def test_attaching_draws_nothing_from_the_random_generator():
    linear = nn.Linear(8, 12)
    before = torch.get_rng_state()
    adapted = AdaptedLinear.from_linear(linear, 3)
    assert torch.equal(torch.get_rng_state(), before)
    assert not adapted.lora_left.any() and not adapted.lora_right.any() and not adapted.lora_left.is_meta


def test_important_columns_are_chosen_by_what_is_kept():
    """The largest column is pruned in every row that makes it large."""
    weight, keep, energy = torch.full((8, 8), 0.5), torch.ones(8, 8, dtype=torch.bool), torch.ones(8)
    weight[:7, 2], keep[:7, 2] = 100.0, False
    weight[:, 5] = 0.9
    options = CompressOptions(slim_quant=False, scale_important_weights=True, **QUANTIZED)
    made = compress_weight(weight, keep, options, energy=energy)
    assert made.quantized.column_factor.tolist() == [1, 1, 1, 1, 1, 2, 1, 1]


def test_zeros_that_a_tile_mask_keeps_stay_kept(tiny_model):
    """One dense tile row and one of 2:4, as PATCH makes them; kept zeros are no pruned weights."""
    model = tiny_model()
    masks = masks_of(model)
    for name, keep in masks.items():
        keep[:64] = True
        model.get_submodule(name).weight.data[:8] = 0
    options = CompressOptions(bitwidth=2, **QUANTIZED, **ADAPTED)
    compress_model(model, masks, options, calibration=calibration(), progress=False)
    found = keep_masks(model)
    for name, keep in masks.items():
        weight = model.get_submodule(name).weight
        assert torch.equal(found[name], keep) and not weight[~keep].any() and (weight[keep] == 0).any()


@pytest.mark.parametrize("arch", ["llama", "opt", "gemma3"])
def test_models_are_compressed_block_by_block(tiny_model, arch):
    model, dense = tiny_model(arch), tiny_model(arch)
    masks = masks_of(model)
    options = CompressOptions(**QUANTIZED, **ADAPTED)
    errors = compress_model(model, masks, options, calibration=calibration(), progress=False)
    assert errors.keys() == masks.keys() == keep_masks(model).keys() == adapters(model).keys()
    for name, linear in maskable_linears(model).items():
        assert isinstance(linear, AdaptedLinear) and torch.equal(linear.keep_mask, masks[name])
        assert not linear.weight[~masks[name]].any() and linear.weight.unique().numel() <= 16
    ids = calibration(1, 8)
    plain = copy.deepcopy(dense)
    compress_model(plain, masks, CompressOptions(**QUANTIZED), progress=False)
    with torch.no_grad():
        logits = [m(ids).logits for m in (dense, plain, model)]
    assert (logits[2] - logits[0]).norm() < (logits[1] - logits[0]).norm()
    assert model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=258).shape == (1, 12)


def test_statistics_come_from_the_dense_block_behind_compressed_ones(tiny_model):
    model = tiny_model()
    masks, tokens = masks_of(model), calibration()
    options = CompressOptions(**ADAPTED)
    layers = {name: copy.deepcopy(linear) for name, linear in maskable_linears(model).items()}
    compress_model(model, masks, options, calibration=tokens, progress=False)
    by_hand = tiny_model()
    for block in ("model.layers.0.", "model.layers.1."):
        energies, handles = {}, []
        names = [name for name in masks if name.startswith(block)]
        for name in names:
            energies[name] = []
            handles.append(
                by_hand.get_submodule(name).register_forward_pre_hook(
                    lambda module, args, into=energies[name]: into.append(args[0].square().sum((0, 1)))
                )
            )
        with torch.no_grad():
            for sample in tokens:
                by_hand(sample[None])
        for handle in handles:
            handle.remove()
        for name in names:
            energy = torch.stack(energies[name]).mean(0)
            made = compress_weight(layers[name].weight, masks[name], options, energy=energy)
            restored = {name: (made.left, made.right)}
            by_hand.get_submodule(name).weight.data.copy_(made.weight)
            restore_compression(by_hand, restored, None)
    with torch.no_grad():
        ours, theirs = (m(tokens).logits for m in (model, by_hand))
    assert (ours - theirs).norm() < 1e-3 * ours.norm()


def test_layers_without_a_mask_stay_dense(tiny_model):
    model = tiny_model()
    masks = {name: keep for name, keep in masks_of(model).items() if "mlp" in name}
    compress_model(model, masks, CompressOptions(**QUANTIZED), progress=False)
    attention = "model.layers.0.self_attn.q_proj"
    assert torch.equal(model.get_submodule(attention).weight, tiny_model().get_submodule(attention).weight)
    assert keep_masks(model).keys() == masks.keys()


def wrong(case, model):
    masks = masks_of(model)
    name = next(iter(masks))
    options, extra = CompressOptions(**QUANTIZED), {}
    if case == "nothing":
        options = CompressOptions()
    elif case == "no data":
        options = CompressOptions(**ADAPTED)
    elif case == "pruned":
        prune_model(model, "magnitude", progress=False)
        options = CompressOptions(slim_lora=False, **ADAPTED)
    elif case == "revived":
        prune_model(model, "magnitude", progress=False)
        masks = {name: ~keep for name, keep in masks.items()}
    elif case == "twice":
        compress_model(model, masks, options, progress=False)
    elif case == "groups":
        options = CompressOptions(weight_tiled_quantization=True, weight_tile_size=100, **QUANTIZED)
    elif case == "adapter groups":
        options = CompressOptions(quantize_lora=True, slim_lora=False, lora_tile_size=100, **ADAPTED)
    elif case == "weights":
        extra = {"weights": {name: torch.ones(2, 2)}}
    elif case == "device":
        extra = {"device": "nowhere"}
    elif case == "masks":
        masks["other"] = masks.pop(name)
    return masks, options, extra


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("nothing", "options: expected quantize_weight or a lora_rank above 0, got neither"),
        ("no data", "calibration: expected token ids for slim_lora .* got none"),
        ("pruned", "expected its dense weight, which adapters are made from, got a pruned one"),
        ("revived", "layer '.*': expected a mask that keeps no weight which was pruned before, got 8192 of them"),
        ("twice", "expected a model that is not compressed yet. Load it again"),
        ("groups", "layer 'model.layers.0.*', rows: expected a multiple of the group size 100, got 128"),
        ("adapter groups", "layer '.*', left adapter, rows: expected a multiple of the group size 100, got 128"),
        ("weights", r"weights\['.*'\]: expected a tensor \(\d+, \d+\), got torch.float32 \(2, 2\)"),
        ("device", "device: expected a torch device such as"),
        ("masks", r"masks: expected one for each of the .* layers to mask, got 14: .* 1 \(other\)"),
    ],
)
def test_wrong_arguments_are_refused_before_any_work(tiny_model, case, message):
    model = tiny_model()
    masks, options, extra = wrong(case, model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        compress_model(model, masks, options, progress=False, **extra)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"slim_quant": 1}, ValueError, "slim_quant: expected true or false, got 1"),
        ({"bitwidth": 16}, ValueError, "bitwidth: expected 2 to 8 bits, got 16"),
        ({"weight_tile_size": 0}, ValueError, "weight_tile_size: expected a group size of 1 or more, got 0"),
        ({"lora_tile_size": 2.5}, ValueError, "lora_tile_size: expected a group size of 1 or more, got 2.5"),
        ({"lora_rank": 8}, ValueError, "lora_rank: expected a share .* 0 to 1, got 8. The usual one is 0.1"),
        ({"lora_rank": float("nan")}, ValueError, "lora_rank: expected a share"),
        ({"separate_lora": False}, ValueError, "separate_lora: expected True, got False. Adapters that are merged"),
        ({"prune_lora": True}, ValueError, "prune_lora: expected lora_rank to be set as well, got 0.0. Set both"),
        ({"scale_important_weights": True}, ValueError, "expected quantize_weight to be set as well, got False"),
        (
            {"quantize_weight": True, "column_wise_grouping": True},
            ValueError,
            "column_wise_grouping: expected weight_tiled_quantization to be set as well",
        ),
    ],
)
def test_options_are_checked_when_made(settings, error, message):
    with pytest.raises(error, match=message):
        CompressOptions(**settings)


def test_wrong_matrices_are_refused():
    weight, keep, energy = layer()
    options = CompressOptions(**ADAPTED)
    with pytest.raises(TypeError, match=r"keep: expected torch.bool \(24, 32\), got torch.float32"):
        compress_weight(weight, keep.float(), options, energy=energy)
    with pytest.raises(ValueError, match=r"energy: expected a tensor \(32,\), got .* \(1,\)"):
        compress_weight(weight, keep, options, energy=energy[:1])


def test_energy_is_asked_for_and_two_of_four_adapters_need_fitting_layers():
    weight, keep, _ = layer()
    with pytest.raises(ValueError, match="energy: expected the input energies for slim_lora"):
        compress_weight(weight, keep, CompressOptions(**ADAPTED))
    with pytest.raises(ValueError, match="odd, in_features for prune_lora: expected a multiple of 4, got 6"):
        CompressOptions(prune_lora=True, **ADAPTED).check_shape((8, 6), "odd")
