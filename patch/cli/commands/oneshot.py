"""`patch-llm oneshot`: a dense model to a packed hybrid one: prune, reconstruct, measure, pack, open again."""

from __future__ import annotations

import dataclasses
import functools
import logging
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pydantic import model_validator

from patch import settings
from patch.cli import inputs, outputs
from patch.data.sources import DEFAULT_HELDOUT_WINDOWS
from patch.files.progress import duration, say
from patch.files.schema import default_of, fields_of, plain, record
from patch.pruning.one_shot_settings import OneShotSettings, default_nsamples
from patch.pruning.options import DEFAULT_SEQLEN
from patch.runs.stages import stages_folder
from patch.settings import AtLeastOne, NewPath, setting

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from patch.data.split import Texts
    from patch.pruning.counts import Counts

logger = logging.getLogger(__name__)

NAME = "oneshot"
SUMMARY = "a dense model to a packed one in one go: prune, reconstruct, measure, pack, check"
EXAMPLES = """\
examples:
  patch-llm oneshot --model ./llama --data text.txt --out packed
  patch-llm oneshot --model ./llama --data wikitext2 --sparsity 0.35 --out packed
  patch-llm oneshot --model ./llama --data text.txt --seqlen 256 --nsamples 128 --out packed     # quicker
  patch-llm oneshot --model meta-llama/Llama-3.1-8B --offload --dry-run      # time and memory, nothing is loaded

Perplexity is measured on the evaluation split of a named set, or on --heldout, or on the last tenth of a --data file,
which is then not calibrated on. After an interrupt the same command goes on: finished stages are in OUT.stages until
all is done. --out gets the packed model and a README.md with what was done and the numbers.
"""
_NOT_OF_THE_RESULT = ("overwrite", "keep_stages", "dry_run")


@record(kw_only=True)
class Options(OneShotSettings, inputs.CalibrationSettings, inputs.PlacementSettings):
    """Settings of `oneshot`."""

    model: str = setting(help=inputs.MODEL_HELP, metavar="MODEL")
    data: str | None = setting(None, f"{inputs.DATA_HELP} (required unless --dry-run)", metavar="TEXT")
    out: NewPath | None = setting(None, "folder for the packed model (required unless --dry-run)", metavar="DIR")
    heldout: str | None = setting(
        None,
        "text to measure on (default: the evaluation split of a named set, the last tenth of a file)",
        metavar="TEXT",
    )
    heldout_windows: AtLeastOne = setting(DEFAULT_HELDOUT_WINDOWS, "held-out windows of seqlen tokens, at most")
    nsamples: AtLeastOne | None = setting(  # type: ignore[assignment]  # as many as make some tokens
        None, "calibration samples (default: 131072 tokens, at least 128 samples)"
    )
    seqlen: inputs.TokensToPredict = setting(None, inputs.SEQLEN_HELP, metavar="N")
    offload: bool = setting(False, "keep the model in host memory and put one block at a time on --device")
    keep_stages: bool = setting(False, "keep OUT.stages, which holds masks and weights, when all is done")
    overwrite: bool = setting(False, "replace an earlier export in --out")
    dry_run: bool = setting(False, "print the plan, with time and memory, from the model's config.json alone")

    @property
    def folder(self) -> Path:
        """--out, which is there unless this is a dry run."""
        return cast(Path, self.out)

    @model_validator(mode="after")
    def _fits_together(self) -> Options:
        settings.require_given(name for name in ("data", "out") if getattr(self, name) is None and not self.dry_run)
        return self


def run(options: Options) -> None:
    """Check, say the plan, and do what is not done yet; see the module's docstring."""
    if options.dry_run:
        print("\n".join(_plan(options, _shapes(options), inputs.device_of(options.device))))
        return
    outputs.check_new_folder(options.folder, overwrite=options.overwrite, what="export")
    source = inputs.check_text_source(options.data)
    from patch.data.split import require_two_texts
    from patch.jobs.oneshot import Job, check_stages_folder, summary

    check_stages_folder(options.folder)
    if options.heldout is not None:
        inputs.check_text_source(options.heldout, "--heldout")
    require_two_texts(source, options.heldout)
    device = inputs.device_of(options.device)
    shapes = _shapes(options)
    tokenizer = inputs.load_tokenizer(options.model)
    texts = _texts(options, shapes, tokenizer)
    for line in _plan(options, shapes, device, texts):
        say(line)
    job = Job(
        out=options.folder,
        load=functools.partial(
            inputs.load_model, options.model, dtype=options.dtype, device="cpu" if options.offload else str(device)
        ),
        tokenizer=tokenizer,
        texts=texts,
        settings=_own(options),
        model=options.model,
        command=command_of(options),
        device=device if options.offload else None,
        replace=options.overwrite,
        keep_stages=options.keep_stages,
    )
    outcome = job.run()
    for line in (*summary(outcome), *outcome.warnings):
        print(line)
    next_step = f"patch-llm generate --model {outcome.out} --prompt 'Once'"
    outputs.print_written(outcome.out, "the packed model and its README.md", None if outcome.warnings else next_step)


def on_interrupt(options: Options) -> str:
    """Finished stages stay."""
    if options.dry_run:
        return "nothing was started"
    from patch.jobs.oneshot import kept_stages

    if kept := kept_stages(options.folder):
        where = stages_folder(options.folder)
        return f"what is finished ({', '.join(kept)}) is kept in {where}; run the same command again to go on"
    return f"nothing was written to {options.out}; run the same command again"


