"""Zeros or fewer bits: perplexity against bytes a weight, dense and hybrid, from 16 bits to 2.

    python -m benchmarks.studies.bits --out build/bits                                        the demo's model and text
    python -m benchmarks.studies.bits --model DIR_OR_HUB_ID --train TEXT --heldout TEXT --out DIR

The hybrids are those of benchmarks.studies.quality, reconstructed by blocks, and may share its --out. Every model is
rounded to nearest, and once more with each decoder block trained through the rounding. Rounding is simulated: there is
no kernel for it here. Bytes a weight hold codes, scales of 16 bits and the 2 bits that say where a kept weight of a 2:4
group is, and count pruned weights as weights.

A result that was made with the same settings is not made again.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.studies import bits_report, rounding
from benchmarks.studies.quality_cells import all_cells
from benchmarks.studies.quality_inputs import about, listed, open_study, study_inputs, study_parser, study_settings
from benchmarks.studies.quality_study import Cell, Study, write_stage
from patch.artifacts.artifact import load_artifact
from patch.demo.model import Stopwatch
from patch.files.strict_json import dump_json
from patch.models.structure import maskable_linears
from patch.runs.stages import digest, finished
from patch.slim.options import Grid

METHOD = "sparsegpt"
BITS = (rounding.FULL_BITS, 8, 5, 4, 3, 2)


class Variant:
    """A model before rounding, dense or hybrid; made when it is first needed."""

    def __init__(self, study: Study, seed: int, cells: dict[str, Cell], target: float) -> None:
        """target: share of zeros, 0 for the dense model."""
        self.study, self.seed, self.target = study, seed, target
        cell = cells["dense" if target == 0 else f"{METHOD}-tiles-{100 * target:g}"]
        self.name, self.label = cell.name, "dense" if target == 0 else f"hybrid {100 * target:g} %"
        study.result(cell, seed, cells)
        self.key = study.key_of(cell, seed)
        if target == 0:
            self.masks = {
                name: torch.ones_like(linear.weight, dtype=torch.bool)
                for name, linear in maskable_linears(study.dense()).items()
            }
        else:
            self.masks = load_artifact(study.folder(cell, seed)).masks

    @functools.cached_property
    def _weights(self) -> dict[str, Tensor]:
        stages = self.study.out / "bits" / f"{self.name}-seed{self.seed}-blocks"
        return self.study.reconstructed(self.masks, self.seed, "blocks", stages).state_dict()

    def model(self) -> nn.Module:
        """A fresh copy."""
        model = self.study.dense()
        if self.target:
            model.load_state_dict(self._weights)
        return model


def measure(variant: Variant, bits: int, group: int) -> dict[str, Any]:
    """Perplexity of a variant rounded to nearest and with reconstruction; at full bits as it is, without columns."""
    study = variant.study
    stages: dict[str, Callable[[], nn.Module]] = {"rounded": functools.partial(_rounded, variant, bits, group)}
    own: dict[str, Any] = {"bits": bits, "group": group}
    if bits < rounding.FULL_BITS:
        stages["reconstructed"] = functools.partial(_reconstructed, variant, bits, group)
    row: dict[str, Any] = {
        "model": variant.label,
        "target": variant.target,
        "bits": bits,
        "bytes_a_weight": round(rounding.bytes_a_weight(variant.masks, bits, group), 4),
    }
    for column, make in stages.items():
        settings = study.compensation_settings("blocks") if variant.target or column == "reconstructed" else None
        key = digest({"variant": variant.key, "own": own, "column": column, "blocks": settings})
        folder = study.out / "bits" / f"{variant.name}-{bits}-{column}-seed{variant.seed}"
        found = finished(folder, key)
        if found is None:
            found = {"perplexity": study.perplexity(make())}
            write_stage(folder, dump_json({"key": key, "result": found}))
        study.say(f"{variant.label}, {bits} bits, {column}: {found['perplexity']:.3f}")
        row[column] = round(found["perplexity"], 4)
    return row | ({} if "reconstructed" in row else {"reconstructed": ""})


def _rounded(variant: Variant, bits: int, group: int) -> nn.Module:
    model = variant.model()
    if bits < rounding.FULL_BITS:
        rounding.round_to_nearest(model, variant.masks, bits, group)
    return model


def _reconstructed(variant: Variant, bits: int, group: int) -> nn.Module:
    study, model = variant.study, variant.model()
    samples = study.calibration(variant.seed, study.settings.reconstruction_samples)
    options = dataclasses.replace(study.settings.blocks, seed=variant.seed)
    rounding.fit_rounded(model, study.dense(), variant.masks, samples, bits=bits, group=group, options=options)
    return model


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Run the study and write bits.md, bits.csv and bits.png; returns the rows."""
    arguments = _parser().parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    clock = Stopwatch()

    def say(text: str) -> None:
        print(f"[{clock.seconds:7.1f} s] {text}", flush=True)

    try:
        for bits in arguments.bits:
            if bits != rounding.FULL_BITS:
                Grid(bits, arguments.group)
        inputs = study_inputs(arguments, say)
        settings = study_settings(arguments, inputs[0], targets=tuple(t for t in arguments.targets if t))
        cells = all_cells(settings)
        study = open_study(arguments, inputs, settings, say=say)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"bits: {error}") from None
    rows = []
    for target in arguments.targets:
        variant = Variant(study, arguments.seed, cells, target)
        rows += [measure(variant, bits, arguments.group) for bits in arguments.bits]
    out: Path = arguments.out
    head: Mapping[str, str] = about("benchmarks.studies.bits", argv, inputs, study)
    bits_report.write(out, rows, head, arguments.group)
    say(f"wrote {out / 'bits.md'}, bits.csv and bits.png")
    return rows


def _parser() -> argparse.ArgumentParser:
    parser = study_parser(__doc__ or "")
    parser.add_argument("--targets", type=listed(float), default=(0.0, 0.45, 0.25), help="shares of zeros, 0: dense")
    parser.add_argument("--bits", type=listed(int), default=BITS, help="2 to 8, or 16 for not rounded")
    parser.add_argument("--group", type=int, default=128, help="weights of a row that share a scale (default 128)")
    parser.add_argument("--seed", type=int, default=0, help="draws the calibration samples (default 0)")
    return parser


if __name__ == "__main__":
    main()
