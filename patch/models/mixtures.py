"""Mixtures of experts: every matrix of every expert as an nn.Linear of its own, whatever the model keeps them in.

transformers holds the experts of a block as 3-D parameters behind grouped products. `open_mixtures` puts an `Experts`
module in the place of each, whose children are plain layers: `experts.3.gate_proj`, `experts.3.up_proj` and
`experts.3.down_proj`. Whatever finds layers by name, hooks them or swaps them then works on experts as on any layer,
and an expert's layers are called with the tokens that the router sends to it. `state_dict` still has the tensors of the
model's own form, so that a model in either state saves and loads alike. `close_mixtures` puts the own form back.

Forms are found by shapes of parameters and by what `forward` takes, not by the name of a class, and each is tried:
the opened module must compute what the model's own code computes on small random weights.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

# extra_rows(experts, hidden states (tokens, in), experts of each token) -> {expert: more rows (n, in)}
ExtraRows = Callable[["Experts", Tensor, Tensor], dict[int, Tensor]]
_TRIAL_EXPERTS, _TRIAL_TOKENS, _TRIAL_CHOICES = 3, 7, 2


@dataclass(frozen=True)
class Form:
    """How a module keeps its experts.

    takes         "routed": hidden states, experts of each token, their weights; "batched": all tokens once for each
                  expert, zeros where it is not chosen; "sorted": rows by expert, and how many each expert has
    projections   names of an expert's layers in the order of their calls
    first         name of the 3-D parameter of what comes before the activation; of all of them in a sorted form
    transposed    matrices are (in, out), not (out, in)
    interleaved   rows of gate and up take turns, instead of gate before up
    biased        `first` and down_proj have biases, (experts, out)
    """

    takes: str
    projections: tuple[str, ...]
    first: str
    transposed: bool
    interleaved: bool
    biased: bool

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the model's own parameters."""
        names = (self.first,) if self.takes == "sorted" else (self.first, "down_proj")
        return (*names, *(f"{name}_bias" for name in names if self.biased))

    def split(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """{projection: (experts, out, in), of a bias (experts, out)} of a parameter of the own form; views."""
        if tensor.dim() == 3 and self.transposed:
            tensor = tensor.transpose(1, 2)
        if not name.startswith(self.first):
            return {"down_proj": tensor}
        if "gate_proj" not in self.projections:
            return {self.projections[0]: tensor}
        if self.interleaved:
            return {"gate_proj": tensor[:, ::2], "up_proj": tensor[:, 1::2]}
        gate, up = tensor.chunk(2, dim=1)
        return {"gate_proj": gate, "up_proj": up}

    def join(self, name: str, parts: dict[str, Tensor]) -> Tensor:
        """Inverse of `split`, in new memory."""
        if not name.startswith(self.first):
            tensor = parts["down_proj"]
        elif "gate_proj" not in self.projections:
            tensor = parts[self.projections[0]]
        elif self.interleaved:
            tensor = torch.stack([parts["gate_proj"], parts["up_proj"]], dim=2).flatten(1, 2)
        else:
            tensor = torch.cat([parts["gate_proj"], parts["up_proj"]], dim=1)
        return tensor.transpose(1, 2).contiguous() if tensor.dim() == 3 and self.transposed else tensor


class Expert(nn.Module):
    """The layers of one expert, in the order of their calls: gate_proj and up_proj, or up_proj; then down_proj."""


class Experts(nn.Module):
    """The experts of a block as layers of their own: child "3" is expert 3. Called as the module it stands for.

    original     that module, without its matrices; its code computes what is between the layers
    extra_rows   None, or what says which rows an expert of a routed mixture is called with besides (calibration)
    """

    extra_rows: ExtraRows | None = None

    def __init__(self, original: nn.Module, form: Form):
        super().__init__()
        # Not a child: its parameters would be counted, moved and saved beside those of the layers.
        self.__dict__["original"], self.form = original, form
        self.experts = _experts_of(original, form)
        self._signature = inspect.signature(type(original).forward)
        # What the layers' tensors are views of, until they are moved.
        self.__dict__["_whole"] = {name: _own(original, name).detach() for name in form.parameters}
        parts = {name: form.split(name, whole) for name, whole in self._whole.items()}
        is_trained = any(_own(original, name).requires_grad for name in form.parameters)
        for index in range(self.experts):
            self.add_module(str(index), _expert(form, parts, index).requires_grad_(is_trained))
        for name in form.parameters:
            original._parameters[name] = None
        self._modules.update(original._modules)  # activations, norms
        self._parameters.update({name: own for name, own in original._parameters.items() if own is not None})
        self._buffers.update(original._buffers)
        original._buffers = self._buffers  # the code that computes with them sees where they are moved
        self.train(original.training)
        self.register_state_dict_post_hook(_save_own_form)
        self.register_load_state_dict_pre_hook(_load_own_form)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            original = self.__dict__.get("original")
            if original is None or name.startswith("_"):
                raise
            return self.own_form(name) if name in self.form.parameters else getattr(original, name)

    def layers(self, index: int) -> dict[str, nn.Module]:
        """Layers of an expert by projection."""
        expert = self._modules[str(index)]
        if self.form.takes == "sorted":
            return {self.form.projections[0]: cast(nn.Module, expert)}
        return {name: cast(nn.Module, cast(Expert, expert)._modules[name]) for name in self.form.projections}

    def layer_names(self, index: int) -> dict[str, str]:
        """Names of an expert's layers from this module on, by projection."""
        if self.form.takes == "sorted":
            return {self.form.projections[0]: str(index)}
        return {name: f"{index}.{name}" for name in self.form.projections}

    def own_form(self, name: str) -> Tensor:
        """The model's own parameter with the values of the layers, which are views of it afterwards.

        It takes new memory where they were moved or replaced, and theirs is free then: of one mixture at a time.
        """
        whole = cast(Tensor, self._whole[name])
        if _is_view(self, name):
            return whole
        key = "bias" if name.endswith("_bias") else "weight"
        projections = self.form.split(name, whole)
        tensors = {p: [_tensor(self.layers(index)[p], key) for index in range(self.experts)] for p in projections}
        whole = self.form.join(name, {p: torch.stack([t.detach() for t in own]) for p, own in tensors.items()})
        self._whole[name] = whole
        for projection, part in self.form.split(name, whole).items():
            for tensor, view in zip(tensors[projection], part, strict=True):
                tensor.data = view
        return whole

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        bound = arguments(self._signature, self, args, kwargs)
        if self.form.takes == "batched":
            return self._batched(*bound)
        if self.form.takes == "sorted":
            return self._sorted(*bound)
        return self._routed(*bound)

    def _routed(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        tokens, choices = chosen.shape
        order, sizes = self._by_expert(chosen.reshape(-1))
        rows = hidden[order // choices]
        more = {} if self.extra_rows is None else self.extra_rows(self, hidden, chosen)
        y = torch.cat(self._call(rows.split(sizes), more))
        if (norm := self._modules.get("post_expert_norm")) is not None:
            y = norm(y)
        return weighted(y[order.argsort()].view(tokens, choices, y.shape[-1]), weights, hidden.dtype)

    def _batched(self, hidden: Tensor) -> Tensor:
        of_expert = hidden.reshape(self.experts, -1, hidden.shape[-1])
        if not _has_values(hidden):
            return torch.cat(self._call(of_expert.unbind(0)))
        # An expert without biases makes zeros of zeros: tokens that were not sent to it are left out.
        sent = of_expert.detach().ne(0).any(-1)
        results = self._call([rows[is_sent] for rows, is_sent in zip(of_expert, sent, strict=True)])
        y = hidden.new_zeros(*of_expert.shape[:2], results[0].shape[-1])
        y[sent] = torch.cat(results)
        return y.view(-1, y.shape[-1])

    def _sorted(self, rows: Tensor, sizes: Sequence[int] | Tensor) -> Tensor:
        counts = sizes.tolist() if isinstance(sizes, Tensor) else list(sizes)
        return torch.cat(self._call(rows.split(counts)))

    def _by_expert(self, chosen: Tensor) -> tuple[Tensor, list[int]]:
        """Order of the (token, choice) pairs by expert, and how many each expert has."""
        if not _has_values(chosen):  # sizes alone are asked for: as if all experts had as many tokens
            each, more = divmod(len(chosen), self.experts)
            return torch.arange(len(chosen), device=chosen.device), [
                each + (index < more) for index in range(self.experts)
            ]
        sizes = chosen.bincount(minlength=self.experts).tolist()
        if len(sizes) > self.experts:
            got = f"got {len(sizes) - 1}"
            raise ValueError(
                f"experts: expected numbers below {self.experts}, {got}; experts spread over devices are not supported."
            )
        return chosen.argsort(stable=True), sizes

    def _call(self, rows: Sequence[Tensor], more: Mapping[int, Tensor] | None = None) -> list[Tensor]:
        """Results of the experts for their rows; those of the rows in `more` are dropped."""
        results = []
        for index, x in enumerate(rows):
            with_more = torch.cat([x, more[index]]) if more and index in more else x
            results.append(self._expert(index, with_more)[: len(x)])
        return results

    def _expert(self, index: int, x: Tensor) -> Tensor:
        layers = self.layers(index)
        *first, last = layers.values()
        # A layer whose mask is being learned is called with no rows too: its share of zeros counts at every step.
        if not len(x) and all(type(layer) is nn.Linear for layer in layers.values()):
            return x.new_empty(0, cast(nn.Linear, last).out_features)
        if not first:
            return cast(Tensor, last(x))
        return cast(Tensor, last(between(self.original, self.form, torch.cat([layer(x) for layer in first], dim=-1))))

    def extra_repr(self) -> str:
        return f"{self.experts} experts of {type(self.original).__name__}"


def arguments(signature: inspect.Signature, module: nn.Module, args: Any, kwargs: Any) -> list[Any]:
    """What a module is called with, in the order of the forward of the module it stands for."""
    return list(signature.bind(module, *args, **kwargs).arguments.values())[1:]


def between(original: nn.Module, form: Form, y: Tensor) -> Tensor:
    """What is between an expert's layers, by the model's own code.

    y        (rows, inner) from up_proj, or (rows, 2*inner), gate before up
    returns  (rows, inner)
    """
    own: Any = original
    if "gate_proj" not in form.projections:
        return cast(Tensor, own.act_fn(y))
    if not hasattr(own, "_apply_gate"):
        gate, up = y.chunk(2, dim=-1)
        return cast(Tensor, own.act_fn(gate) * up)
    if form.interleaved:
        y = y.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
    return cast(Tensor, own._apply_gate(y))


def weighted(y: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum over the experts of every token: y (tokens, choices, out), weights (tokens, choices)."""
    return (y * weights[:, :, None]).sum(1).to(dtype)


def open_mixtures(root: nn.Module) -> None:
    """Put an `Experts` module in the place of every module below `root` that keeps experts in a known form."""
    for module in list(root.modules()):
        form = form_of(module)
        if form is not None and module is not root:
            replace(root, module, Experts(module, form))


@torch.no_grad()
def close_mixtures(root: nn.Module) -> None:
    """Put the model's own form back in the place of every `Experts` module, with the weights as they are now."""
    for _, experts in list(opened(root)):
        replace(root, experts, closed(experts))


def replace(root: nn.Module, module: nn.Module, other: nn.Module) -> None:
    """Put another module in the place of one, under all of its names."""
    for name, found in list(root.named_modules(remove_duplicate=False)):
        if found is module:
            root.set_submodule(name, other)


@torch.no_grad()
def closed(experts: Experts) -> nn.Module:
    """The model's own module with the weights of the opened one, which must not be used any more."""
    original: nn.Module = experts.original
    is_trained = any(p.requires_grad for layer in experts.layers(0).values() for p in layer.parameters())
    for name in experts.form.parameters:
        original.register_parameter(name, nn.Parameter(experts.own_form(name), requires_grad=is_trained))
    return original.train(experts.training)


def opened(root: nn.Module) -> Iterator[tuple[str, Experts]]:
    """(name, module) of the opened mixtures below `root`."""
    return ((name, module) for name, module in root.named_modules() if isinstance(module, Experts))


def own_parameters(root: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """`named_parameters` as if no mixture were opened, in any order."""
    of_layers: set[int] = set()
    for path, experts in opened(root):
        for index in range(experts.experts):
            of_layers.update(id(p) for layer in experts.layers(index).values() for p in layer.parameters())
        yield from ((f"{path}.{name}" if path else name, experts.own_form(name)) for name in experts.form.parameters)
    yield from ((name, parameter) for name, parameter in root.named_parameters() if id(parameter) not in of_layers)


def form_of(module: nn.Module) -> Form | None:
    """In which form a module keeps experts; None for another module, and for a form that is not known."""
    if isinstance(module, Experts) or getattr(module, "_is_expert_parallel", False):
        return None
    for form in _possible_forms(module):
        if _computes_alike(module, form):
            return form
    return None


def _possible_forms(module: nn.Module) -> Iterator[Form]:
    own = {name: parameter for name, parameter in module._parameters.items() if parameter is not None}
    matrices = {name for name, parameter in own.items() if parameter.dim() == 3}
    if len({own[name].shape[0] for name in matrices}) != 1:
        return
    takes = {3: "routed", 2: "sorted", 1: "batched"}.get(len(inspect.signature(type(module).forward).parameters) - 1)
    if takes is None:
        return
    if takes == "sorted":
        if matrices == {"weight"} and own.keys() == {"weight"}:
            yield Form(takes, ("weight",), "weight", False, False, False)
        return
    first = next((name for name in ("gate_up_proj", "up_proj") if matrices == {name, "down_proj"}), None)
    if first is None:
        return
    biased = {f"{first}_bias", "down_proj_bias"} <= own.keys()
    if biased and takes == "batched":  # zeros do not stay zeros
        return
    projections = ("up_proj", "down_proj") if first == "up_proj" else ("gate_proj", "up_proj", "down_proj")
    # transformers' own modules say it; what they do between the layers would fit both ways to cut gate from up.
    says = vars(module)
    is_transposed = (says["is_transposed"],) if "is_transposed" in says else (False, True)
    is_interleaved = (not says["is_concatenated"],) if "is_concatenated" in says else (False, True)
    for transposed in is_transposed:
        for interleaved in is_interleaved if first == "gate_up_proj" else (False,):
            form = Form(takes, projections, first, transposed, interleaved, biased)
            parts = form.split(first, own[first]) | form.split("down_proj", own["down_proj"])
            shapes = {name: part.shape[1:] for name, part in parts.items()}
            up, down = shapes["up_proj"], shapes["down_proj"]
            if up == shapes.get("gate_proj", up) and (down[1], down[0]) == (up[0], up[1]):
                yield form


def _computes_alike(module: nn.Module, form: Form) -> bool:
    """Whether the opened module computes what the module's own code does, on small random weights in its shapes."""
    with unset_fake_temporarily(), torch.device("cpu"), torch.no_grad():
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float32)  # while loading another is the default

        small = _shrunk(module, form, random)
        width = small._parameters[form.first].shape[2 if not form.transposed else 1]  # type: ignore[union-attr]
        if form.takes == "routed":
            chosen = torch.stack([torch.randperm(_TRIAL_EXPERTS, generator=generator) for _ in range(_TRIAL_TOKENS)])
            arguments: tuple[Any, ...] = (
                random(_TRIAL_TOKENS, width),
                chosen[:, :_TRIAL_CHOICES],
                random(_TRIAL_TOKENS, _TRIAL_CHOICES),
            )
        elif form.takes == "batched":
            x = random(_TRIAL_EXPERTS, _TRIAL_TOKENS, width)
            x[1, :3] = 0
            arguments = (x.reshape(-1, width),)
        else:
            arguments = random(_TRIAL_TOKENS, width), [3, 0, _TRIAL_TOKENS - 3]
        try:
            # transformers' decorator sends calls to grouped products, which want aligned rows.
            expected = inspect.unwrap(type(module).forward)(small, *arguments)
            got = Experts(_copied(small), form)(*arguments)
        except Exception:  # code of any module that has such parameters: what fails is not of this form
            return False
        return expected.shape == got.shape and torch.allclose(expected, got, rtol=1e-4, atol=1e-4)


def _shrunk(module: nn.Module, form: Form, random: Callable[..., Tensor]) -> nn.Module:
    """The module with few small experts of random weights, other parameters as they are."""
    inner, hidden = _own(module, form.first).shape[1:]
    if form.takes != "sorted":
        hidden, inner = form.split("down_proj", _own(module, "down_proj"))["down_proj"].shape[1:]
    sizes = {hidden: 6, inner: 10, 2 * inner: 20} if hidden != inner else {hidden: 6, 2 * hidden: 12}
    if 2 * inner == hidden:
        sizes = {hidden: 12, inner: 6}
    small = _copied(module)
    for name in form.parameters:
        shape = _own(module, name).shape
        small._parameters[name] = nn.Parameter(random(_TRIAL_EXPERTS, *(sizes[size] for size in shape[1:])))
    count = _experts_of(module, form)
    for name, value in vars(module).items():
        if isinstance(value, int) and not isinstance(value, bool):
            if value == count and "expert" in name:
                small.__dict__[name] = _TRIAL_EXPERTS
            elif value in sizes:
                small.__dict__[name] = sizes[value]
    for name in small._modules:
        if name == "post_expert_norm":
            small._modules[name] = nn.Identity()
    return small


def _own(module: nn.Module, name: str) -> Tensor:
    return cast(Tensor, module._parameters[name])


def _copied(module: nn.Module) -> nn.Module:
    """A copy that shares children and tensors, and can be given others."""
    twin = copy.copy(module)
    for name in ("_parameters", "_buffers", "_modules"):
        twin.__dict__[name] = dict(module.__dict__[name])
    return twin


def _experts_of(module: nn.Module, form: Form) -> int:
    return _own(module, form.first).shape[0]


def _expert(form: Form, parts: dict[str, dict[str, Tensor]], index: int) -> nn.Module:
    """The layers of expert `index`, on views of the own form."""
    layers = {}
    for projection in form.projections:
        name = "down_proj" if projection == "down_proj" and form.takes != "sorted" else form.first
        weight = parts[name][projection][index]
        bias = parts[f"{name}_bias"][projection][index] if form.biased else None
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=form.biased, device="meta", dtype=weight.dtype)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            layer.bias = nn.Parameter(bias, requires_grad=False)
        layers[projection] = layer
    if form.takes == "sorted":
        return layers[form.first]
    expert = Expert()
    for projection, layer in layers.items():
        expert.add_module(projection, layer)
    return expert


def _tensor(layer: nn.Module, key: str) -> Tensor:
    tensor = getattr(layer, key)
    if not isinstance(tensor, Tensor):
        raise ValueError(f"experts: expected layers with a {key}, got {type(layer).__name__} without one.")
    return tensor


def _has_values(tensor: Tensor) -> bool:
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def _is_view(experts: Experts, name: str) -> bool:
    """Whether the layers' tensors still lie where the own form has them."""
    whole = cast("dict[str, Tensor]", experts._whole)[name]
    key = "bias" if name.endswith("_bias") else "weight"
    if not _has_values(whole):
        return False
    for projection, part in experts.form.split(name, whole).items():
        for index in range(experts.experts):
            tensor, view = _tensor(experts.layers(index)[projection], key), part[index]
            is_same = tensor.device == view.device and tensor.dtype == view.dtype and tensor.shape == view.shape
            if not is_same or tensor.data_ptr() != view.data_ptr() or tensor.stride() != view.stride():
                return False
    return True


def _save_own_form(experts: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    module = cast(Experts, experts)
    for index in range(module.experts):
        for key in [key for key in state if key.startswith(f"{prefix}{index}.")]:
            del state[key]
    for name in module.form.parameters:
        state[prefix + name] = module.own_form(name)


def _load_own_form(experts: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    module = cast(Experts, experts)
    for name in module.form.parameters:
        if prefix + name not in state:
            continue
        key = "bias" if name.endswith("_bias") else "weight"
        for projection, part in module.form.split(name, state.pop(prefix + name)).items():
            for index in range(module.experts):
                state[f"{prefix}{module.layer_names(index)[projection]}.{key}"] = part[index]
