"""Which layers of a model PATCH may mask.

Layers are found by structure (`nn.Linear` inside the decoder's repeated blocks), not by architecture name, so a new
family of transformers needs no entry here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import nn

from patch.files.schema import nearest
from patch.models.mixtures import open_mixtures
from patch.models.stay_dense import directly_read_linears, is_plain_linear, router_linears, unknown_experts
from patch_kernels import TiledExperts, TiledLinear

_USE = "Use a causal language model built like Llama, Qwen2, Gemma-3 or OPT."


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The decoder's repeated blocks: (module path from the model's root, list of blocks in call order).

    Works for a causal language model and for its bare decoder. Of all lists of modules that contain
    `nn.Linear` layers the outermost is taken, of several equally deep ones the one with most weights. Raises
    ValueError when there is none.
    """
    found = _find_blocks(*_decoder(model))
    if found is None:
        got = f"{type(model).__name__} without one{_why_no_linear(model)}"
        raise ValueError(f"expected a decoder with a list of blocks that contain nn.Linear layers, got {got}. {_USE}")
    return found


def decoder_of(model: nn.Module) -> nn.Module:
    """The part of a language model that turns token ids into final hidden states; a bare model itself."""
    return _decoder(model)[1]


def maskable_linears(model: nn.Module, exclude: Sequence[str] = ()) -> dict[str, nn.Linear]:
    """Layers that may be masked: {module path from the model's root: layer}, in `named_modules()` order.

    Mixtures are opened for it, in place: each matrix of each expert is a layer (`patch.models.mixtures`). These are the
    `nn.Linear` layers inside the decoder's blocks. Embeddings, the output head (tied or not)
    and the projections some models put around their embeddings (OPT-350M) are never among them, nor are the layers
    of `patch.models.stay_dense`: routers of mixtures, layers whose weight their model reads itself, and those that are
    nn.Linear by name only. In a module without a list of blocks every such layer of its body counts.

    exclude  fnmatch patterns over the names, such as "*.k_proj"; each must match a layer of the model.
    Raises ValueError when no layer is found or left, or a pattern matches nothing.
    """
    prefix, decoder = _decoder(model)
    open_mixtures(decoder)
    stay_dense = {_join(prefix, name) for name in router_linears(decoder) | directly_read_linears(decoder)}
    found = {name: layer for name, layer in block_linears(model).items() if name not in stay_dense}
    if not found:
        got = f"{type(model).__name__} with none in its decoder{_why_no_linear(model)}"
        raise ValueError(f"expected a model with nn.Linear layers to mask, got {got}. {_USE}")
    patterns = _check_patterns(model, exclude)
    kept = {name: layer for name, layer in found.items() if not any(fnmatchcase(name, p) for p in patterns)}
    if not kept:
        got = f"exclude={list(patterns)} which removes all {len(found)} nn.Linear layers"
        raise ValueError(f"expected at least one layer left to mask, got {got}. Use narrower patterns.")
    return kept


def layers_to_mask(model: nn.Module, exclude: Sequence[str] = ()) -> dict[str, nn.Linear]:
    """`maskable_linears` for new masks: refuses a model of which a part would be left dense in silence.

    Raises ValueError for experts, or a tenth of the decoder's weights or more, in a form that is not known, unless a
    pattern of `exclude` names the modules.
    """
    linears = maskable_linears(model, exclude)
    total = sum(block_weights(model).values())
    left = {
        shown: sum(size for path, size in sizes.items() if not any(fnmatchcase(path, p) for p in exclude))
        for shown, sizes in _unknown_weights(model).items()
    }
    if named := [f"'{shown}' ({size / total:.1%})" for shown, size in left.items() if size]:
        wanted = "expected the decoder's weights in nn.Linear layers, or in experts of a form that is known"
        pattern = next(shown for shown, size in left.items() if size)
        advice = f"Leave them dense with exclude=['{pattern}'] (--exclude '{pattern}')."
        raise ValueError(f"{wanted}, got another form in {', '.join(named)}. {advice}")
    return linears


def block_weights(model: nn.Module) -> dict[str, int]:
    """Every matrix inside the decoder's blocks: {parameter path from the model's root: number of elements}.

    What sparsity over the whole decoder counts: layers, experts kept as one tensor, routers, convolutions. Norms and
    biases (1-D), embeddings, the output head and adapters beside a layer are left out, a shared weight counts once. A
    packed layer counts as the dense weight it stands for, under its name + ".weight".
    """
    prefix, blocks = _blocks_or_body(model)
    seen = {id(weight) for weight in _embedding_weights(model)}
    weights: dict[str, int] = {}
    for path, module in blocks.named_modules():
        name = _join(prefix, path)
        if isinstance(module, TiledLinear):
            weights[f"{name}.weight"] = module.in_features * module.out_features
            continue
        if isinstance(module, TiledExperts):
            matrices = module.experts * module.parts
            weights[f"{name}.weight"] = matrices * module.in_features * module.out_features
            continue
        for key, tensor in module.named_parameters(recurse=False):
            if isinstance(module, nn.Linear):
                counts = key == "weight"
            else:  # neither stacked biases of experts nor vectors with sizes of 1 around them
                counts = sum(size > 1 for size in tensor.shape) > 1 and not key.endswith("bias")
            if counts and id(tensor) not in seen:
                seen.add(id(tensor))
                weights[_join(name, key)] = tensor.numel()
    return weights


def linear_at(model: nn.Module, name: str) -> nn.Linear:
    """The layer at a module path where an nn.Linear is known to be."""
    return cast(nn.Linear, model.get_submodule(name))


