"""`patch-llm demo`: the main job on a small model, in a few minutes on a CPU."""

from __future__ import annotations

from pathlib import Path

from patch.cli import outputs
from patch.cli.inputs import hide_bars_without_terminal
from patch.demo.settings import DemoSettings
from patch.files.paths import require_folder, require_place_for_folder
from patch.files.schema import record
from patch.settings import NewPath, save_resolved, setting

NAME = "demo"
SUMMARY = "train a small model, prune, reconstruct, learn a mask, compare, pack and generate (a few minutes)"
EXAMPLES = """\
examples:
  patch-llm demo --out demo
  patch-llm demo --out demo --all
      the same and, from there, MaskLLM and masks with 35 and 25 % zeros
  patch-llm demo --out demo --set settings.learn.steps=1000

Run the same command again after an interrupt: finished stages are reused. --out holds results.csv, perplexity.png,
tiles.png and one folder per stage; demo/dense, demo/packed and demo/pruned are models for the other commands,
demo/text.txt and demo/heldout.txt texts for them.
"""


@record
class Options:
    """Settings of `demo`."""

    out: NewPath = setting(Path("demo-results"), "folder to write", metavar="DIR")
    text: NewPath | None = setting(None, "folder of .py files (default: Python's standard library)", metavar="DIR")
    all: bool = setting(False, "also MaskLLM, and hybrid and learned masks at settings.more_targets")
    settings: DemoSettings = setting(factory=DemoSettings)


def run(options: Options) -> None:
    """Run all stages that are not finished."""
    outputs.claim(require_place_for_folder("--out", options.out))
    if options.text is not None:
        require_folder("--text", options.text, "a folder of .py files")
    from patch.demo.run import Demo

    hide_bars_without_terminal()
    demo = Demo(options.out, options.settings, text=options.text, everything=options.all)
    save_resolved(options, options.out, header="patch-llm demo --config THIS_FILE")
    demo.run()


def on_interrupt(options: Options) -> str:
    """Finished stages stay."""
    return f"finished stages are kept in {options.out}; run the same command to go on"
