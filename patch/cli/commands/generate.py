"""`patch-llm generate`: continue a prompt with a dense or packed model."""

from __future__ import annotations

from dataclasses import dataclass

from patch.cli import inputs
from patch.settings import setting

NAME = "generate"
SUMMARY = "continue a prompt"
EXAMPLES = """\
examples:
  patch-llm generate --model packed --prompt "The capital of France is"
  patch-llm generate --model packed --prompt "Once upon a time" --temperature 0.8 --seed 1
"""
SECTION_FLAGS: dict[str, tuple[str, str, str]] = {}


@dataclass(frozen=True)
class Options:
    """Settings of `generate`."""

    model: str = setting(help=inputs.MODEL_HELP + ", dense or packed", metavar="MODEL")
    prompt: str = setting(help="text to continue", metavar="TEXT")
    max_new_tokens: int = setting(64, "tokens to add (default 64)", metavar="N")
    temperature: float = setting(0.0, "0 takes the most likely token; more is freer (default 0)", metavar="T")
    seed: int = setting(0, "seed of the sampling (default 0)", metavar="N")
    dtype: str = setting("auto", "dtype to load the model in (default: its own)", metavar="DTYPE")
    device: str | None = setting(None, "cpu, cuda or cuda:N (default: the GPU if there is one)", metavar="DEVICE")

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError("--prompt: expected text, got nothing. Give at least one word.")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected an integer >= 1, got {self.max_new_tokens}. Use 64.")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature: expected a number >= 0, got {self.temperature}. Use 0 or about 0.8.")
        if self.seed < 0:
            raise ValueError(f"seed: expected an integer >= 0, got {self.seed}. Use 0.")


def run(options: Options) -> None:
    """Print the prompt and its continuation."""
    model = inputs.load_model(options.model, dtype=options.dtype, device=options.device)
    tokenizer = inputs.load_tokenizer(options.model)
    print(continuation(model, tokenizer, options.prompt, options))


def on_interrupt(options: Options) -> str:
    """Generation keeps nothing."""
    return "generation was stopped"


def continuation(model, tokenizer, prompt: str, options: Options) -> str:
    """The prompt and its continuation as text. raises ValueError when they do not fit the model's context."""
    import torch

    from patch.models.facts import context_length

    device = next(model.parameters()).device
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(device)
    limit = context_length(model)
    if limit is not None and ids.shape[1] + options.max_new_tokens > limit:
        raise ValueError(
            f"expected prompt and new tokens within the model's {limit} positions, got {ids.shape[1]} + "
            f"{options.max_new_tokens}. Shorten the prompt or --max-new-tokens."
        )
    sampling = {"do_sample": False}
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
