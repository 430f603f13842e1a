"""Messages of the library call settings by their flags where a command shows them."""

from __future__ import annotations

import pytest

from patch.cli.commands import compensate, eval, learn, prune  # the command of that name
from patch.cli.wording import in_flags


@pytest.mark.parametrize(
    ("command", "message", "shown"),
    [
        (
            prune,
            "sparsity: expected 0.5 for pattern 2:4, got 0.45. Use pattern='unstructured' for other shares.",
            "--sparsity: expected 0.5 for pattern 2:4, got 0.45. Use --pattern unstructured for other shares.",
        ),
        (
            prune,
            "block_size: expected 4, got 6. Use block_size=8.",
            "--block-size: expected 4, got 6. Use --block-size 8.",
        ),
        (
            prune,
            "x: expected y, got z. Pass shift_zero_metrics=True.",
            "x: expected y, got z. Pass --shift-zero-metrics.",
        ),
        (eval, "bos: expected a token, got none. Use bos=False.", "--bos: expected a token, got none. Use --no-bos."),
        (learn, "learn.lr: expected a number > 0, got -1.", "--lr: expected a number > 0, got -1."),
        (
            learn,
            "global_batch_size: expected a multiple of local_batch_size = 3, got 4. Change one.",
            "--global-batch-size: expected a multiple of --local-batch-size = 3, got 4. Change one.",
        ),
        (learn, "target_sparsity: expected 0.5, got 0.4.", "--sparsity: expected 0.5, got 0.4."),
        (compensate, "heldout: expected a text, got none.", "--heldout: expected a text, got none."),
    ],
)
def test_settings_become_flags(command, message, shown):
    assert in_flags(message, command) == shown


@pytest.mark.parametrize(
    "message",
    [
        "learn.warmup_steps: expected an integer, got 1.5.",  # a setting without a flag
        "--lr: expected a number, got 'fast'.",
        "--set lr=1: expected a known setting, got 'lr'. Did you mean 'learn.lr'?",
        "--data: expected text for 3 blocks. Take several passes with --set learn.epochs=2 or --set learn.lr=1.",
        "./exclude/block_size/x: expected a file, got 'save_steps'.",
        "runs/local_batch_size=3/x.yaml: expected a file, found none.",
        "blocks: expected 4 of them, got 2.",  # the library's blocks are the text itself
    ],
)
def test_all_else_stays(message):
    assert in_flags(message, learn) == message
