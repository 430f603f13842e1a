"""Model, texts and flags that the studies of quality share.

Where no model is given, it is the demo's, trained by its code on its text.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from benchmarks import harness
from benchmarks.studies.quality_study import Settings, Study
from patch import __version__
from patch.demo import corpus as corpus_module
from patch.demo import run as demo_run
from patch.demo.settings import Architecture, DemoSettings, ModelSettings
from patch.files.folder import write_folder
from patch.files.strict_json import dump_json
from patch.models.facts import context_length
from patch.pruning.options import BlockOptions
from patch.runs.stages import STAGE_FILE, digest, finished

DEFAULT_WINDOW = 2048
# What differs from the demo's model.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    # No multiple of a tile's 128 rows and columns, so that nothing is tuned to one model; biases on q, k and v.
    "qwen2": {"hidden_size": 192, "intermediate_size": 456},
    "mixtral": {"intermediate_size": 256},
}


def model_settings(architecture: str) -> ModelSettings:
    """The demo's model; with "qwen2" a ragged one of that architecture, with "mixtral" a mixture of eight experts."""
    return dataclasses.replace(DemoSettings().model, architecture=architecture, **MODELS[architecture])


def demo_inputs(out: Path, architecture: str, say: Callable[[str], None]) -> tuple[str, str, str]:
    """Folder of a dense model, trained if it is not there, and files of its texts."""
    settings = model_settings(architecture)
    corpus = corpus_module.load_corpus()
    folder, key = out / "model", digest([dataclasses.asdict(settings), corpus.sha256, __version__, torch.__version__])
    if finished(folder, key) is None:
        model, tokenizer, numbers = demo_run.make_dense(corpus, settings, say)

        def write(directory: Path) -> None:
            model.save_pretrained(directory)
            tokenizer.save_pretrained(directory)
            for part in ("learn", "heldout"):
                # The one-shot rule for local text samples a joined text, as it will be here.
                (directory / f"{part}.jsonl").write_text(
                    "".join(json.dumps({"text": document}) + "\n" for document in getattr(corpus, part))
                )
            (directory / STAGE_FILE).write_bytes(dump_json({"key": key, "result": numbers}))

        write_folder(folder, write)
    return str(folder), str(folder / "learn.jsonl"), str(folder / "heldout.jsonl")


def study_parser(description: str) -> argparse.ArgumentParser:
    """Flags of `study_settings` and `open_study`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options = BlockOptions()
    parser.add_argument("--out", type=Path, required=True, help="folder of the cells and results")
    parser.add_argument("--model", help="dense model: folder or Hugging Face id (default: the demo's)")
    parser.add_argument("--architecture", choices=get_args(Architecture), help="of the demo's model (default llama)")
    parser.add_argument("--train", help="text for calibration and mask learning")
    parser.add_argument("--heldout", help="text to measure on")
    parser.add_argument("--text-field", help="column of a .jsonl or .parquet file")
    parser.add_argument("--window", type=int, help="tokens of a sample, block and window (default 2048 or the limit)")
    parser.add_argument("--heldout-windows", type=int, help="use only the first windows (default all)")
    parser.add_argument("--nsamples", type=int, default=128, help="calibration samples (default 128)")
    parser.add_argument(
        "--reconstruction-samples", type=int, default=512, help="samples of reconstruction by blocks (default 512)"
    )
    parser.add_argument("--block-epochs", type=int, default=options.epochs, help="passes of reconstruction by blocks")
    parser.add_argument("--block-lr", type=float, default=options.lr, help="learning rate of reconstruction by blocks")
    parser.add_argument("--tile", type=int, default=128, help="rows and columns of a tile (default 128)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float64"))
    parser.add_argument("--device", help="cpu or cuda (default cpu)")
    parser.add_argument("--threads", type=int, help="CPU threads (default torch's)")
    return parser


def listed(kind: Callable[[str], Any]) -> Callable[[str], tuple]:
    """Type of a flag that holds several values between commas."""
    return lambda text: tuple(kind(part) for part in text.split(",") if part)


def study_inputs(arguments: argparse.Namespace, say: Callable[[str], None]) -> tuple[str, str, str]:
    """Model, training text and held-out text; raises ValueError for flags that do not go together."""
    given = (arguments.model, arguments.train, arguments.heldout)
    if None in given and any(given):
        raise ValueError("expected --model, --train and --heldout together, or none of them for the demo's.")
    if None not in given:
        if arguments.architecture is not None:
            raise ValueError("expected --architecture without --model, got both. Leave one out.")
        return given
    return demo_inputs(arguments.out, arguments.architecture or "llama", say)


def study_settings(arguments: argparse.Namespace, model: str, **others: Any) -> Settings:
    """Settings from the flags of `study_parser`, and others by name."""
    from transformers import AutoConfig

    limit = context_length(AutoConfig.from_pretrained(model)) or DEFAULT_WINDOW
    return Settings(
        window=arguments.window or min(DEFAULT_WINDOW, limit),
        nsamples=arguments.nsamples,
        reconstruction_samples=arguments.reconstruction_samples,
        blocks=BlockOptions(epochs=arguments.block_epochs, lr=arguments.block_lr),
        heldout_windows=arguments.heldout_windows,
        tile=(arguments.tile, arguments.tile),
        **others,
    )


def open_study(
    arguments: argparse.Namespace, inputs: tuple[str, str, str], settings: Settings, **options: Any
) -> Study:
    """The study of these inputs with the flags of `study_parser`; options as of Study."""
    return Study(
        arguments.out,
        *inputs,
        settings,
        text_field=arguments.text_field,
        dtype=getattr(torch, arguments.dtype),
        device=arguments.device,
        **options,
    )


def about(module: str, argv: Sequence[str] | None, inputs: tuple[str, str, str], study: Study) -> dict[str, str]:
    """What was run, for the head of a table."""
    settings = study.settings
    return {
        "command": f"python -m {module} " + shlex.join(sys.argv[1:] if argv is None else argv),
        "model": inputs[0],
        "training text": inputs[1],
        "held-out text": f"{inputs[2]}, {len(study.heldout)} windows of {settings.window} tokens",
        "reconstruction by blocks": f"{settings.reconstruction_samples} samples of {settings.window} tokens, "
        f"{settings.blocks.epochs} passes, lr {settings.blocks.lr:g}",
        **harness.environment(),
    }
