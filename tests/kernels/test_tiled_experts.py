"""TiledExperts: packing one matrix at a time, state, the schedule that follows the flags, refusing bad input."""

from __future__ import annotations

import copy

import pytest
import torch
from support.experts_case import experts_case, real_numbers, whole_numbers
from support.strategies import hybrid_mask

from patch_kernels import TiledExperts, TiledWeight, payload_bytes, reference
from patch_kernels.ops import tile_experts, tile_linear


def matrices(count, shape=(130, 132), dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(count)
    masks = [hybrid_mask(*shape, 0.5, generator) for _ in range(count)]
    return [real_numbers(generator, dtype, *shape) for _ in masks], *map(list, zip(*masks, strict=True))


def test_pack_puts_one_matrix_after_another():
    weights, keeps, flags = matrices(6)
    bias = torch.randn(3, 260).bfloat16()
    packed = TiledExperts.pack(weights, keeps, flags, bias, parts=2)
    assert (packed.experts, packed.parts, packed.in_features, packed.out_features) == (3, 2, 132, 130)
    singles = [TiledWeight.pack(*one) for one in zip(weights, keeps, flags, strict=True)]
    assert torch.equal(packed.payload, torch.cat([single.payload for single in singles]))
    assert packed.tile_is_sparse.dtype == torch.uint8 and torch.equal(packed.tile_is_sparse.bool(), torch.stack(flags))
    assert torch.equal(packed.bias, bias) and packed.bias is not bias and not packed.bias.requires_grad
    for expert in range(3):
        for part in range(2):
            view, single = packed.tiled_weight(expert, part), singles[2 * expert + part]
            assert view.payload.untyped_storage().data_ptr() == packed.weight.untyped_storage().data_ptr()
            assert torch.equal(view.unpack(), single.unpack()) and torch.equal(view.schedule, single.schedule)
            assert (view.shape, view.dtype) == ((130, 132), torch.bfloat16)
    assert repr(packed) == (
        "TiledExperts(experts=3, parts=2, in_features=132, out_features=130, bias=True, dtype=torch.bfloat16, "
        f"payload_bytes={payload_bytes(packed.tile_is_sparse)})"
    )


def test_pack_takes_one_matrix_at_a_time():
    weights, keeps, flags = matrices(4)
    taken = []

    def each(name, values):
        for index, value in enumerate(values):
            taken.append((name, index))
            yield value

    packed = TiledExperts.pack(each("weight", weights), each("keep", keeps), each("flags", flags))
    assert taken[:4] == [("flags", index) for index in range(4)]
    assert taken[4:] == [(name, index) for index in range(4) for name in ("weight", "keep")]
    assert packed.parts == 1 and packed.bias is None
    assert packed.weight.untyped_storage().nbytes() == packed.weight.numel() == payload_bytes(torch.stack(flags))


def test_state_and_copies():
    case = experts_case(3, 2, (130, 132))
    packed = case.packed
    assert set(packed.state_dict()) == {"weight", "tile_is_sparse", "bias"}
    x, experts = (
        whole_numbers(torch.Generator().manual_seed(1), torch.bfloat16, 3, 132),
        torch.tensor([0, 2, 2, 1, 0, 1]),
    )
    expected = packed(x, experts)
    other = TiledExperts(3, 2, 132, 130, True, payload_bytes=packed.payload.numel())
    other.load_state_dict(packed.state_dict())
    assert torch.equal(other(x, experts), expected)
    assert torch.equal(copy.deepcopy(packed)(x, experts), expected)
    twice = {"bias": 2 * packed.bias}
    assert torch.equal(
        torch.func.functional_call(packed, twice, (x, experts)),
        reference.tile_experts(x, experts, case.dense, 2 * case.bias),
    )
    with torch.inference_mode():
        assert torch.equal(packed(x, experts), expected)


def test_a_new_module_holds_zeros():
    empty = TiledExperts(2, 1, 132, 130, False)
    assert empty.weight.numel() == 2 * 4 * 32768 and empty.tile_is_sparse.shape == (2, 2, 2)
    y = empty(torch.ones(2, 132).bfloat16(), torch.tensor([1, 0]))
    assert y.shape == (2, 130) and not y.any()


def test_schedules_and_begins_follow_the_flags():
    packed = experts_case(3, 2, (200, 300)).packed
    flags = packed.tile_is_sparse
    assert torch.equal(packed.schedule, torch.stack([tile_linear.make_schedule(matrix) for matrix in flags]))
    assert torch.equal(packed._begins, tile_experts.matrix_begins(flags))
    assert "schedule" not in packed.state_dict()
    other = TiledExperts(3, 2, 300, 200, True, payload_bytes=packed.payload.numel())
    other.load_state_dict(packed.state_dict())
    assert other.tiled_weight(1, 1).schedule is None  # made when it is needed
    other.refresh_schedule()
    assert torch.equal(other.tiled_weight(1, 1).schedule, packed.schedule[3])
    assert torch.equal(other._begins, packed._begins)
    other.tile_is_sparse = torch.zeros_like(flags)
    assert other.tiled_weight(0, 0).schedule is None


@pytest.mark.parametrize("strict", [True, False])
def test_a_layer_on_a_fake_card_is_exported_with_its_schedule(strict):
    """No check of the card's kernels: there may be none."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        layer = TiledExperts(3, 2, 384, 256, False, device="cuda")
        x = torch.empty(4, 384, dtype=torch.bfloat16, device="cuda")
        experts = torch.empty(8, dtype=torch.int64, device="cuda")
        assert (layer(x, experts).shape, layer(x, experts).device.type) == ((8, 512), "cuda")
        nodes = torch.export.export(layer, (x, experts), strict=strict).graph.nodes
    calls = [node for node in nodes if node.op == "call_function" and "tile_experts" in str(node.target)]
    assert [node.target for node in calls] == [torch.ops.patch_kernels.tile_experts.default]
    assert calls[0].args[4] is not None and calls[0].args[5] is not None


WEIGHTS, KEEPS, FLAGS = matrices(4)
PACKED = TiledExperts.pack(WEIGHTS, KEEPS, FLAGS, parts=2)
X, EXPERTS = torch.zeros(2, 132).bfloat16(), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: TiledExperts(0, 1, 132, 130, True),
            "TiledExperts, experts: expected a number >= 1, got 0. Pass those",
        ),
        (lambda: TiledExperts(1, 0, 132, 130, True), "TiledExperts, parts: expected a number >= 1, got 0"),
        (
            lambda: TiledExperts(1, 1, 0, 130, True),
            r"weight shape \(N, K\): expected two integers >= 1, got \(130, 0\)",
        ),
        (
            lambda: TiledExperts(1, 1, 132, 130, True, dtype=torch.float32),
            "TiledExperts: expected dtype float16 or bfloat16, got torch.float32",
        ),
        (
            lambda: TiledExperts(2, 1, 128, 128, True, payload_bytes=7),
            r"TiledExperts: expected payload_bytes between 36864 \(all 2 tiles sparse\) and 65536 .* got 7",
        ),
        (
            lambda: PACKED(X.half(), EXPERTS),
            r"TiledExperts, x: expected torch.bfloat16 \(T, 132\), got torch.float16 \(2, 132\). Convert x, or pack",
        ),
        (lambda: PACKED(X[:, :131], EXPERTS), r"TiledExperts, x: expected torch.bfloat16 \(T, 132\), got .*\(2, 131\)"),
        (lambda: PACKED(X[None], EXPERTS), r"x: expected torch.bfloat16 \(T, 132\), got torch.bfloat16 \(1, 2, 132\)"),
        (lambda: PACKED(None, EXPERTS), r"x: expected torch.bfloat16 \(T, 132\), got NoneType"),
        (lambda: PACKED(X, None), "tile_experts, experts: expected torch.int64, got NoneType"),
        (lambda: PACKED.tiled_weight(2), "tiled_weight, expert: expected a number >= 0 and < 2, got 2"),
        (lambda: PACKED.tiled_weight(0, -1), "tiled_weight, part: expected a number >= 0 and < 2, got -1"),
        (
            lambda: TiledExperts.pack([], [], []),
            "TiledExperts.pack, number of tile_flags: expected at least 1, got 0. Pass those of all parts",
        ),
        (
            lambda: TiledExperts.pack(WEIGHTS[:3], KEEPS[:3], FLAGS[:3], parts=2),
            "TiledExperts.pack, number of tile_flags: expected a multiple of parts = 2, got 3. Pass those of all parts",
        ),
        (
            lambda: TiledExperts.pack(WEIGHTS, KEEPS[:3], FLAGS),
            "expected weight, keep mask and tile flags of each of 4 matrices, got too few or too many from matrix 3",
        ),
        (
            lambda: TiledExperts.pack(WEIGHTS, KEEPS, FLAGS[:2]),
            "tile flags of each of 2 matrices, got too few or too many from matrix 2 on. Pass as many of each",
        ),
        (
            lambda: TiledExperts.pack([WEIGHTS[0], WEIGHTS[1][:129]], KEEPS[:2], FLAGS[:2]),
            r"TiledExperts.pack, matrix 1: expected torch.bfloat16 \(130, 132\), got .* \(129, 132\). Matrices",
        ),
        (
            lambda: TiledExperts.pack([WEIGHTS[0], WEIGHTS[1].half()], KEEPS[:2], FLAGS[:2]),
            r"TiledExperts.pack, matrix 1: expected torch.bfloat16 \(130, 132\), got torch.float16",
        ),
        (
            lambda: TiledExperts.pack([WEIGHTS[0][0]], KEEPS[:1], FLAGS[:1]),
            r"TiledExperts.pack, matrix 0: expected a tensor \(N, K\), got torch.bfloat16 \(132,\). Pass weight",
        ),
        (
            lambda: TiledExperts.pack(WEIGHTS, KEEPS, FLAGS, torch.zeros(4, 129).bfloat16()),
            r"TiledExperts.pack, bias: expected torch.bfloat16 \(4, 130\), got torch.bfloat16 \(4, 129\). Stack them",
        ),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_payload_of_another_size_than_the_flags_say():
    """A GPU does not count them in its call."""

    class OnCard(torch.Tensor):
        is_cuda = True

    layer = copy.deepcopy(PACKED)
    layer.refresh_schedule()
    weight = layer.weight[:-1].as_subclass(OnCard)
    with pytest.raises(
        ValueError, match=r"TiledExperts, weight: expected \d+ bytes, as its tile flags say, got \d+. Load"
    ):
        layer.current_schedule(weight, layer.tile_is_sparse)
