"""ProjectionGroup: one op call for layers that are called with one x; exact, and off where that is not so."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections import Counter

import pytest
import torch
from support.strategies import hybrid_mask
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from patch_kernels import TiledLinear
from patch_kernels.projection_group import ProjectionGroup

ONE, GROUP = "patch_kernels.tile_linear.default", "patch_kernels.tile_linear_group3.default"


class Calls(TorchDispatchMode):
    """Counts the calls of our ops inside the block."""

    def __enter__(self):
        self.counts = Counter()
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "patch_kernels":
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


class Projections(nn.Module):
    """Three packed layers, as q, k and v of attention."""

    def __init__(self, bias=True):
        super().__init__()
        for seed, (name, rows) in enumerate({"q": 130, "k": 64, "v": 64}.items()):
            torch.manual_seed(seed)
            linear = nn.Linear(260, rows, bias=bias, dtype=torch.bfloat16)
            setattr(self, name, TiledLinear.from_linear(linear, *hybrid_mask(rows, 260, 0.5, torch.default_generator)))

    def forward(self, x):
        return self.q(x), self.k(x), self.v(x)


@pytest.fixture
def alone():
    return Projections()


@pytest.fixture
def fused(alone):
    """The same layers after a round that the group has seen."""
    fused = with_group(copy.deepcopy(alone))
    with torch.no_grad():
        fused(some_x())
    assert calls(fused) == {GROUP: 1}
    return fused


def with_group(model):
    group = ProjectionGroup(3)
    for layer in model.children():
        layer.group = group
    return model


def some_x(tokens=3, seed=0):
    return torch.randn(tokens, 260, generator=torch.Generator().manual_seed(seed)).bfloat16()


@torch.no_grad()
def calls(model, x=None):
    with Calls() as counted:
        model(some_x() if x is None else x)
    return counted.counts


def groups(model):
    return {layer.group for layer in model.children()} - {None}


@pytest.mark.parametrize("shape", [(1, 260), (7, 260), (2, 3, 260), (260,), (0, 260), (64, 260)])
def test_results_are_those_of_the_layers_alone(alone, fused, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.no_grad():
        for _ in range(2):
            assert all(map(torch.equal, fused(x), alone(x)))
    assert calls(fused, x) == {GROUP: 1}


def test_many_tokens_are_computed_layer_by_layer(fused):
    assert calls(fused, some_x(65)) == {ONE: 3}
    assert calls(fused, some_x(64)) == {GROUP: 1}


def test_nothing_is_kept_after_the_last_result(fused):
    x = some_x()
    with torch.no_grad():
        results = fused(x)
    kept = [weakref.ref(tensor) for tensor in (x, *results)]
    del x, results
    assert [ref() for ref in kept] == [None] * 4


def test_an_x_that_is_changed_between_two_calls_is_computed_anew(alone, fused):
    x = some_x()
    with torch.no_grad():
        q = fused.q(x)
        before = x.clone()
        x.mul_(2)
        assert torch.equal(fused.k(x), alone.k(x)) and torch.equal(fused.v(x), alone.v(x))
        assert torch.equal(q, alone.q(before))
    assert calls(fused) == {ONE: 3}  # the group is over


@pytest.mark.parametrize("change", ["bias", "weight", "load", "other"])
def test_a_layer_that_is_changed_between_two_calls_is_computed_anew(fused, change):
    x = some_x()
    k = fused.k
    other = TiledLinear.from_linear(nn.Linear(260, 64).bfloat16(), *hybrid_mask(64, 260, 0.5, torch.default_generator))
    with torch.no_grad():
        fused.q(x)
        if change == "bias":
            k.bias.add_(1)
        elif change == "weight":
            k.weight.zero_()
        elif change == "load":
            k.load_state_dict(k.state_dict() | {"bias": torch.ones(64)})
        else:
            k._buffers.update(weight=other.weight, tile_is_sparse=other.tile_is_sparse)
        y = k(x)
        k.group = None
        assert torch.equal(y, k(x))


def test_layers_that_see_other_tensors_pay_at_most_once(fused):
    """As in cross attention: first never together, then together and no more."""
    model, other = with_group(Projections()), some_x(seed=2)
    with torch.no_grad(), Calls() as counted:
        for _ in range(40):
            x = some_x()
            model.q(x), model.k(other), model.v(other)
    assert counted.counts == {ONE: 120} and not groups(model)
    with torch.no_grad(), Calls() as counted:
        for _ in range(10):
            x = some_x()
            fused.q(x), fused.k(other), fused.v(other)
    assert counted.counts == {GROUP: 1, ONE: 29} and not groups(fused)


def test_a_layer_that_is_not_called_ends_the_group(alone, fused):
    with torch.no_grad(), Calls() as counted:
        for seed in range(5):
            x = some_x(seed=seed)
            assert torch.equal(fused.q(x), alone.q(x)) and torch.equal(fused.k(x), alone.k(x))
    assert counted.counts == {GROUP: 1, ONE: 8 + 10}
    assert all(group.is_over and group._stash is None for group in groups(fused))


def test_the_order_of_the_calls_is_learned(alone):
    model = with_group(copy.deepcopy(alone))
    x = some_x()
    with torch.no_grad():
        model.v(x), model.q(x), model.k(x)
        with Calls() as counted:
            results = model.v(x), model.q(x), model.k(x)
    assert counted.counts == {GROUP: 1}
    assert all(map(torch.equal, results, (alone.v(x), alone.q(x), alone.k(x))))


def test_hooks_see_their_own_layer(alone, fused):
    seen = []
    for name, layer in fused.named_children():
        layer.register_forward_hook(lambda layer, args, y, name=name: seen.append((name, y.clone())))
    fused.q.register_forward_hook(lambda layer, args, y: y.zero_())
    x = some_x()
    with torch.no_grad():
        q = fused(x)[0]
    assert not q.any() and [name for name, _ in seen] == ["q", "k", "v"]
    assert all(torch.equal(y, alone.get_submodule(name)(x)) for name, y in seen)
    fused.k.register_forward_pre_hook(lambda layer, args: (args[0] + 1,))
    with torch.no_grad():
        assert torch.equal(fused(x)[1], alone.k(x + 1))


def test_gradients_go_layer_by_layer(alone, fused):
    x, y = some_x().requires_grad_(), some_x().requires_grad_()
    sum(result.sum() for result in fused(x)).backward()
    sum(result.sum() for result in alone(y)).backward()
    assert torch.equal(x.grad, y.grad)
    fused.k.bias.requires_grad_()
    assert fused(some_x())[1].requires_grad
    fused.k.bias.requires_grad_(False)
    assert all(map(torch.equal, fused(some_x()), alone(some_x())))


def test_inference_mode_goes_layer_by_layer(alone, fused):
    expected = alone(some_x())
    with torch.inference_mode(), Calls() as counted:
        for x in (some_x(), some_x().clone()):
            assert all(map(torch.equal, fused(x), expected))
    with torch.no_grad(), Calls() as outside:
        assert all(map(torch.equal, fused(x), expected))
    assert counted.counts == {ONE: 6} and outside.counts == {ONE: 3}
    assert calls(fused) == {GROUP: 1}
    with torch.inference_mode():
        model = with_group(Projections())  # its tensors count no changes
    with torch.no_grad():
        for _ in range(3):
            assert all(map(torch.equal, model(some_x()), expected))
    assert not groups(model)


def test_layers_that_differ_end_the_group(alone, fused):
    fused.v.batch_invariant = True
    assert calls(fused) == {ONE: 3}
    fused = with_group(copy.deepcopy(alone))
    assert calls(fused) == {ONE: 3} and calls(fused) == {GROUP: 1}
    fused.v.weight = fused.v.weight.to("meta")  # offloaded until it is called
    with torch.no_grad():
        assert torch.equal(fused.q(some_x()), alone.q(some_x())) and torch.equal(fused.k(some_x()), alone.k(some_x()))


def test_a_layer_that_the_op_refuses_says_so_itself(alone, fused):
    fused.v.bias = nn.Parameter(torch.zeros(64), requires_grad=False)
    x = some_x()
    with torch.no_grad():
        assert torch.equal(fused.q(x), alone.q(x)) and torch.equal(fused.k(x), alone.k(x))
        with pytest.raises(RuntimeError, match="tile_linear: bias must have x's dtype"):
            fused.v(x)


def test_copies_have_groups_of_their_own(alone, fused):
    x = some_x()
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert len(groups(other)) == 1 and groups(other) != groups(fused)
        assert calls(other) == {ONE: 3} and calls(other) == {GROUP: 1}
        with torch.no_grad():
            assert all(map(torch.equal, other(x), alone(x)))
    single = copy.deepcopy(fused.k)
    size = len(pickle.dumps(fused.k))
    assert size < len(pickle.dumps(fused)) / 2  # brings no other layer along
    with torch.no_grad():
        assert torch.equal(single(x), alone.k(x))
    assert calls(fused) == {GROUP: 1}


def test_a_model_that_is_gone_frees_its_layers():
    gc.disable()
    try:
        model = with_group(Projections())
        payload = weakref.ref(model.k.weight)
        calls(model), calls(model)
        del model
        assert payload() is None
    finally:
        gc.enable()


def test_threads_get_right_results(alone, fused):
    inputs = [some_x(seed=seed) for seed in range(4)]
    with torch.no_grad():
        expected = [alone(x) for x in inputs]
    wrong = []

    @torch.no_grad()
    def work(model, x, y):
        for _ in range(50):
            if model.q.group is None:
                with_group(model)  # it ended when threads met
            if not all(map(torch.equal, model(x), y)):
                wrong.append(x)

    for which in ((0, 1, 2, 3), (0, 0, 0, 0)):
        model = copy.deepcopy(fused)
        calls(model)
        threads = [threading.Thread(target=work, args=(model, inputs[i], expected[i])) for i in which]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_a_result_is_handed_out_once(fused):
    x = some_x()
    with torch.no_grad():
        fused.q(x)
        first, second = fused.k(x), fused.k(x)
    assert first is not second and torch.equal(first, second)


def test_compiled_models_go_layer_by_layer(alone, fused):
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for tokens in (3, 1):
            assert all(map(torch.equal, compiled(some_x(tokens)), alone(some_x(tokens))))
    assert calls(fused) == {GROUP: 1}


def test_functional_call_is_seen(alone, fused):
    """It puts other tensors in place of the layers' own while it runs."""
    state = {name: tensor + 1 for name, tensor in alone.named_parameters()}
    with torch.no_grad():
        got = torch.func.functional_call(fused, state, (some_x(),))
        expected = torch.func.functional_call(alone, state, (some_x(),))
    assert all(map(torch.equal, got, expected))
