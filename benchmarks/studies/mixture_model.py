"""Train the small mixture of experts of the study `benchmarks.studies.mixture`.

    python -m benchmarks.studies.mixture_model --text TRAIN.txt --out DIR

A Mixtral of 7.9 M weights (4 blocks of 8 experts, two of them for each token, hidden and inner size 256) and its
tokenizer (BPE, 2048), by the demo's code with transformers' load-balancing loss. About 20 minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from patch.data.tokens import text_sha256
from patch.demo import run as demo_run
from patch.demo.corpus import Corpus
from patch.demo.model import Stopwatch
from patch.demo.settings import ModelSettings
from patch.files.folder import write_folder
from patch.files.strict_json import dump_json

SETTINGS = ModelSettings(
    architecture="mixtral", vocab_size=2048, intermediate_size=256, layers=4, experts=8, steps=1400, batch_size=16
)
_DOCUMENT = 100_000  # characters of a piece of the text: tokenizers work on one at a time


def main(argv: Sequence[str] | None = None) -> None:
    """Train and write the folder of the model; training.json in it says how."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="text file to train on")
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    for name in ("steps", "layers", "hidden_size", "intermediate_size", "vocab_size"):
        default = getattr(SETTINGS, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--threads", type=int, help="CPU threads (default torch's)")
    given = vars(parser.parse_args(argv))
    text, out, threads = given.pop("text"), given.pop("out"), given.pop("threads")
    if threads:
        torch.set_num_threads(threads)
    if not text.is_file():
        raise SystemExit(f"mixture_model: --text: expected a text file, got {text}. Give a .txt of some megabytes.")
    try:
        settings = dataclasses.replace(SETTINGS, **given)
        documents = pieces(text.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SystemExit(f"mixture_model: {error}") from None
    clock = Stopwatch()
    model, tokenizer, numbers = demo_run.make_dense(
        Corpus(train=documents, learn=[], heldout=[], sha256=text_sha256(documents)),
        settings,
        lambda line: print(f"[{clock.seconds:7.1f} s] {line}", flush=True),
    )
    about = {"settings": dataclasses.asdict(settings), "seconds": round(clock.seconds), **numbers}

    def write(directory: Path) -> None:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        (directory / "training.json").write_bytes(dump_json(about))

    write_folder(out, write)


def pieces(text: str) -> list[str]:
    """The text in pieces that end at line ends and, joined, are the text."""
    found, start = [], 0
    while start < len(text):
        end = text.find("\n", start + _DOCUMENT) + 1 or len(text)
        found.append(text[start:end])
        start = end
    return found


if __name__ == "__main__":
    main()
