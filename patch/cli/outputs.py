"""What commands write: new folders and files, and what is said about them."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patch.files.claim import claimed
from patch.files.paths import require_new, require_place_for_folder

if TYPE_CHECKING:
    from torch import Tensor, nn

# What the command that runs will write, from its checks on; the command line ends it with the command.
claims = contextlib.ExitStack()


def claim(path: str | os.PathLike, flag: str = "--out") -> None:
    """Refuse a path that another run is writing, and hold it until the command ends."""
    if os.environ.get("RANK", "0") == "0":  # processes that train together write one folder
        claims.enter_context(claimed(path, flag))


def check_new_folder(path: str | os.PathLike, *, overwrite: bool, what: str) -> Path:
    """An output folder that may be written, as a path, and a claim on it; nothing else is changed.

    raises  ValueError when it exists with content and overwrite is off, or holds files that are not ours, or another
            run is writing it.
    """
    from patch.files.folder import MANIFEST

    folder = require_place_for_folder("--out", path)
    if Path.cwd().is_relative_to(folder.resolve()):
        raise ValueError(f"--out: expected a new folder, {path} holds the current one. Name a folder inside it.")
    claim(folder)
    if not folder.is_dir() or not any(folder.iterdir()):
        return folder
    expected = f"--out: expected a new folder, {folder}"
    if not (folder / MANIFEST).is_file():
        advice = "Choose another --out, what this program did not write is never replaced."
        raise ValueError(f"{expected} holds other files. {advice}")
    if (kind := _kind_of(folder)) != what:
        advice = f"Choose another --out, only another {kind} may replace it."
        raise ValueError(f"{expected} exists already (a complete {kind}). {advice}")
    if not overwrite:
        advice = "Choose another --out, or replace it with --overwrite."
        raise ValueError(f"{expected} exists already (a complete {what}). {advice}")
    return folder


def _kind_of(folder: Path) -> str:
    """What kind of folder of ours it is, by a file that each of that kind has."""
    kinds = {"masks.safetensors": "result", "config.json": "export", "report.md": "report"}
    return next((kind for name, kind in kinds.items() if (folder / name).is_file()), "folder of this program")


def stages_folder(out: Path) -> Path:
    """Where a command keeps what it has done of a result `out` while it is under way."""
    return out.with_name(f"{out.name}.stages")


def remove_stages(folder: Path) -> None:
    """Remove finished stages, and their folder if nothing else is in it."""
    from patch.runs.stages import STAGE_FILE

    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if (path / STAGE_FILE).is_file():
            shutil.rmtree(path)
    with contextlib.suppress(OSError):
        folder.rmdir()


def check_new_file(path: Path | None, flag: str) -> None:
    """Refuse an output file that is there already or cannot be made; None and - (standard output) pass."""
    if path is None or str(path) == "-":
        return
    require_new(flag, path)


def refuse_both(options: Any, one: str, other: str, advice: str) -> None:
    """Refuse two settings that exclude each other."""
    if getattr(options, one) and getattr(options, other):
        raise ValueError(f"--{one} and --{other}: expected one of them, got both. {advice}")


def check_run_folder(options: Any) -> None:
    """Refuse an --out that is a file, holds other things or an earlier run without --resume or --overwrite, or is
    being written."""
    from patch.runs.arguments import rank
    from patch.runs.folders import earlier_run, require_run_folder

    if rank() != 0:
        return  # the first process may have begun to write
    out = require_place_for_folder("--out", options.out)
    claim(out)
    earlier = earlier_run(out)
    if earlier and not (options.resume or options.overwrite):
        advice = "Use --resume, replace it with --overwrite, or choose another --out."
        raise ValueError(f"--out: expected no earlier run, {out} has {', '.join(earlier[:4])}. {advice}")
    require_run_folder("--out", out)


def check_input_stays(path: Path, out: Path, flag: str = "--masks") -> None:
    """Refuse an --out that --overwrite would empty of what the command reads."""
    if path.resolve().is_relative_to(out.resolve()):
        got = f"{path} is in {out}, which --overwrite replaces"
        raise ValueError(f"--out: expected another folder than that of {flag}, {got}. Choose another --out.")


def kept_checkpoint(folder: Path) -> str | None:
    """What to say of the newest checkpoint after an interrupt, None where there is none."""
    steps = [int(step) for path in folder.glob("checkpoint-*") if (step := path.name.rpartition("-")[2]).isdigit()]
    if not steps:
        return None
    return f"{folder / f'checkpoint-{max(steps)}'} is kept; go on with the same command and --resume"


def clear_learning_run(folder: Path) -> None:
    """Remove what an earlier learning run wrote into `folder`, and nothing else."""
    for name in ("metrics.jsonl", "config.resolved.yaml"):
        (folder / name).unlink(missing_ok=True)
    for path in (folder / "result", *folder.glob("checkpoint-*")):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)


def provenance(source: str | None, text_sha256: str | None, **values: Any) -> Mapping[str, Any]:
    """Values every artifact carries about its making."""
    from patch.models.facts import versions

    return {"data": source, "text_sha256": text_sha256, "versions": versions(), **values}


def print_sparsity(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Any]:
    """Say what masks prune, of their layers and of the whole decoder; the same as values for an artifact's meta."""
    from patch.models.coverage import coverage
    from patch.models.keep_masks import other_zeros
    from patch.models.structure import linear_at

    covered = coverage(model, masks)
    print(covered.text())
    if said := other_zeros(masks, {name: linear_at(model, name) for name in masks}):
        print(said)
    return {"coverage": covered.as_dict()}


def print_written(path: Path, what: str, next_step: str | None) -> None:
    """Last lines of a command: what was written and what one usually does with it; None after a warning."""
    print(f"wrote {what} to {path}")
    if next_step is not None:
        print(f"next: {next_step}")
