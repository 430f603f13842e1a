"""What a packed model runs in another way: packed layers that are called with one x in one op call, and its output head
at the memory's speed (patch_kernels)."""

from __future__ import annotations

from torch import nn

from patch.packed.swap import packed_layers
from patch_kernels import StreamedLinear, TiledLinear
from patch_kernels.projection_group import ProjectionGroup

# Names beside each other in modules of transformers' language models. What is not called with one x after all ends its
# group itself, so a name too many costs a few looks.
PROJECTIONS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("q_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkvz", "in_proj_ba"),
    ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)


def fuse_projections(model: nn.Module) -> int:
    """Let packed layers that are called with one x be computed together; returns the number of groups.

    pack_model and loading do it. Results and names stay as they are: the layers remain modules with their own weights
    and hooks. Calls with more than 64 tokens, with gradients, under torch.compile and in inference mode are computed
    layer by layer. Groups that there were begin anew.
    """
    unfuse_projections(model)
    groups = 0
    for module in model.modules():
        for names in PROJECTIONS:
            children = [module._modules.get(name) for name in names]
            layers = [child for child in children if isinstance(child, TiledLinear)]
            if len(layers) == len(names):
                group = ProjectionGroup(len(names))
                for layer in layers:
                    layer.group = group
                groups += 1
    return groups


def stream_head(model: nn.Module) -> bool:
    """Let the output head be read at the memory's speed for a few tokens on a CPU; returns whether it is now.

    pack_model and loading do it: of a small model the head is a large part of what a token reads. The module, its name
    and its weight, tied or not, stay the same.
    """
    head = _head(model)
    if type(head) is nn.Linear:
        StreamedLinear.of_linear(head)
    return isinstance(head, StreamedLinear)


def unstream_head(model: nn.Module) -> None:
    """Let torch compute the output head again."""
    head = _head(model)
    if head is not None:
        StreamedLinear.to_linear(head)


def _head(model: nn.Module) -> nn.Linear | None:
    """The output head of a transformers model."""
    find = getattr(model, "get_output_embeddings", None)
    head = None if find is None else find()
    return head if isinstance(head, nn.Linear) else None


def unfuse_projections(model: nn.Module) -> None:
    """Let every packed layer be computed for itself again."""
    for _, layer in packed_layers(model):
        layer.group = None
