"""Short learning runs."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from patch.learn.config import LearnConfig

BLOCKS = torch.randint(0, 256, (30, 16), generator=torch.Generator().manual_seed(5))


TILE = (32, 32)


def config(mode="joint", sparsity=0.35, **overrides):
    settings = {"tile": TILE, "global_batch_size": 4, "local_batch_size": 2, "seed": 3, "lr": 0.01}
    return LearnConfig.from_preset(mode, 0.5 if mode == "maskllm" else sparsity, **(settings | overrides))


class StopAt(TrainerCallback):
    """Raises (or kills the process) after an optimiser step, before that step's checkpoint."""

    def __init__(self, step, kill=False):
        self.step, self.kill = step, kill

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            if self.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyboardInterrupt(f"stopped at {self.step}")


def final_logits(folder):
    newest = max(Path(folder).glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    return load_file(newest / "logits.safetensors")


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def metrics_without_speed(folder):
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "tokens_per_second"} for line in lines]


def resumable(**overrides):
    return config(save_steps=2, save_total_limit=2, **overrides)
