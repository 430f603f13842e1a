"""What a learning run keeps on disk, and the identity of the run that it belongs to.

OUTPUT_DIR/
    checkpoint-N/      logits, AdamW moments and random state after N optimiser steps (safetensors + JSON);
                       written as a whole or not at all (patch.files.folder)
    metrics.jsonl      one JSON object per logged step
    result/            artifact with the hardened masks, only when the run has finished
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from patch.artifacts.artifact import load_artifact
from patch.files.folder import resolve_folder, write_folder
from patch.files.strict_json import dump_json, read_json
from patch.learn.config import LearnConfig
from patch.learn.optimizer import moment_state
from patch.models.facts import model_fingerprint
from patch.runs.checkpoints import (
    RESULT,
    TRAINER_STATE,
    checkpoints,
    load_tensors,
    newest_checkpoint,
    remove_checkpoint,
)
from patch.runs.folders import IDENTITY
from patch.runs.identity import FREE_SETTINGS, data_fingerprint, plain, tensors_fingerprint
from patch.runs.metrics import METRICS

LOGITS = "logits.safetensors"
OPTIMIZER = "optimizer.safetensors"
RANDOM = "random.safetensors"
# What must agree beside the settings, in the words of messages, with the settings that it follows from.
_MUST_AGREE = {
    "model": ("the model's weights", "Give the same model (--model, --dtype)"),
    "data": (
        "the training blocks",
        "Give the same text and number of blocks (--data, --seqlen, --steps)",
    ),
    "layers_and_priors": (
        "the masked layers, prior masks or tile scores",
        "Give the same prior and exclude (--prior, --exclude)",
    ),
    "world_size": ("the number of processes", "Start as many"),
}
_ANOTHER = "or choose another output folder (--out)."


def run_identity(
    model: nn.Module,
    blocks: Tensor,
    config: LearnConfig,
    tensors: Mapping[str, Mapping[str, Tensor] | None],
    world_size: int,
) -> dict[str, Any]:
    """JSON values that must agree before a run may go on: model, data, priors, settings, processes."""
    return {
        "model": model_fingerprint(model),
        "data": data_fingerprint(blocks),
        "layers_and_priors": tensors_fingerprint(tensors),
        "world_size": world_size,
        "config": _settings(config),
    }


def check_identity(folder: Path, found: Any, expected: Mapping[str, Any]) -> None:
    """raises ValueError naming what differs between the stored run and the one asked for."""
    if not isinstance(found, dict) or set(found) != set(expected) or not isinstance(found["config"], dict):
        raise ValueError(f"{folder}: expected the identity of a learning run, got something else. Use another folder.")
    for key, (label, advice) in _MUST_AGREE.items():
        if found[key] != expected[key]:
            got = f"{found[key]}, got {expected[key]}" if key == "world_size" else "got others"
            raise ValueError(f"{folder}: expected {label} of the run that wrote it, {got}. {advice}, {_ANOTHER}")
    # A setting that did not exist yet had what is now its default.
    before = _settings(LearnConfig()) | found["config"]
    for key, value in expected["config"].items():
        if before[key] != value:
            wanted = f"expected {key} of the run that wrote it, {before[key]!r}, got {value!r}"
            raise ValueError(f"{folder}: {wanted}. Resume with the same, {_ANOTHER}")


def refuse_used_folder(output_dir: Path) -> None:
    """A new run must not mix with an old one."""
    used = [METRICS, RESULT, *(path.name for path in checkpoints(output_dir))]
    present = [name for name in used if (output_dir / name).exists()]
    if present:
        found, advice = ", ".join(sorted(present)), "Pass resume=True to go on with it, or choose another folder."
        raise ValueError(f"output_dir {output_dir}: expected no earlier learning run, found {found}. {advice}")


def run_to_resume(output_dir: Path, identity: Mapping[str, Any]) -> tuple[Path | None, dict[Path, str], bool]:
    """(checkpoint to go on from, damaged newer ones with reasons, whether the run is finished); nothing is changed.

    raises  ValueError when what is there belongs to another run.
    """
    result = resolve_folder(output_dir / RESULT, must_exist=False)
    if result.exists():
        check_identity(result, load_artifact(result).meta.get("run"), identity)
        return None, {}, True
    checkpoint, damaged = newest_checkpoint(output_dir)
    if checkpoint is not None:
        check_identity(checkpoint, read_identity(checkpoint), identity)
    return checkpoint, damaged, False


def save_checkpoint(
    output_dir: Path,
    step: int,
    *,
    identity: Mapping[str, Any],
    logits: Mapping[str, Tensor],
    moments: Mapping[str, Mapping[str, Tensor]],
    random_states: Mapping[str, Tensor],
    save_trainer_state: Callable[[str], None],
    keep: int,
) -> None:
    """Write checkpoint-<step> completely, then remove all but the newest `keep` checkpoints."""

    def write(directory: Path) -> None:
        save_file({name: plain(value) for name, value in logits.items()}, directory / LOGITS)
        flat = {f"{name}|{key}": plain(value) for name, state in moments.items() for key, value in state.items()}
        save_file(flat, directory / OPTIMIZER)
        save_file({name: plain(value) for name, value in random_states.items()}, directory / RANDOM)
        save_trainer_state(str(directory / TRAINER_STATE))
        (directory / IDENTITY).write_bytes(dump_json(identity))

    write_folder(output_dir / f"checkpoint-{step}", write)
    # Only after the new one is complete: at every instant at least one good checkpoint exists.
    for path in checkpoints(output_dir)[:-keep]:
        remove_checkpoint(path)


def load_moments(path: Path, parameters: Mapping[str, Tensor], moments: str) -> dict[str, dict[str, Tensor]]:
    """AdamW state by parameter name, in the dtypes it was saved with; moments as in LearnConfig."""
    expected = {
        f"{name}|{key}": value
        for name, parameter in parameters.items()
        for key, value in moment_state(parameter, moments, device="meta").items()
    }
    states: dict[str, dict[str, Tensor]] = {name: {} for name in parameters}
    for name, value in load_tensors(path, expected).items():
        parameter, key = name.rsplit("|", 1)
        states[parameter][key] = value
    return states


def read_identity(folder: Path) -> Any:
    return read_json(folder / IDENTITY)


def _settings(config: LearnConfig) -> dict[str, Any]:
    """The settings that the trajectory depends on, as JSON gives them back."""
    return json.loads(json.dumps({k: v for k, v in asdict(config).items() if k not in FREE_SETTINGS}))