def command_of(options: Options) -> str:
    """The command line that gives these options, with what is not a default."""
    first, fields = ("model", "data", "sparsity", "out"), fields_of(Options)
    words = ["patch-llm", NAME]
    for name in (*first, *(name for name in fields if name not in (*first, *_NOT_OF_THE_RESULT))):
        value = getattr(options, name)
        if name not in first and value == default_of(fields[name]):
            continue
        flag = f"--{name.replace('_', '-')}"
        value = plain(value)
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        words += [flag] if value is True else [flag, text]
    return shlex.join(words)


def _shapes(options: Options) -> PreTrainedModel:
    """The model without its weights, in the dtype that they have; refused where a layer fits no 2:4 pattern."""
    from patch.models.structure import maskable_linears
    from patch.pruning.selection import check_width

    model = cast("PreTrainedModel", inputs.load_model_shapes(options.model))
    for name, linear in maskable_linears(model, options.exclude).items():
        check_width(linear.in_features, "tiles", f"layer '{name}'")
    return model


def _own(options: Options) -> OneShotSettings:
    return OneShotSettings(**{name: getattr(options, name) for name in fields_of(OneShotSettings)})


def _seqlen(options: Options, model: nn.Module) -> int:
    from patch.models.facts import within_context

    return options.seqlen or within_context(model, DEFAULT_SEQLEN)


def _texts(options: Options, model: nn.Module, tokenizer: Any) -> Texts:
    """Calibration and held-out tokens, checked against the model."""
    from patch.data.split import calibration_and_heldout
    from patch.models.checks import require_seqlen, require_tokens

    seqlen = _seqlen(options, model)
    require_seqlen(model, seqlen)
    texts = calibration_and_heldout(
        tokenizer,
        cast(str, options.data),
        options.heldout,
        nsamples=options.nsamples or default_nsamples(seqlen),
        seqlen=seqlen,
        seed=options.seed,
        text_field=options.text_field,
        max_windows=options.heldout_windows,
    )
    require_tokens(model, texts.calibration, "calibration")
    require_tokens(model, texts.heldout, "heldout")
    return texts


def _plan(options: Options, model: PreTrainedModel, device: torch.device, texts: Texts | None = None) -> list[str]:
    """What will be done, with time and memory; texts are not read for a dry run, which says more of both."""
    from patch.evaluate.tables import format_table
    from patch.models.structure import maskable_linears
    from patch.pruning import costs
    from patch.pruning.permutation import can_permute

    own_settings = _own(options)
    if not can_permute(model):
        own_settings = dataclasses.replace(own_settings, reorder=False)
    seqlen = _seqlen(options, model)
    samples = options.nsamples or default_nsamples(seqlen)
    linears = maskable_linears(model, options.exclude)
    weights = sum(linear.weight.numel() for linear in linears.values())
    windows = options.heldout_windows if texts is None else len(texts.heldout)
    order = "reorder channels; " if own_settings.reorder else ""
    lines = [
        f"{len(linears)} linear layers with {weights / 1e6:,.2f} M weights, {options.sparsity:.0%} of them to be zero",
        f"{order}prune with {options.method}, tiles by {options.tiles_by}; "
        f"reconstruct by {options.reconstruct}; on {samples} samples of {seqlen} tokens ({samples * seqlen:,} tokens)",
        f"measure on {windows} windows of {seqlen} tokens{'' if texts is None else f': {texts.where}'}",
    ]
    dtype = _dtype(options, model)
    counts = _counts(model, seqlen, dtype, options.exclude)
    if counts is None:
        return [f"plan: {line}" for line in (*lines, "time and memory are not known for this architecture")]
    here: costs.Placement = "cpu" if device.type == "cpu" else "offload" if options.offload else "gpu"
    placements: tuple[costs.Placement, ...] = (here, "gpu", "offload")
    sizes = {"nsamples": samples, "windows": windows}
    own, whole, offloaded = (
        costs.oneshot_costs(counts, own_settings, **sizes, placement=placement) for placement in placements
    )
    rates = costs.measured_rates(device, dtype)
    stages = dict.fromkeys(step.stage for step in own.steps)
    each = ", ".join(f"{stage} {duration(own.seconds(rates, stage))}" for stage in stages)
    lines.append(f"about {duration(own.seconds(rates))} on this machine, by a model that may be far off: {each}")
    lines.append(f"peak memory {costs.peaks_text(own)}")
    lines = [f"plan: {line}" for line in lines]
    if texts is None:
        lines += ["", format_table(costs.table(own, rates)), "", *costs.fits_text(whole, offloaded)]
    return lines


def _dtype(options: Options, model: PreTrainedModel) -> torch.dtype:
    wanted = inputs.dtype_of(options.dtype)
    return model.dtype if isinstance(wanted, str) else wanted


def _counts(model: PreTrainedModel, seqlen: int, dtype: torch.dtype, exclude: Sequence[str]) -> Counts | None:
    """Operations of the model, None for one that cannot be walked without its weights; no model is refused for that."""
    from patch.pruning.counts import counted

    try:
        return counted(model.config, seqlen=seqlen, dtype=dtype, exclude=exclude)
    except Exception as error:  # of whatever code a model brings, run on tensors without contents
        logger.info("no estimate of time and memory: %s", error)
        return None
