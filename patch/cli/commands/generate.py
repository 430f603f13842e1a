"""`patch-llm generate`: continue a prompt with a dense or packed model."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from patch.cli import inputs
from patch.files.schema import Says, record
from patch.settings import AtLeastOne, Seed, setting

NAME = "generate"
SUMMARY = "continue a prompt"
EXAMPLES = """\
examples:
  patch-llm generate --model packed --prompt "The capital of France is"
  patch-llm generate --model packed --prompt "Once upon a time" --temperature 0.8 --seed 1
"""
TAKES_PACKED = True


Prompt = Annotated[str, Field(min_length=1), Says("text", "Give at least one word.")]


@record(kw_only=True)
class Options(inputs.PlacementSettings):
    """Settings of `generate`."""

    model: str = setting(help=inputs.MODEL_HELP + ", dense or packed", metavar="MODEL")
    prompt: Prompt = setting(help="text to continue", metavar="TEXT")
    max_new_tokens: AtLeastOne = setting(64, "tokens to add")
    temperature: Annotated[float, Field(ge=0)] = setting(
        0.0, "0 takes the most likely token; more is freer (default 0)", metavar="T", examples=[0.8]
    )
    seed: Seed = setting(0, "seed of the sampling")


def run(options: Options) -> None:
    """Print the prompt and its continuation."""
    model = inputs.load_model(options.model, dtype=options.dtype, device=options.device)
    tokenizer = inputs.load_tokenizer(options.model)
    print(continuation(model, tokenizer, options.prompt, options))


def on_interrupt(options: Options) -> str:
    """Generation keeps nothing."""
    return "generation was stopped"


def continuation(model: Any, tokenizer: Any, prompt: str, options: Options) -> str:
    """The prompt and its continuation as text. raises ValueError when they do not fit the model's context."""
    import torch

    from patch.models.facts import context_length

    device = next(model.parameters()).device
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(device)
    limit = context_length(model)
    if limit is not None and ids.shape[1] + options.max_new_tokens > limit:
        got = f"got {ids.shape[1]} + {options.max_new_tokens}. Shorten the prompt or --max-new-tokens."
        raise ValueError(f"expected prompt and new tokens within the model's {limit} positions, {got}")
    sampling: dict[str, Any] = {"do_sample": False}
    if options.temperature > 0:
        sampling = {"do_sample": True, "temperature": options.temperature, "top_k": 0, "top_p": 1.0}
        torch.manual_seed(options.seed)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with torch.inference_mode():
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=options.max_new_tokens,
            pad_token_id=pad,
            **sampling,
        )
    return tokenizer.decode(output[0], skip_special_tokens=True)
