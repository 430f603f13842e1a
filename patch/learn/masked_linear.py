"""Linear layer whose frozen weight is multiplied by a sampled mask, and the swap into and out of a model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

import patch_kernels
from patch.files.schema import listed
from patch.learn.config import LearnConfig
from patch.mask import exact_budget, harden, nonzero_budget, tile_areas, tile_counts
from patch.models.structure import decoder_blocks
from patch.priors import chosen_tile_prior, pattern_prior, tile_prior
from patch.pruning.options import GROUP
from patch.pruning.selection import keep_two_of_four
from patch.pruning.tiles import costliest_tiles
from patch_kernels import MaskSampling, tile_grid
from patch_kernels.reference import unpack_keep

_SAMPLED = ("seed", "draw", "pattern_temperature", "pattern_scale", "tile_temperature", "tile_scale")


@dataclass
class SamplingState:
    """What all masked layers of a model share during training. The trainer updates it before every
    micro-batch.

    The noise is a function of (seed, layer, draw), so a recomputed forward pass (gradient checkpointing), a
    resumed run and a rank of a distributed run see exactly the noise that belongs to them.
    """

    seed: int
    draw: int = 0
    pattern_temperature: float = 1.0
    pattern_scale: float = 1.0
    tile_temperature: float = 1.0
    tile_scale: float = 1.0
    hard_pattern: bool = False
    hard_tile: bool = False
    # Only the first forward pass of a micro-batch stashes its sums; a recomputation in backward must not.
    collect: bool = False
    # The layers then run as the dense ones that they are made from: a teacher without a second copy of the weights.
    is_off: bool = False
    sums: dict[int, Tensor] = field(default_factory=dict)
    _tensors: dict[tuple[torch.device, bool], MaskSampling] = field(default_factory=dict, repr=False)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in _SAMPLED and "_tensors" in self.__dict__:
            self._tensors.clear()

    def sampling(self, device: torch.device, *, noise: bool = True) -> MaskSampling:
        """The numbers above as tensors on a device, made once for all its layers.

        A compiled forward pass whose step was announced by a call of this before (the trainer makes it) reads
        the tensors alone, so a new draw or temperature does not compile it again.
        """
        made = self._tensors.get((device, noise))
        if made is None:
            made = self._tensors[device, noise] = patch_kernels.mask_sampling(
                pattern_temperature=self.pattern_temperature,
                pattern_scale=self.pattern_scale,
                tile_temperature=self.tile_temperature,
                tile_scale=self.tile_scale,
                noise=(self.seed, self.draw) if noise else None,
                device=device,
            )
        return made

    def take_sums(self) -> list[Tensor]:
        """(mask sum, sum of squared masked weights) per layer of the last forward pass; then forget."""
        sums = [self.sums[index] for index in sorted(self.sums)]
        self.sums.clear()
        return sums


class MaskedLinear(nn.Module):
    """y = x @ (mask * weight).T + bias with a frozen weight and bias and trainable mask logits.

    linear          its Parameters are shared, not copied, and are no longer trained.
    index           position of the layer among the masked ones; part of the noise key.
    pattern_logits  (N*K/4, 6) or None; then fixed_keep (N, K) bool gives the 2:4 mask.
    tile_logits     (rows, cols) or None: no tile is dense.
    In train() mode the mask is sampled with noise at the state's temperatures. In eval() mode it is the
    hardened mask (no noise, patch.mask.harden), so that an evaluation measures the model that would be
    exported.
    """

    fixed_pattern: Tensor | None

    def __init__(
        self,
        linear: nn.Linear,
        *,
        index: int,
        tile: tuple[int, int],
        state: SamplingState,
        pattern_logits: Tensor | None = None,
        tile_logits: Tensor | None = None,
        fixed_keep: Tensor | None = None,
    ) -> None:
        super().__init__()
        if (pattern_logits is None) == (fixed_keep is None):
            raise ValueError("MaskedLinear: expected pattern_logits or fixed_keep, got both or neither. Give one.")
        if pattern_logits is None and tile_logits is None:
            raise ValueError("MaskedLinear: expected logits to train, got a fixed mask without tile_logits; add them")
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.index, self.tile, self.state = index, tile, state
        self.pattern_logits = None if pattern_logits is None else nn.Parameter(pattern_logits)
        self.tile_logits = None if tile_logits is None else nn.Parameter(tile_logits)
        packed = None if fixed_keep is None else patch_kernels.pack_keep(fixed_keep)
        self.register_buffer("fixed_pattern", packed, persistent=False)

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def forward(self, x: Tensor) -> Tensor:
        state = self.state
        if state.is_off:
            return functional.linear(x, self.weight, self.bias)
        y, sums = patch_kernels.masked_linear(
            x,
            self.weight,
            self.bias,
            self.pattern_logits,
            self.tile_logits,
            state.sampling(self.weight.device, noise=self.training),
            layer=self.index,
            tile=self.tile,
            hard_pattern=state.hard_pattern or not self.training,
            hard_tile=state.hard_tile or not self.training,
            fixed_pattern=self.fixed_pattern,
        )
        if state.collect:
            state.sums[self.index] = sums
        return y

    @torch.no_grad()
    def pattern_keep(self) -> Tensor:
        """Hardened 2:4 keep mask (N, K) bool, tiles left out of account."""
        if self.pattern_logits is not None:
            return harden(self.pattern_logits, None, self.tile, self.shape)[0]
        return unpack_keep(cast(Tensor, self.fixed_pattern), self.shape)

    def harden(self, dense_tiles: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(keep (N, K), tile_is_sparse (rows, cols)); dense_tiles, a bool grid, overrules the logits."""
        tile_logits = self.tile_logits if dense_tiles is None else dense_tiles.float()
        return harden(self.pattern_keep(), tile_logits, self.tile, self.shape)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, tile={self.tile}"


