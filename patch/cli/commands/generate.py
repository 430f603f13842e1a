"""`patch-llm generate`: continue a prompt with a dense or packed model."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from patch.cli import inputs
from patch.files.schema import Says, record
from patch.settings import Seed, setting

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
    max_new_tokens: Annotated[int, Field(ge=1, lt=1 << 31)] = setting(64, "tokens to add")
    temperature: Annotated[float, Field(ge=0)] = setting(
        0.0, "0 takes the most likely token; more is freer (default 0)", metavar="T", examples=[0.8]
    )
    seed: Seed = setting(0, "seed of the sampling")


def run(options: Options) -> None:
    """Print the prompt and its continuation."""
    from patch.models.checks import require_known_special_tokens

    config = inputs.load_model_config(options.model, packed=True).get_text_config()
    vocabulary = getattr(config, "vocab_size", None)
    require_known_special_tokens(config, f"{options.model}/config.json", vocabulary)
    model: Any = inputs.load_model(options.model, dtype=options.dtype, device=options.device)
    file = f"{options.model}/generation_config.json"
    require_known_special_tokens(model.generation_config, file, vocabulary)
    tokenizer = inputs.load_tokenizer(options.model)
    print(continuation(model, tokenizer, options.prompt, options))


def on_interrupt(options: Options) -> str:
    """Generation keeps nothing."""
    return "generation was stopped"


def continuation(model: Any, tokenizer: Any, prompt: str, options: Options) -> str:
    """The prompt and its continuation as text.

    raises  ValueError when they do not fit the model's context, and for a prompt without a token or with one that the
            model has no row for.
    """
    import torch
    from transformers import GenerationConfig

    from patch.models.checks import require_known_tokens
    from patch.models.facts import context_length
    from patch.models.structure import vocabulary_size

    device = next(model.parameters()).device
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].long().to(device)
    if not ids.numel():
        raise ValueError(f"--prompt: expected text, got {prompt!r} in which the tokenizer finds none. Give a word.")
    vocabulary = vocabulary_size(model)
    require_known_tokens(ids[0], vocabulary, "--prompt", tokenizer)
    limit = context_length(model)
    if limit is not None and ids.shape[1] + options.max_new_tokens > limit:
        got = f"got {ids.shape[1]} + {options.max_new_tokens}. Shorten the prompt or ask for fewer."
        expected = f"expected prompt and new tokens within the model's {limit} positions"
        raise ValueError(f"--max-new-tokens: {expected}, {got}")
    sampling: dict[str, Any] = {"do_sample": False}
    if options.temperature > 0:
        sampling = {"do_sample": True, "temperature": options.temperature, "top_k": 0, "top_p": 1.0}
        torch.manual_seed(options.seed)
    ends = model.generation_config.eos_token_id
    # One sequence is never padded; a value keeps transformers from warning, but must be in the vocabulary.
    pads = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    pad = next(token for token in pads if token is not None and 0 <= token < (vocabulary or token + 1))
    # In place of the model's own settings: its file may ask for beams, penalties, or what does not fit together.
    model.generation_config = GenerationConfig(
        max_new_tokens=options.max_new_tokens, eos_token_id=ends, pad_token_id=pad, **sampling
    )
    with torch.inference_mode():
        output = model.generate(ids, attention_mask=torch.ones_like(ids))
    return tokenizer.decode(output[0], skip_special_tokens=True)
