"""What a learning run keeps on disk: checkpoints, the metrics log, and the identity of the run they belong
to.

OUTPUT_DIR/
    checkpoint-N/      logits, AdamW moments and random state after N optimiser steps (safetensors + JSON);
                       written as a whole or not at all (patch.folder)
    metrics.jsonl      one JSON object per logged step
    result/            artifact with the hardened masks, only when the run has finished
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from patch.checkpoint import model_fingerprint
from patch.folder import dump_json, read_json, verify_folder, write_folder
from patch.learn import LearnConfig
from patch.optimizer import moment_state

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
RESULT = "result"
IDENTITY = "run.json"
LOGITS = "logits.safetensors"
OPTIMIZER = "optimizer.safetensors"
RANDOM = "random.safetensors"
TRAINER_STATE = "trainer_state.json"

# Settings that may change between two parts of one run, because the trajectory does not depend on them.
_FREE_SETTINGS = ("save_steps", "save_total_limit", "log_steps", "grad_checkpoint")
_CHECKPOINT = re.compile(r"checkpoint-(\d{1,12})")
_SAMPLED_TOKENS = 1 << 24


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
        raise ValueError(
            f"{folder}: expected the identity of a learning run, got something else; choose another folder"
        )
    what = {
        "model": "the model's weights",
        "data": "the training blocks",
        "layers_and_priors": "the masked layers, prior masks or tile scores",
        "world_size": "the number of processes",
    }
    for key, label in what.items():
        if found[key] != expected[key]:
            raise ValueError(
                f"{folder}: expected {label} of the run that wrote it ({_short(found[key])}), got others "
                f"({_short(expected[key])}); resume with the same ones or choose another output_dir"
            )
    # A setting that did not exist yet had what is now its default.
    before = _settings(LearnConfig()) | found["config"]
    for key, value in expected["config"].items():
        if before[key] != value:
            raise ValueError(
                f"{folder}: expected {key}={before[key]!r} as in the run that wrote it, got {value!r}; resume "
                "with the same setting or choose another output_dir"
            )


def refuse_used_folder(output_dir: Path) -> None:
    """A new run must not mix with an old one."""
    used = [METRICS, RESULT, *(path.name for path in checkpoints(output_dir))]
    present = [name for name in used if (output_dir / name).exists()]
    if present:
        raise ValueError(
            f"output_dir {output_dir}: expected no earlier learning run, found {', '.join(sorted(present))}; "
            "pass resume=True to go on with it, or choose another folder"
        )


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
        save_file({name: _plain(value) for name, value in logits.items()}, directory / LOGITS)
        flat = {f"{name}|{key}": _plain(value) for name, state in moments.items() for key, value in state.items()}
        save_file(flat, directory / OPTIMIZER)
        save_file({name: _plain(value) for name, value in random_states.items()}, directory / RANDOM)
        save_trainer_state(str(directory / TRAINER_STATE))
        (directory / IDENTITY).write_bytes(dump_json(identity))

    write_folder(output_dir / f"checkpoint-{step}", write)
    # Only after the new one is complete: at every instant at least one good checkpoint exists.
    for path in checkpoints(output_dir)[:-keep]:
        _remove_checkpoint(path)


def newest_checkpoint(output_dir: Path, *, may_rename: bool = True) -> Path | None:
    """Newest checkpoint that verifies. Damaged newer ones are renamed to damaged-* and reported.

    may_rename  False on all but the first of several processes.
    """
    for path in reversed(checkpoints(output_dir)):
        try:
            verify_folder(path)
        except (ValueError, OSError) as error:
            if not may_rename:
                continue
            aside = _free_name(path.with_name(f"damaged-{path.name}"))
            os.rename(path, aside)
            logger.warning("ignoring an unusable checkpoint (kept as %s): %s", aside.name, error)
        else:
            return path
    return None


def load_tensors(path: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a file, after checking names and shapes against `expected` before any is allocated."""
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        if names != set(expected):
            differing = sorted(names ^ set(expected))[:3]
            raise ValueError(
                f"{path}: expected the tensors of this model's masked layers, got others (for example "
                f"{differing}); resume with the same model, mode and exclude"
            )
        for name, tensor in expected.items():
            shape = tuple(file.get_slice(name).get_shape())
            if shape != tuple(tensor.shape):
                raise ValueError(
                    f"{path}: expected shape {tuple(tensor.shape)} for {name}, got {shape}; resume with the same tile"
                )
        return {name: file.get_tensor(name) for name in expected}


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