class MaskedLayers:
    """The masked layers put into a model; `remove` puts the plain Linears back.

    model       changed in place by the constructor: each Linear in `linears` (by module path) becomes a
                MaskedLinear.
    prior_masks keep masks (N, K) by layer name: start of the 2:4 logits, or the fixed patterns in mode
                "tile"; see `two_of_four` for dense tiles.
    tile_scores (rows, cols) by layer name: start of the tile logits.
    """

    def __init__(
        self,
        model: nn.Module,
        linears: Mapping[str, nn.Linear],
        config: LearnConfig,
        *,
        prior_masks: Mapping[str, Tensor] | None = None,
        tile_scores: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.model, self.config = model, config
        self.state = SamplingState(config.seed, hard_pattern=config.hard_pattern, hard_tile=config.hard_tile)
        self._originals = dict(linears)
        # Read now: decoder_blocks recognises the blocks by their nn.Linear layers.
        self.block_of_layer = _block_of_layer(model, list(linears)) if config.layer_target else None
        self.layers: dict[str, MaskedLinear] = {}
        self._tile_areas: dict[str, Tensor] = {}
        if tile_scores is not None and config.tile_prior_budget == "model":
            tile_scores = dense_tiles(linears, tile_scores, config)
        for index, (name, linear) in enumerate(linears.items()):
            keep = None if prior_masks is None else two_of_four(prior_masks[name], linear.weight)
            scores = None if tile_scores is None else tile_scores[name]
            pattern, tile = initial_logits(linear, index, config, keep, scores)
            self.layers[name] = MaskedLinear(
                linear,
                index=index,
                tile=config.tile,
                state=self.state,
                pattern_logits=pattern,
                tile_logits=tile,
                fixed_keep=keep if config.mode == "tile" else None,
            )
        # Swapped only now: an error above leaves the model untouched.
        for name, layer in self.layers.items():
            layer.train(model.training)
            model.set_submodule(name, layer)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Trainable logits by name, "<layer>.pattern_logits" and "<layer>.tile_logits", in layer order."""
        return {
            f"{name}.{kind}": logits
            for name, layer in self.layers.items()
            for kind in ("pattern_logits", "tile_logits")
            if (logits := getattr(layer, kind)) is not None
        }

    def take_sums(self) -> list[Tensor]:
        """(mask sum, sum of squared masked weights) per layer of the last forward pass; then forget.

        raises  ValueError naming layers that the pass did not call: their masks would have had no effect
        """
        if idle := [name for name, layer in self.layers.items() if layer.index not in self.state.sums]:
            wanted = f"expected the model to call every layer that gets a mask, it did not call {listed(idle)}"
            raise ValueError(f"learn: {wanted}. Put them in exclude (--exclude).")
        return self.state.take_sums()

    def remove(self) -> None:
        """Put the original nn.Linear modules back. Doing it twice does no harm."""
        self.state.sums.clear()
        for name, linear in self._originals.items():
            layer = self.layers[name]
            linear.weight, linear.bias = layer.weight, layer.bias  # may have been moved to another device
            linear.train(layer.training)
            self.model.set_submodule(name, linear)

    @torch.no_grad()
    def hard_density(self) -> float:
        """Share of nonzeros if the masks were hardened now; groups keep exactly 2 of 4 by construction."""
        dense = [
            (self._areas(name, layer.tile_logits.device) * (layer.tile_logits > 0)).sum()
            for name, layer in self.layers.items()
            if layer.tile_logits is not None
        ]
        if not dense:
            return 0.5
        total = sum(layer.weight.numel() for layer in self.layers.values())
        return 0.5 + 0.5 * float(torch.stack([area.to(dense[0].device) for area in dense]).sum()) / total

    def _areas(self, name: str, device: torch.device) -> Tensor:
        """float64 areas of a layer's tiles, kept on the device: the density is logged at every step."""
        areas = self._tile_areas.get(name)
        if areas is None or areas.device != device:
            layer = self.layers[name]
            areas = self._tile_areas[name] = tile_areas(layer.tile, layer.shape).to(device, torch.float64)
        return areas

    def harden(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Final (keep masks, tile_is_sparse grids) by layer; with config.exact_budget tiles go by rank."""
        chosen: dict[str, Tensor] = {}
        if self.config.exact_budget and self.config.mode != "maskllm":
            gains = [self._gain(layer) for layer in self.layers.values()]
            total = sum(layer.weight.numel() for layer in self.layers.values())
            all_dense = sum(int(gain.sum()) for gain in gains)
            budget = nonzero_budget(total, self.config.target_sparsity) - (total - all_dense)
            logits = [cast(Tensor, layer.tile_logits) for layer in self.layers.values()]
            chosen = dict(zip(self.layers, exact_budget(logits, gains, budget), strict=True))
        hardened = {name: layer.harden(chosen.get(name)) for name, layer in self.layers.items()}
        return {name: pair[0] for name, pair in hardened.items()}, {name: pair[1] for name, pair in hardened.items()}

    @staticmethod
    def _gain(layer: MaskedLinear) -> Tensor:
        """Nonzeros that each tile gains by being dense."""
        return tile_areas(layer.tile, layer.shape) - tile_counts(layer.pattern_keep().cpu(), layer.tile)


@torch.no_grad()
def two_of_four(keep: Tensor, weight: Tensor) -> Tensor:
    """The keep mask (N, K) of a prior on the weight's device, with a 2:4 pattern under its dense tiles too.

    A dense tile keeps all and says nothing about patterns, and learning may still make it sparse: its groups get their
    two largest weights, the only choice that needs no calibration. Other groups are as they came.
    """
    keep = keep.to(weight.device)
    is_full = keep.reshape(-1, GROUP).all(1, keepdim=True).expand(-1, GROUP).reshape(keep.shape)
    return keep & (keep_two_of_four(weight.detach().abs()) | ~is_full)


def dense_tiles(
    linears: Mapping[str, nn.Linear], tile_scores: Mapping[str, Tensor], config: LearnConfig
) -> dict[str, Tensor]:
    """Which tiles the prior of budget "model" favours, (rows, cols) bool by layer name.

    tile_scores  (rows, cols) by layer name: what the model loses by a tile's 2:4 pattern, in any one unit.
    returns      the tiles that lose most per weight which a pattern would prune (ragged tiles have fewer), until the
                 nonzeros of the target sparsity are spent.
    """
    # K and the columns of a tile are multiples of 4, so that a pattern keeps half of every tile.
    gains = [tile_areas(config.tile, (linear.out_features, linear.in_features)) // 2 for linear in linears.values()]
    spare = sum(int(gain.sum()) for gain in gains)
    budget = nonzero_budget(2 * spare, config.target_sparsity) - spare
    return dict(zip(linears, costliest_tiles([tile_scores[name] for name in linears], gains, budget), strict=True))


def initial_logits(
    linear: nn.Linear, index: int, config: LearnConfig, keep: Tensor | None, scores: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """(pattern, tile) start logits of a layer, None where the mode has none; a function of (seed, index) and
    priors.

    scores  (rows, cols) of the tiles, or bool: those that are to be dense.
    float32, because rounding to the nearest a 16-bit logit near 0.04 cannot be moved by a step of 1e-4 (half
    a unit in the last place); float64 for a float64 weight. With config.logits_dtype "bfloat16" the pattern
    logits are bfloat16, and the optimizer rounds them stochastically.
    """
    shape = (linear.out_features, linear.in_features)
    generator = torch.Generator().manual_seed((config.seed * 1_000_003 + index) % (1 << 63))
    dtype = torch.float64 if linear.weight.dtype == torch.float64 else torch.float32
    device = linear.weight.device
    pattern = tile = None
    if config.mode != "tile":
        raw = torch.randn(shape[0] * shape[1] // 4, 6, generator=generator, dtype=dtype) * config.init_std
        pattern = raw.to(device)
        if keep is not None:
            pattern = pattern_prior(pattern, keep, config.pattern_prior_strength, mode=config.prior_mode)
        if config.logits_dtype == "bfloat16":
            pattern = pattern.to(torch.bfloat16)
    if config.mode != "maskllm":
        raw = torch.randn(tile_grid(shape, config.tile), generator=generator, dtype=dtype) * config.init_std
        tile = raw.to(device)
        if scores is not None:
            # The nominal deviation: a layer has few tiles, so the sample's is noisy, and undefined for one
            # tile.
            strength, std, scores = config.tile_prior_strength, config.init_std, scores.to(device)
            if scores.dtype == torch.bool:
                tile = chosen_tile_prior(tile, scores, strength, std=std)
            else:
                tile = tile_prior(tile, scores, 1.0 - config.target_sparsity, strength, std=std)
    return pattern, tile


def _block_of_layer(model: nn.Module, names: Sequence[str]) -> list[int]:
    """Index of each layer's decoder block, renumbered without gaps; layers outside the blocks form one."""
    prefix, _ = decoder_blocks(model)
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    found = [int(match[1]) if (match := pattern.match(name)) else -1 for name in names]
    positions = {block: position for position, block in enumerate(sorted(set(found)))}
    return [positions[block] for block in found]
