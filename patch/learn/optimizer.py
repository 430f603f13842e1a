"""AdamW over mask logits: torch's own, or one whose moments or logits take less memory than fp32."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from patch.files.schema import require_choice
from patch.learn.config import MOMENTS, LearnConfig
from patch_kernels.checks import require_tensor
from patch_kernels.ops.adamw import PARAM_DTYPES, adamw_step, scale_shape

_STORAGE: dict[str, torch.dtype] = dict(zip(MOMENTS, (torch.float32, torch.bfloat16, torch.uint8), strict=True))


def make_optimizer(logits: Mapping[str, nn.Parameter], config: LearnConfig) -> torch.optim.Optimizer:
    """AdamW of a config over the logits, one group in their order.

    torch's fused AdamW where logits and moments are at least fp32, LowPrecisionAdamW otherwise.
    """
    settings: dict[str, Any] = {name: getattr(config, name) for name in ("lr", "betas", "eps", "weight_decay")}
    parameters = list(logits.values())
    if config.moments == "float32" and all(parameter.dtype != torch.bfloat16 for parameter in parameters):
        return torch.optim.AdamW(parameters, fused=True, **settings)
    return LowPrecisionAdamW(parameters, moments=config.moments, seed=config.seed, **settings)


def scale_gradients(optimizer: torch.optim.Optimizer, factor: Tensor) -> None:
    """Have the next step of an optimizer, and no later one, multiply its gradients by a tensor of one value.

    LowPrecisionAdamW and torch's fused optimizers do it on the way, which costs no pass over the gradients. For others,
    and for float64 logits (the fused step takes a float32 scale), they are multiplied here.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if isinstance(optimizer, LowPrecisionAdamW):
        optimizer.grad_scale = factor.float()
    elif optimizer.defaults.get("fused") and all(parameter.dtype == torch.float32 for parameter in parameters):
        if not hasattr(optimizer, "grad_scale"):  # a copy of the optimizer has neither the attribute nor the hook
            optimizer.register_step_post_hook(_forget_scale)
        cast(Any, optimizer).grad_scale = factor.float().reciprocal()  # the fused step divides by it
    else:
        for parameter in parameters:
            parameter.grad.mul_(factor.to(parameter.device))


def _forget_scale(optimizer: Any, args: Any, kwargs: Any) -> None:
    optimizer.grad_scale = None


def moment_state(parameter: Tensor, moments: str, device: torch.device | str | None = None) -> dict[str, Tensor]:
    """State of a parameter before its first step: step (), exp_avg, exp_avg_sq, and scales for "int8"."""
    device = parameter.device if device is None else device
    state = {"step": torch.zeros((), device=device if device == "meta" else "cpu")}
    for name in ("exp_avg", "exp_avg_sq"):
        state[name] = torch.zeros(parameter.shape, dtype=_STORAGE[moments], device=device)
        if moments == "int8":
            state[f"{name}_scale"] = torch.zeros(scale_shape(parameter), device=device)
    return state


class LowPrecisionAdamW(torch.optim.Optimizer):
    """AdamW with moments in fp32, bf16 or 8 bits, on fp32 or bf16 parameters, rounded stochastically.

    moments     "float32", "bfloat16" (4 bytes a parameter for both) or "int8" (2 bytes and 1/32; 8-bit floating-point
                codes with a scale for 256 values, see patch_kernels.adamw_step).
    seed        of the rounding; a run is a function of it, whatever the number of threads, and resumes bit for bit.
    grad_scale  attribute: None, or a fp32 tensor of one element that the next step multiplies the gradients by.
    raises      ValueError for other moments, and for parameters in another dtype.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        moments: str = "bfloat16",
        seed: int = 0,
    ) -> None:
        require_choice("LowPrecisionAdamW, moments", moments, MOMENTS)
        self.moments, self.seed = moments, seed
        self.grad_scale: Tensor | None = None
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; refuses parameters that are neither float32 nor bfloat16."""
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            advice = "Use torch.optim.AdamW for it."
            require_tensor("LowPrecisionAdamW, parameter", parameter, dtypes=PARAM_DTYPES, advice=advice)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for stream, (group, parameter) in enumerate(self._parameters()):
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state.update(moment_state(parameter, self.moments))
            state["step"] += 1
            adamw_step(
                parameter,
                parameter.grad,
                state["exp_avg"],
                state["exp_avg_sq"],
                step=int(state["step"]),
                lr=float(group["lr"]),
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                exp_avg_scale=state.get("exp_avg_scale"),
                exp_avg_sq_scale=state.get("exp_avg_sq_scale"),
                grad_scale=None if self.grad_scale is None else self.grad_scale.to(parameter.device),
                seed=self.seed,
                stream=stream,
            )
        self.grad_scale = None
        return loss

    def __getstate__(self) -> dict[str, Any]:
        # For copies and pickles; torch's has its own attributes only.
        return super().__getstate__() | {name: getattr(self, name) for name in ("moments", "seed", "grad_scale")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, except that moments keep their dtype (torch casts them to the parameter's).

        raises  ValueError for a state with other names, shapes or dtypes than this optimizer's.
        """
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        super().load_state_dict(state_dict | {"state": {}})  # checks the groups
        for index, (_, parameter) in zip(saved, self._parameters(), strict=True):
            if index not in state_dict["state"]:
                continue
            got, empty = state_dict["state"][index], moment_state(parameter, self.moments, device="meta")
            expected = {name: (value.dtype, tuple(value.shape)) for name, value in empty.items()}
            found = {name: (value.dtype, tuple(value.shape)) for name, value in got.items()}
            if found != expected:
                what = f"LowPrecisionAdamW, state of parameter {index} with moments in {self.moments}"
                raise ValueError(f"{what}: expected {expected}, got {found}. Load one saved with the same setting.")
            # The step stays on the CPU, where reading it does not wait for a GPU.
            self.state[parameter] = {
                name: value.to("cpu" if name == "step" else parameter.device) for name, value in got.items()
            }

    def _parameters(self) -> list[tuple[dict[str, Any], nn.Parameter]]:
        return [(group, parameter) for group in self.param_groups for parameter in group["params"]]