class MetricsLog:
    """metrics.jsonl of a run. `lines` holds every record, from before a resume too.

    Records after the step that the run resumes from, and a half-written last line, are dropped on opening, so
    the file of a resumed run has the lines of an uninterrupted one, each once.
    """

    def __init__(self, path: Path | None, resume_step: int = 0) -> None:
        self.lines: list[dict[str, Any]] = []
        self._path, self._file = path, None
        if path is None:
            return
        if path.exists():
            self.lines = [record for record in read_metrics(path) if record["step"] <= resume_step]
            text = "".join(json.dumps(record) + "\n" for record in self.lines)
            temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
            with open(temporary, "w", encoding="ascii") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        self._file = open(path, "a", encoding="ascii")

    def write(self, record: dict[str, Any]) -> None:
        self.lines.append(record)
        if self._file is not None:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()

    def sync(self) -> None:
        """Force the lines to the disk; done before a checkpoint that relies on them."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Records of a metrics.jsonl. A damaged last line (killed while writing) is dropped, another refused."""
    lines = path.read_text(encoding="ascii", errors="replace").split("\n")
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:
            # Complete lines end in a newline, so what follows the last one is unfinished or empty.
            if number == len(lines):
                break
            raise ValueError(f"{path}: line {number} is not JSON; move the file away to resume without it") from None
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise ValueError(f"{path}: line {number} has no step; move the file away to resume without it")
        records.append(record)
    return records


def read_identity(folder: Path) -> Any:
    return read_json(folder / IDENTITY)


def random_states(device: torch.device) -> dict[str, Tensor]:
    """State of the generators that training may use (dropout): the CPU's and the training device's."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_random_states(path: Path, rank: int, device: torch.device) -> None:
    with safe_open(path, framework="pt") as file:
        torch.set_rng_state(file.get_tensor("cpu")[rank])
        if device.type == "cuda" and "cuda" in file.keys():
            torch.cuda.set_rng_state(file.get_tensor("cuda")[rank], device)


def checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    if not output_dir.is_dir():
        return []
    found = [(int(match[1]), path) for path in output_dir.iterdir() if (match := _CHECKPOINT.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def _remove_checkpoint(path: Path) -> None:
    import shutil

    # Renamed first: a kill in the middle of the removal must not leave a folder that looks like a checkpoint.
    doomed = _free_name(path.with_name(f"removed-{path.name}"))
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _free_name(path: Path) -> Path:
    number = 0
    candidate = path
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}.{number}")
    return candidate


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


def _settings(config: LearnConfig) -> dict[str, Any]:
    """The settings that the trajectory depends on, as JSON gives them back."""
    return json.loads(json.dumps({k: v for k, v in asdict(config).items() if k not in _FREE_SETTINGS}))


def data_fingerprint(blocks: Tensor) -> str:
    """SHA-256 of shape and token ids; of evenly spaced blocks where there are more than 16 M tokens."""
    step = max(1, -(-blocks.numel() // _SAMPLED_TOKENS))
    digest = hashlib.sha256(str(tuple(blocks.shape)).encode())
    digest.update(_plain(blocks[::step]).numpy().tobytes())
    return digest.hexdigest()


def tensors_fingerprint(groups: Mapping[str, Mapping[str, Tensor] | None]) -> str:
    """SHA-256 over names, shapes, dtypes and all values."""
    digest = hashlib.sha256()
    for group, tensors in sorted(groups.items()):
        digest.update(f"{group} {tensors is None}\n".encode())
        for name, tensor in (tensors or {}).items():
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(_plain(tensor).reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _short(value: Any) -> str:
    return str(value)[:12]