def input_embeddings(model: nn.Module) -> Any:
    """The token embedding of a transformers model."""
    return cast(Any, model).get_input_embeddings()


def vocabulary_size(model: nn.Module) -> int | None:
    """Rows of the token embedding, None for a model that does not say which it is."""
    embeddings = input_embeddings(model) if hasattr(model, "get_input_embeddings") else None
    return getattr(embeddings, "num_embeddings", None)


def _decoder(model: nn.Module) -> tuple[str, nn.Module]:
    """(module path, module) of the part that turns tokens into final hidden states."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}. Load the model first.")
    get_decoder = getattr(model, "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) else getattr(model, "base_model", None)
    if isinstance(decoder, nn.Linear):  # ModernBERT calls its output head the decoder
        decoder = getattr(model, "base_model", None)
    if not isinstance(decoder, nn.Module):
        decoder = model
    for name, module in model.named_modules():
        if module is decoder:
            return name, decoder
    return "", model


def _blocks_or_body(model: nn.Module) -> tuple[str, nn.Module]:
    """(module path, module) of the decoder's list of blocks, or of the whole decoder where there is none."""
    prefix, decoder = _decoder(model)
    return _find_blocks(prefix, decoder) or (prefix, decoder)


def _find_blocks(prefix: str, decoder: nn.Module) -> tuple[str, nn.ModuleList] | None:
    found = {
        _join(prefix, name): module
        for name, module in decoder.named_modules()
        if isinstance(module, nn.ModuleList) and _linear_elems(module) > 0
    }
    if not found:
        return None
    path = min(found, key=lambda name: (name.count("."), -_linear_elems(found[name])))
    return path, found[path]


def block_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Layers that can hold a mask: those of `maskable_linears`, routers and layers that their model reads itself."""
    prefix, _ = _blocks_or_body(model)
    heads = _embedding_weights(model)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and is_plain_linear(module)
        and (not prefix or name.startswith(prefix + "."))
        and not any(module.weight is weight for weight in heads)
    }


def _embedding_weights(model: nn.Module) -> list[torch.Tensor]:
    """Weights of embeddings and of the output head; a layer that holds one of them is never masked."""
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    weight = getattr(head, "weight", None)
    if isinstance(head, nn.Module) and isinstance(weight, torch.Tensor):
        weights.append(weight)
    return weights


# A share of the decoder's weights from which on a form that is not known is refused, whatever it is for.
_MUCH = 0.1


def _unknown_weights(model: nn.Module) -> dict[str, dict[str, int]]:
    """{names with block numbers as *: {module path: weights}} of what should be layers to mask but is in no known form.

    These are experts, and what else is a tenth of the decoder or more and neither an nn.Linear nor a convolution.
    """
    prefix, blocks = _blocks_or_body(model)
    experts = {_join(prefix, name) for name in unknown_experts(blocks)}
    modules = dict(model.named_modules())
    weights = block_weights(model)
    found: dict[str, dict[str, int]] = {}
    for name, size in weights.items():
        path = name.rpartition(".")[0]
        module = modules[path]
        if not isinstance(
            module, (nn.Linear, TiledLinear, TiledExperts, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
        ):
            of_module = found.setdefault(blocks_as_stars(path), {})
            of_module[path] = of_module.get(path, 0) + size
    total = sum(weights.values())
    return {
        shown: sizes
        for shown, sizes in found.items()
        if not experts.isdisjoint(sizes) or sum(sizes.values()) >= _MUCH * total
    }


def blocks_as_stars(name: str) -> str:
    """A module path or name with its numbers as *."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def _check_patterns(model: nn.Module, exclude: Sequence[str]) -> tuple[str, ...]:
    given = exclude if isinstance(exclude, Iterable) and not isinstance(exclude, str) else [None]
    if not all(isinstance(pattern, str) for pattern in given):
        raise TypeError(f'expected exclude as a list of patterns, got {exclude!r}. Write exclude=["*.k_proj"].')
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    others = [path for sizes in _unknown_weights(model).values() for path in sizes] if exclude else []
    for pattern in exclude:
        if not any(fnmatchcase(name, pattern) for name in (*names, *others)):
            got = f"'{pattern}' which matches none of the {len(names)} nn.Linear layers such as '{names[0]}'"
            advice = _near_pattern(pattern, names)
            raise ValueError(f"exclude: expected patterns that match a layer, got {got}. {advice}")
    return tuple(exclude)


def _near_pattern(pattern: str, names: Sequence[str]) -> str:
    """Advice for a pattern that matches no name: the one that was probably meant."""
    plain = pattern.strip("*.")
    for meant in (f"*.{plain}", f"*.{plain}.*", f"{plain}.*", f"*{plain}*"):
        if plain and any(fnmatchcase(name, meant) for name in names):
            return f"Did you mean '{meant}'?"
    kinds = sorted({f"*.{name.rsplit('.', 1)[-1]}" for name in names})
    return nearest(f"*.{plain}", kinds, "A pattern may use * and ?; layers")


def _why_no_linear(model: nn.Module) -> str:
    kinds = {type(module).__name__ for module in model.modules()}
    if "Conv1D" in kinds:
        return " (its layers are transformers' Conv1D, as in GPT-2, whose weight is stored transposed)"
    if "TiledLinear" in kinds:
        return " (its layers are packed already; call patch.packed.unpack_model first)"
    return ""


def _linear_elems(module: nn.Module) -> int:
    return sum(m.in_features * m.out_features for m in module.modules() if isinstance(m, (nn.Linear, TiledLinear)))


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix and name else prefix or name
