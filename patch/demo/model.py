"""The tokenizer of the demo and a small model trained on its text."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from patch.models.mixtures import close_mixtures, open_mixtures
from patch_kernels.checks import require_at_least

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from patch.demo.settings import Architecture


def train_tokenizer(documents: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE tokenizer trained on documents, as a transformers tokenizer with <s> </s> <pad>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )


def build_model(
    *,
    vocab_size: int,
    hidden_size: int,
    intermediate_size: int,
    layers: int,
    heads: int,
    seed: int,
    architecture: Architecture = "llama",
    experts: int = 8,
) -> PreTrainedModel:
    """Causal model with random weights in fp32; the token embedding is shared with the output head.

    architecture  "llama"; "qwen2", which has biases on q, k and v; or "mixtral", whose MLPs are mixtures
    experts       of a mixture, each of intermediate_size; the router sends a token to two
    """
    import transformers

    torch.manual_seed(seed)
    prefix = {"llama": "Llama", "qwen2": "Qwen2", "mixtral": "Mixtral"}[architecture]
    # Ten times transformers' default weight of the load-balancing loss: the default is for far longer training.
    mixture = {"num_local_experts": experts, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.01}
    config = getattr(transformers, f"{prefix}Config")(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        **(mixture if architecture == "mixtral" else {}),
    )
    return getattr(transformers, f"{prefix}ForCausalLM")(config)


def train_dense(
    model: nn.Module,
    blocks: torch.Tensor,
    *,
    steps: int,
    batch_size: int,
    matrix_lr: float,
    vector_lr: float,
    seed: int,
    on_step: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train all weights on blocks (B, S) of token ids, in place, and return the loss of each step.

    Muon for the linear layers and AdamW for embedding and norms: at this size Muon reaches a given loss in less than
    half of AdamW's time. 5 % linear warm-up and cosine decay to a hundredth; the order of the blocks is given by seed.
    A mixture is opened meanwhile, so that Muon has every matrix of every expert; its loss includes the router's.
    on_step(step, loss) is called after each step. Raises ValueError on a loss that is not finite.
    """
    open_mixtures(model)
    model.requires_grad_(True)
    balanced = {} if getattr(model.config, "router_aux_loss_coef", None) is None else {"output_router_logits": True}
    linears = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    matrices = [p for name, p in model.named_parameters() if id(p) in linears and "embed" not in name]
    taken = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in taken]
    optimizers = (
        torch.optim.Muon(matrices, lr=matrix_lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=vector_lr, betas=(0.9, 0.95), weight_decay=0.0),
    )
    warm_up = max(1, steps // 20)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warm_up_cosine(step, warm_up, steps))
        for optimizer in optimizers
    ]
    batches = shuffled_batches(len(blocks), batch_size, seed)
    model.train()
    losses = []
    for step in range(steps):
        batch = blocks[next(batches)]
        loss = model(input_ids=batch, labels=batch, **balanced).loss
        if not torch.isfinite(loss):
            advice = f"Lower matrix_lr {matrix_lr} and vector_lr {vector_lr}."
            raise ValueError(f"expected a finite loss, got {loss.item()} in step {step}. {advice}")
        model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        losses.append(loss.item())
        if on_step is not None:
            on_step(step, losses[-1])
    close_mixtures(model)
    model.eval()
    return losses


def shuffled_batches(count: int, batch_size: int, seed: int) -> Iterator[torch.Tensor]:
    """Endless batches of indices below count: every index once per pass, a new order in each pass."""
    require_at_least("blocks of text", count, batch_size, "Give more text.", named="batch_size = ")
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator)
        for start in range(0, count - batch_size + 1, batch_size):
            yield order[start : start + batch_size]


def _warm_up_cosine(step: int, warm_up: int, steps: int) -> float:
    if step < warm_up:
        return (step + 1) / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    return 0.01 + 0.495 * (1 + math.cos(math.pi * progress))


class Stopwatch:
    """Seconds since the start, for stage lines such as `[ 12.3 s] training`."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds since construction."""
        return time.monotonic() - self._start
