"""ProxSparse: its operator against a brute-force minimum, its training against a plain loop in fp64."""

from __future__ import annotations

import itertools
import logging
import math

import pytest
import torch
from support.models import build_byte_tokenizer, build_tiny_model
from torch import nn

from patch import cli
from patch.artifacts.artifact import load_artifact
from patch.models.keep_masks import keep_masks
from patch.models.structure import maskable_linears
from patch.priors import tile_scores
from patch.pruning import ProxSparseConfig, prune_model, prune_weight
from patch.pruning.proxsparse import training
from patch.pruning.proxsparse.proximal import frozen_weight_gradient, frozen_weight_penalty, prox, regularizer
from patch.pruning.proxsparse.training import learn_masks
from patch.utils import load_compressed_model, prepare_pruned_model

SMALL = {"hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 32}
TRIPLES = list(itertools.combinations(range(4), 3))


def objective(w, v, lam):
    """The definition, for w and v (..., 4) in fp64."""
    triples = sum(w[..., list(triple)].prod(-1).abs() for triple in TRIPLES)
    return (w - v).square().sum(-1) / 2 + lam * triples


def brute_force(v, lam, starts=48, steps=1500):
    """Least objective (G,) found by plain gradient descent from many starts in the orthant of v (G, 4)."""
    generator = torch.Generator().manual_seed(1)
    z = v.abs()
    w = torch.rand(starts, *v.shape, generator=generator, dtype=torch.float64) * z
    w[: starts // 2] *= torch.rand(starts // 2, *v.shape, generator=generator) < 0.7  # also from fewer nonzeros
    w[: starts // 4] *= 0.1
    step = 0.2 / (1 + 3 * lam * float(z.max()))
    for _ in range(steps):
        a, b, c, d = w.unbind(-1)
        slope = torch.stack(
            [b * c + c * d + b * d, a * c + c * d + a * d, a * b + b * d + a * d, a * b + b * c + a * c], dim=-1
        )
        w = (w - step * (w - z + lam * slope)).clamp(min=0)
    return objective(w, z, lam).amin(0)


def groups(count, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    # Half of them with four entries of nearly one size: there the cases are closest to each other.
    v[::2] = v[::2].sign() * (0.8 + 0.2 * v[::2].abs().clamp(max=1))
    v[::16, 0] = 0
    v[1::16, 2] = v[1::16, 1]
    v[2::16] = v[2::16, :1]
    return v * scale


@pytest.mark.parametrize("scale", [0.1, 0.5, 0.7, 0.9, 1.1, 1.25, 2.0])
@pytest.mark.parametrize("lam", [1.0, 0.05])
def test_prox_is_the_minimum(scale, lam):
    v = groups(200, scale / lam, seed=int(100 * scale))
    found = objective(prox(v, lam), v, lam)
    # No slack to speak of: 1e-13 of the values' size is the rounding of the objective itself.
    assert (found <= brute_force(v, lam, starts=24, steps=600) + 1e-13 * (scale / lam) ** 2).all()


def test_prox_beats_every_point_of_a_grid_in_all_orthants():
    v = groups(32, 1.1, seed=5)
    axis = torch.linspace(-1.5, 1.5, 13, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis, axis, axis)
    found = objective(prox(v, 1.0), v, 1.0)
    for group, value in zip(v, found, strict=True):
        assert value <= objective(grid, group, 1.0).min()


def test_prox_of_equal_entries_in_closed_form():
    # (a, a, a, 0): w + lam * w^2 = a while three nonzeros cost less than two, that is a^2 / 2.
    a = torch.tensor([0.02, 0.3, 1.0, 1.15, 1.2, 5.0], dtype=torch.float64)
    w = (torch.sqrt(1 + 4 * a) - 1) / 2
    three = 1.5 * (a - w) ** 2 + w**3 < a**2 / 2
    assert three.tolist() == [True, True, True, True, True, False]
    result = prox(torch.stack([a, a, a, torch.zeros_like(a)], dim=1), 1.0)
    for row, value, entry, is_three in zip(result, w, a, three, strict=True):
        expected = [value, value, value, 0.0] if is_three else [entry, entry, 0.0, 0.0]
        assert torch.allclose(row, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=0)


def test_prox_where_descent_from_zero_with_full_steps_ends_elsewhere():
    v = torch.tensor(
        [1.0372346411999949, 1.0237956021644143, 1.021999683327701, 0.8425187874089105], dtype=torch.float64
    )
    result = prox(v, 1.0)
    assert (result != 0).tolist() == [True, True, True, False]
    assert objective(result, v, 1.0) == pytest.approx(0.8420713, abs=1e-6)
    assert v[2:].square().sum() / 2 == pytest.approx(0.8771606, abs=1e-6)  # what the two largest alone cost


def test_prox_of_special_values():
    v = groups(64, 0.7, seed=3)
    assert torch.equal(prox(v, 0.0), v)
    two = v.masked_fill(torch.arange(4) % 2 == 0, 0)
    assert torch.equal(prox(two, 3.0), two)
    for huge in (1e6, 1e30):
        kept = prox(v[v.ne(0).all(1)].float(), huge)
        assert ((kept != 0).sum(1) == 2).all()
    zero = torch.tensor([[0.0, -0.0, 0.0, -0.0]])
    assert torch.equal(prox(zero, 1.0), zero)
    # Equal cost of any two: still exactly two.
    assert (prox(torch.full((3, 4), -5.0), 1.0) != 0).sum(1).tolist() == [2, 2, 2]


def test_prox_of_three_nonzeros_only_shrinks():
    v = groups(200, 0.6, seed=4)
    result = prox(v, 1.0)
    assert (result.abs() <= v.abs()).all() and (result * v >= 0).all()
    assert (result.abs() < v.abs()).any() and ((result == 0) & (v != 0)).any()


def test_prox_commutes_with_signs_and_permutations():
    generator = torch.Generator().manual_seed(6)
    v = torch.rand(300, 4, generator=generator, dtype=torch.float64) * 1.3
    expected = prox(v, 1.0)
    signs = torch.randint(0, 2, v.shape, generator=generator) * 2.0 - 1
    assert torch.equal(prox(v * signs, 1.0), expected * signs)
    for order in itertools.permutations(range(4)):
        assert torch.allclose(prox(v[:, list(order)], 1.0), expected[:, list(order)], rtol=0, atol=1e-14)
    assert torch.allclose(prox(v / 8, 8.0), expected / 8, rtol=0, atol=1e-15)  # lam and v scale against each other


@pytest.mark.parametrize("shape", [(6, 8), (2, 3, 4), (4,), (0, 8)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_prox_of_other_shapes_dtypes_and_chunks(shape, dtype):
    v = torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(dtype)
    before = v.clone()
    result = prox(v, 0.4)
    assert torch.equal(v, before)
    assert result.shape == v.shape and result.dtype == dtype
    # How long a group is iterated depends on its neighbours in the chunk, after it has converged to rounding.
    rounding = 16 * torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    alone = prox(v, 0.4, chunk_groups=1)
    if dtype.itemsize == 2:
        assert torch.equal(result, alone) and torch.equal(result, prox(v.float(), 0.4).to(dtype))
    else:
        assert torch.allclose(result, alone, rtol=0, atol=rounding)
        assert torch.allclose(result.double(), prox(v.double(), 0.4), rtol=0, atol=rounding)
    if len(shape) == 2:
        strided = torch.empty(shape[1], shape[0], dtype=dtype).T.copy_(v)
        assert torch.equal(prox(strided, 0.4), result)


def test_regularizer_counts_triples_and_is_zero_for_two_of_four():
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(8))
    expected = sum(
        math.prod(abs(group[i]) for i in triple)
        for group in weight.double().reshape(-1, 4).tolist()
        for triple in TRIPLES
    )
    assert float(regularizer(weight.double())) == pytest.approx(expected, rel=1e-14)
    assert regularizer(weight.bfloat16()).dtype == torch.float32
    for kept in itertools.chain.from_iterable(itertools.combinations(range(4), n) for n in range(5)):
        mask = torch.tensor([i in kept for i in range(4)]).repeat(4)
        assert (float(regularizer(weight * mask)) == 0) == (len(kept) <= 2)


def test_frozen_weight_penalty_and_its_gradient():
    generator = torch.Generator().manual_seed(9)
    original, weight = (torch.randn(5, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    original[0, :3] = torch.tensor([0.0, -0.0, 1e-9])
    weight[1, 1], weight[2] = 0.0, original[2]
    weight.requires_grad_(True)
    penalty = frozen_weight_penalty(weight, original, 0.3)
    expected = sum(
        (w / (w0 + (-0.3 if w0 < 0 else 0.3)) * (w - w0)) ** 2
        for w, w0 in zip(weight.flatten().tolist(), original.flatten().tolist(), strict=True)
    )
    assert penalty.item() == pytest.approx(expected, rel=1e-14)
    penalty.backward()
    with torch.no_grad():
        assert torch.allclose(frozen_weight_gradient(weight, original, 0.3), weight.grad, rtol=1e-12, atol=1e-14)
    assert not frozen_weight_penalty(original, original, 0.3)
    assert not frozen_weight_penalty(torch.zeros_like(original), original, 0.3)


def test_schedule_is_linear_up_and_down():
    config = ProxSparseConfig(lr=1.0, steps=10, warmup_ratio=0.35)
    assert [config.lr_at(step) for step in range(10)] == pytest.approx(
        [0, 1 / 4, 2 / 4, 3 / 4, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6], rel=1e-15
    )
    assert ProxSparseConfig(lr=1.0, steps=4, warmup_ratio=0).lr_at(0) == 1
    assert ProxSparseConfig(lr=1.0, steps=4, warmup_ratio=1).lr_at(3) == 0.75
    published = ProxSparseConfig()
    assert [published.lr_at(step) for step in (0, 40, 220)] == pytest.approx([0, 1e-4, 5e-5])


def ids(samples=5, seqlen=12, seed=0):
    return torch.randint(0, 256, (samples, seqlen), generator=torch.Generator().manual_seed(seed))


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_bits(model, before):
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, value in before.items():
        integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[value.itemsize]
        assert torch.equal(after[name].view(integer), value.view(integer)), name


@pytest.fixture
def trained(monkeypatch):
    """|trained weights| of every layer, as `learn_masks` ranks them."""
    scores = []
    rank = training.keep_two_of_four

    def recorded(score):
        scores.append(score.clone())
        return rank(score)

    monkeypatch.setattr(training, "keep_two_of_four", recorded)
    return scores


def plain_training(model, batches, config):
    """The method written out: AdamW, schedule and clipping by hand, prox by iterating its stationary equation.

    Only for weights so small that the equation has one solution.
    """
    weights = [linear.weight for linear in maskable_linears(model).values()]
    originals = [weight.detach().clone() for weight in weights]
    first, second = ([torch.zeros_like(weight) for weight in weights] for _ in range(2))
    warmup = math.ceil(config.steps * config.warmup_ratio)
    for step, batch in enumerate(batches):
        logits = model(batch).logits[:, :-1].float()  # as transformers' own loss, in any dtype
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        gradients = list(torch.autograd.grad(loss, weights))
        for i, (weight, original) in enumerate(zip(weights, originals, strict=True)):
            scale = original + config.frozen_epsilon * torch.where(original < 0, -1.0, 1.0).double()
            w = weight.detach().clone().requires_grad_(True)
            penalty = config.frozen_lam * ((w / scale) * (w - original)).square().sum()
            gradients[i] = gradients[i] + torch.autograd.grad(penalty, w)[0]
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
        factor = min(1.0, config.max_grad_norm / (norm + 1e-6))
        lr = config.lr * (step / warmup if step < warmup else (config.steps - step) / (config.steps - warmup))
        with torch.no_grad():
            for weight, gradient, m, s in zip(weights, gradients, first, second, strict=True):
                gradient = gradient * factor
                m.mul_(0.9).add_(0.1 * gradient)
                s.mul_(0.999).add_(0.001 * gradient**2)
                corrected = m / (1 - 0.9 ** (step + 1)), s / (1 - 0.999 ** (step + 1))
                weight -= lr * corrected[0] / (corrected[1].sqrt() + 1e-8)
                z = weight.abs().reshape(-1, 4)
                assert config.lam * z.max() < 1 / 6
                w = z.clone()
                for _ in range(200):
                    a, b, c, d = w.unbind(1)
                    pairs = [b * c + c * d + d * b, a * c + c * d + d * a, a * b + b * d + d * a, a * b + b * c + c * a]
                    w = (z - config.lam * torch.stack(pairs, dim=1)).clamp(min=0)
                weight.copy_(w.reshape(weight.shape) * weight.sign())
    return [weight.detach().abs() for weight in weights]


@pytest.mark.parametrize("frozen_lam", [0.0, 0.5])
def test_learning_is_the_plain_loop(trained, frozen_lam):
    config = ProxSparseConfig(
        lam=1.0, lr=2e-3, steps=7, batch_size=2, warmup_ratio=0.3, max_grad_norm=0.5, frozen_lam=frozen_lam
    )
    model = build_tiny_model(dtype=torch.float64, **SMALL)
    before = snapshot(model)
    masks = learn_masks(model, ids(), config, progress=False)
    assert_bits(model, before)

    generator = torch.Generator().manual_seed(config.seed)
    order = torch.cat([torch.randperm(5, generator=generator) for _ in range(3)])[:14]
    reference = build_tiny_model(dtype=torch.float64, **SMALL)
    expected = plain_training(reference, ids()[order.reshape(7, 2)], config)
    dense = {name: linear.weight.abs() for name, linear in maskable_linears(model).items()}
    differs = 0
    for (name, keep), score, plain in zip(masks.items(), trained, expected, strict=True):
        assert torch.allclose(score, plain, rtol=1e-9, atol=1e-12)
        assert not torch.allclose(score, dense[name], rtol=1e-3, atol=1e-4)
        top = plain.reshape(-1, 4).topk(2, dim=1).indices
        by_rank = torch.zeros(plain.numel() // 4, 4, dtype=torch.bool).scatter_(1, top, True).reshape(plain.shape)
        assert torch.equal(keep, by_rank)
        top = dense[name].reshape(-1, 4).topk(2, dim=1).indices
        differs += int((keep.reshape(-1, 4).gather(1, top)).logical_not().sum())
    assert differs > 100  # magnitude of the original weights would have kept others


def test_large_lambda_leaves_two_of_four(trained, caplog):
    with caplog.at_level(logging.INFO, logger="patch.pruning.proxsparse"):
        learn_masks(build_tiny_model(**SMALL), ids(), ProxSparseConfig(lam=1e3, steps=2), progress=False)
    assert "0.0000 of the groups have more than two nonzeros after 2 steps" in caplog.text
    assert all((score.reshape(-1, 4) != 0).sum(1).max() <= 2 for score in trained)


def test_16_bit_models_have_master_weights(trained):
    model = build_tiny_model(dtype=torch.bfloat16, **SMALL)
    before = snapshot(model)
    learn_masks(model, ids(), ProxSparseConfig(lam=0.0, lr=1e-6, steps=3), progress=False)
    assert_bits(model, before)
    for score, linear in zip(trained, maskable_linears(model).values(), strict=True):
        moved = (score - linear.weight.float().abs()).abs()
        assert score.dtype == torch.float32
        # Adam's first steps are lr long; a bf16 weight of 0.02 would need 6e-5 to move at all.
        assert 0 < moved.max() < 3e-6 and (moved > 0).float().mean() > 0.5


def test_model_is_as_before(monkeypatch):
    model = build_tiny_model("opt", hidden_size=32, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=32)
    linears = maskable_linears(model)
    first, second = list(linears.values())[:2]
    with torch.no_grad():
        first.weight[0, :2] = torch.tensor([-0.0, 0.0])
    first.weight.grad = torch.ones_like(first.weight)
    second.weight.requires_grad_(False)
    model.eval()
    model.model.decoder.layers[1].train()
    model.config.use_cache = True
    before, state = snapshot(model), torch.get_rng_state()
    gradient = first.weight.grad
    modes = {name: module.training for name, module in model.named_modules()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    config = ProxSparseConfig(steps=3, lr=1e-3, grad_checkpoint=True)

    def check():
        assert_bits(model, before)
        assert first.weight.grad is gradient and second.weight.grad is None and (gradient == 1).all()
        assert modes == {name: module.training for name, module in model.named_modules()}
        assert flags == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        assert model.config.use_cache is True and keep_masks(model) == {}
        assert torch.equal(torch.get_rng_state(), state)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in linears.values())
        assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())

    learn_masks(model, ids(), config, device="cpu", progress=False)
    check()

    steps = 0

    def failing(v, lam):
        nonlocal steps
        steps += 1
        if steps > len(linears):
            raise KeyboardInterrupt
        return prox(v, lam)

    monkeypatch.setattr(training, "prox", failing)
    with pytest.raises(KeyboardInterrupt):
        learn_masks(model, ids(), config, progress=False)
    check()


def test_learning_is_a_function_of_the_seed():
    small = {"hidden_size": 32, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 32}
    model = build_tiny_model("opt", dropout=0.3, **small)

    def learn(**settings):
        config = ProxSparseConfig(**({"steps": 4, "lr": 5e-3, "lam": 1.0} | settings))
        return torch.cat([keep.flatten() for keep in learn_masks(model, ids(), config, progress=False).values()])

    first = learn()
    torch.rand(3)
    assert torch.equal(learn(), first)
    assert torch.equal(learn(grad_checkpoint=True), first)
    assert not torch.equal(learn(seed=1), first)
    assert not torch.equal(learn(lam=0.0), first)


def test_shared_weight_has_one_mask():
    model = build_tiny_model(**SMALL)
    first, second = model.model.layers[0].mlp, model.model.layers[1].mlp
    second.up_proj.weight = first.up_proj.weight
    before = snapshot(model)
    masks = learn_masks(model, ids(), ProxSparseConfig(steps=2), progress=False)
    assert torch.equal(masks["model.layers.0.mlp.up_proj"], masks["model.layers.1.mlp.up_proj"])
    assert_bits(model, before)


def test_prune_model_masks_the_original_weights():
    model = build_tiny_model(**SMALL)
    dense = snapshot(model)
    config = ProxSparseConfig(lam=1.0, lr=2e-3, steps=3)
    masks = prune_model(
        model, "prox_sparse", calibration=ids(), prox=config, exclude=["*.k_proj"], device="cpu", progress=False
    )
    expected = learn_masks(build_tiny_model(**SMALL), ids(), config, exclude=["*.k_proj"], progress=False)
    assert masks.keys() == keep_masks(model).keys() == expected.keys() and len(masks) == 12
    for name, keep in masks.items():
        assert torch.equal(keep, expected[name])
        assert torch.equal(model.get_submodule(name).weight, dense[f"{name}.weight"].masked_fill(~keep, 0))
        assert (keep.reshape(-1, 4).sum(1) == 2).all()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"lam": -1}, ValueError, "lam: expected a number >= 0, got -1. The default is 0.1"),
        ({"lam": math.inf}, ValueError, "lam: expected a finite number >= 0, got inf"),
        ({"lam": "1"}, ValueError, "got '1'"),
        ({"lam": True}, ValueError, "got True"),
        ({"frozen_lam": math.nan}, ValueError, "frozen_lam: expected a finite number >= 0, got nan"),
        ({"lr": 0}, ValueError, "lr: expected a number > 0, got 0. The default is 0.0001"),
        ({"max_grad_norm": 0.0}, ValueError, "max_grad_norm: expected a number > 0, got 0.0"),
        ({"frozen_epsilon": 0}, ValueError, "frozen_epsilon: expected a number > 0, got 0"),
        ({"warmup_ratio": 1.5}, ValueError, "warmup_ratio: expected a number from 0 to 1, got 1.5"),
        ({"steps": 0}, ValueError, "steps: expected an integer >= 1, got 0. The default is 400"),
        ({"batch_size": 1.0}, ValueError, "batch_size: expected an integer >= 1, got 1.0"),
        ({"seed": -1}, ValueError, "seed: expected an integer from 0 to 4294967295, got -1. The default is 42"),
        ({"grad_checkpoint": 1}, ValueError, "grad_checkpoint: expected true or false, got 1. The default is False"),
    ],
)
def test_settings_are_checked(settings, error, message):
    with pytest.raises(error, match=message):
        ProxSparseConfig(**settings)


def test_operators_refuse_other_input():
    with pytest.raises(TypeError, match=r"prox, v: expected torch.float16 or .* got torch.int64 \(4,\)"):
        prox(torch.ones(4, dtype=torch.int64), 0.1)
    with pytest.raises(TypeError, match=r"got list. Convert it"):
        prox([1.0, 2.0, 3.0, 4.0], 0.1)
    with pytest.raises(ValueError, match=r"prox, last dimension: expected a multiple of 4, got 6. Pad"):
        prox(torch.ones(2, 6), 0.1)
    with pytest.raises(ValueError, match=r"regularizer: expected a tensor \(..., K\), got torch.float32 \(\)"):
        regularizer(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"lam: expected a number >= 0, got -0.1"):
        prox(torch.ones(4), -0.1)


BAD_RUNS = {
    "config": ({"config": {"lam": 1}}, TypeError, "config: expected a ProxSparseConfig, got dict. Make one"),
    "one token": (
        {"calibration": ids(seqlen=1)},
        ValueError,
        "calibration: expected samples of 2 (or more|to .*) tokens.*, got 1",
    ),
    "no ids": ({"calibration": None}, TypeError, "got NoneType. Pass token windows"),
    "exclude": ({"exclude": ["*.nothing"]}, ValueError, "matches none"),
    "device": ({"device": "gpu"}, ValueError, "got 'gpu'"),
    "fp16": (
        {"model": {"dtype": torch.float16}},
        ValueError,
        "layer 'model.layers.0.self_attn.q_proj': expected float32, bfloat16 .* got torch.float16, .*dtype=torch.bfl",
    ),
    "width": (
        {"model": {"intermediate_size": 50}},
        ValueError,
        "down_proj', in_features for pattern 2:4: expected a multiple of 4, got 50",
    ),
}


@pytest.mark.parametrize("name", BAD_RUNS)
def test_bad_input_is_refused_before_any_work(name):
    arguments, error, message = BAD_RUNS[name]
    arguments = dict(arguments)
    model = build_tiny_model(**(SMALL | arguments.pop("model", {})))
    model.forward = None  # must not be run
    calibration = arguments.pop("calibration", ids())
    with pytest.raises(error, match=message):
        learn_masks(model, calibration, progress=False, **arguments)


def test_prune_functions_refuse_what_the_method_cannot_do():
    model = build_tiny_model(**SMALL)
    with pytest.raises(ValueError, match=r"pattern: expected 2:4 for method ProxSparse, got unstructured. Use w"):
        prune_model(model, "prox_sparse", calibration=ids(), pattern="unstructured")
    with pytest.raises(ValueError, match=r"sparsity: expected 0.5 for pattern 2:4"):
        prune_model(model, "prox_sparse", calibration=ids(), sparsity=0.3)
    with pytest.raises(ValueError, match="calibration: expected token ids for method 'prox_sparse', got none"):
        prune_model(model, "prox_sparse")
    with pytest.raises(ValueError, match="prox: expected None for method 'wanda', got settings of prox_sparse"):
        prune_model(model, "wanda", calibration=ids(), prox=ProxSparseConfig())
    with pytest.raises(ValueError, match=r"single weight \(magnitude, .*got 'prox_sparse'.*prune_model"):
        prune_weight(torch.ones(4, 8), "prox_sparse")


def test_loss_that_is_not_finite_is_said():
    model = build_tiny_model(**SMALL)
    # Not in the weights, where it would be refused before any work.
    model.model.embed_tokens.register_forward_hook(lambda _, __, output: output * math.nan)
    before = snapshot(model)
    with pytest.raises(
        FloatingPointError, match=r"ProxSparse, loss of step 1: expected finite values, got nan. The model's weights"
    ):
        learn_masks(model, ids()[:1], progress=False)
    assert_bits(model, before)


def test_gradient_that_is_not_finite_is_said():
    model = build_tiny_model(**SMALL)
    calls = []

    def poison(module, args, output):
        calls.append(1)
        if len(calls) == 3:
            output.register_hook(lambda gradient: gradient * math.inf)

    handle = model.model.norm.register_forward_hook(poison)
    before = snapshot(model)
    with pytest.raises(
        FloatingPointError, match=r"ProxSparse, gradient of step 3: expected finite values, got (nan|inf)"
    ):
        learn_masks(model, ids(), ProxSparseConfig(steps=5), progress=False)
    handle.remove()
    assert_bits(model, before)


def test_layer_that_is_never_called_is_named():
    model = build_tiny_model(**SMALL)
    model.model.layers[1].spare = nn.Linear(32, 32)
    with pytest.raises(ValueError, match=r"layer 'model.layers.1.spare': expected to see calibration inputs, got none"):
        learn_masks(model, ids(), ProxSparseConfig(steps=1), progress=False)
    assert len(learn_masks(model, ids(), ProxSparseConfig(steps=1), exclude=["*.spare"], progress=False)) == 14


PROX = {"lam": 1.0, "lr": 2e-3, "steps": 3}


def test_prepare_pruned_model(tmp_path, tokenizer, text_file):
    arguments = {"prune_method": "prox_sparse", "nsamples": 4, "calibration_dataset": str(text_file)}
    arguments["prox_sparse"] = PROX

    def model():
        model = build_tiny_model(**SMALL)
        model.seqlen = 24
        return model

    pruned = prepare_pruned_model(model(), tokenizer, tmp_path / "c", arguments, (16, 16), 0.35)
    masks = keep_masks(pruned)
    from patch.data.tokens import calibration_windows

    calibration, _ = calibration_windows(tokenizer, str(text_file), nsamples=4, seqlen=24, seed=0)
    expected = learn_masks(model(), calibration, ProxSparseConfig(**PROX), progress=False)
    assert all(torch.equal(masks[name], keep) for name, keep in expected.items())
    # ProxSparse has no unstructured form: wanda gives the scores.
    reference = prune_model(model(), "wanda", pattern="unstructured", sparsity=0.35, calibration=calibration)
    for name, keep in reference.items():
        assert torch.equal(pruned.get_submodule(name).distribution_scores, tile_scores(keep, (16, 16)))
    assert load_artifact(tmp_path / "c").meta["prox_sparse"]["lam"] == 1.0

    again = prepare_pruned_model(model(), tokenizer, tmp_path / "c", arguments, (16, 16), 0.35)
    for other in (again, load_compressed_model(model(), (16, 16), tmp_path / "c")):
        assert all(torch.equal(keep, masks[name]) for name, keep in keep_masks(other).items())
    with pytest.raises(ValueError, match="expected prox_sparse = "):
        prepare_pruned_model(
            model(), tokenizer, tmp_path / "c", arguments | {"prox_sparse": PROX | {"lam": 2.0}}, (16, 16), 0.35
        )


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        (
            {"sparsity_type": "unstructured"},
            ValueError,
            "sparsity_type: expected 2:4 for method ProxSparse, .*got unst",
        ),
        ({"prox_sparse": 0.1}, ValueError, "prox_sparse: expected a dict of settings, or ProxSparseConfig, got 0.1"),
        ({"prox_sparse": {"lamb": 1}}, ValueError, "got 'prox_sparse.lamb'. Did you mean 'prox_sparse.lam'"),
        ({"prox_sparse": {"lam": -1.0}}, ValueError, "prox_sparse.lam: expected a number >= 0, got -1.0"),
        ({"prune_method": "wanda", "prox_sparse": PROX}, ValueError, "only with prune_method 'prox_sparse', got"),
    ],
)
def test_prune_args_are_checked(tmp_path, tokenizer, text_file, args, error, message):
    arguments = {"prune_method": "prox_sparse", "calibration_dataset": str(text_file)} | args
    with pytest.raises(error, match=message):
        prepare_pruned_model(build_tiny_model(**SMALL), tokenizer, tmp_path / "c", arguments, (16, 16), 0.35)
    assert not (tmp_path / "c").exists()


def test_prepare_pruned_model_refuses_before_the_reference(tmp_path, tokenizer, text_file, monkeypatch):
    for work in ("reference_tile_scores", "prune_model"):
        monkeypatch.setattr(f"patch.published.prepare.{work}", lambda *args, **kwargs: pytest.fail("work was done"))
    model = build_tiny_model(**SMALL, dtype=torch.float16)
    model.seqlen = 24
    arguments = {"prune_method": "prox_sparse", "calibration_dataset": str(text_file), "nsamples": 2}
    with pytest.raises(
        ValueError, match=r"q_proj': expected float32, bfloat16 .* got torch.float16, in which gradients overflow"
    ):
        prepare_pruned_model(model, tokenizer, tmp_path / "c", arguments, (16, 16), 0.35)


@pytest.fixture
def folder(tmp_path, text_file):
    build_tiny_model(**SMALL).save_pretrained(tmp_path / "model")
    build_byte_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path


def command(folder, *flags):
    shared = ["--model", folder / "model"]
    if "magnitude" not in flags:
        shared += ["--data", folder / "corpus.txt", "--seqlen", 24]
    return cli.main([str(item) for item in ["prune", *shared, *flags]])


def test_the_plan_is_said_before_training(capsys):
    model = build_tiny_model(**SMALL)
    weights = sum(linear.weight.numel() for linear in maskable_linears(model).values())
    learn_masks(model, ids(), ProxSparseConfig(steps=2, batch_size=2))
    samples, seqlen = ids().shape
    assert capsys.readouterr().err == (
        "learning the masks of 14 layers with prox_sparse: 2 steps, each of 2 of "
        f"{samples} samples of {seqlen} tokens ({samples * seqlen} tokens); "
        f"{weights * 20 / 1e9:.1f} GB for the weights in training, and the activations of a step\n"
    )


def test_command(folder, capsys):
    flags = ["--method", "prox_sparse", "--prox-lambda", 1.0, "--prox-lr", 2e-3, "--prox-steps", 3]
    flags += ["--set", "prox.batch_size=2", "--target-sparsity", 0.35, "--tile", "16,16"]
    assert command(folder, *flags, "--out", folder / "a") == 0
    assert "pruned 14 layers with prox_sparse\nsparsity 0.5000" in capsys.readouterr().out
    artifact = load_artifact(folder / "a", model=build_tiny_model(**SMALL))
    assert artifact.meta["nsamples"] == 400 and not artifact.weights and len(artifact.tile_scores) == 14
    assert artifact.meta["prox"] == {**ProxSparseConfig(**PROX, batch_size=2).__dict__}
    # The resolved configuration says it all.
    resolved = folder / "a" / "config.resolved.yaml"
    assert cli.main(["prune", "--config", str(resolved), "--out", str(folder / "b")]) == 0
    again = load_artifact(folder / "b").masks
    assert all(torch.equal(again[name], keep) for name, keep in artifact.masks.items())


def test_command_refuses_before_it_scores_tiles(folder, capsys, monkeypatch):
    scoring = "patch.pruning.tile_scores.reference_tile_scores"
    monkeypatch.setattr(scoring, lambda *args, **kwargs: pytest.fail("tiles were scored"))
    flags = ["--target-sparsity", 0.35, "--tile", "16,16", "--out", folder / "o"]
    assert command(folder, "--method", "prox_sparse", "--nsamples", 2, "--dtype", "float16", *flags) == 2
    assert "got torch.float16, in which gradients overflow" in capsys.readouterr().err
    build_tiny_model(**SMALL | {"intermediate_size": 50}).save_pretrained(folder / "model")
    for method in ("magnitude", "wanda"):
        assert command(folder, "--method", method, *flags) == 2
        assert "down_proj', in_features for pattern 2:4: expected a multiple of 4, got 50" in capsys.readouterr().err


def test_repeating_a_run_replaces_nothing(folder, capsys):
    flags = ["--method", "magnitude", "--out", folder / "a"]
    assert command(folder, *flags) == 0
    assert command(folder, *flags, "--overwrite") == 0
    capsys.readouterr()
    assert cli.main(["prune", "--config", str(folder / "a" / "config.resolved.yaml")]) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "wanda", "--prox-lambda", "1"], "prox: expected no settings with method wanda, got lam."),
        (["--method", "prox_sparse", "--prox-lambda", "many"], "--prox-lambda: expected a number >= 0, got 'many'"),
        (["--method", "prox_sparse", "--prox-lambda", "-1"], "--prox-lambda: expected a number >= 0, got -1"),
        (["--method", "prox_sparse", "--set", "prox.lamda=1"], "got 'prox.lamda'. Did you mean 'prox.lam'?"),
        (
            ["--method", "prox_sparse", "--pattern", "unstructured"],
            "pattern: expected 2:4 for method ProxSparse, got unstructured. Use wanda",
        ),
    ],
)
def test_command_refuses(folder, capsys, flags, message):
    assert command(folder, *flags, "--out", folder / "o") == 2
    assert message in capsys.readouterr().err
    assert not (folder / "o").exists()
