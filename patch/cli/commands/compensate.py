"""`patch-llm compensate`: update the weights a mask keeps, so that the outputs stay near the dense ones."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from patch.cli import inputs, outputs
from patch.data.sources import DEFAULT_HELDOUT_WINDOWS
from patch.files.progress import say
from patch.files.schema import record
from patch.pruning.options import BlockOptions, CompensationMethod, Damping, ExpertOptions, Precision
from patch.runs.stages import remove_stages, stages_folder
from patch.settings import RESOLVED_NAME, AtLeastOne, NewPath, Positive, dump_yaml, setting

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from patch.pruning import Compensation

NAME = "compensate"
SUMMARY = "update the kept weights for a mask; perplexity before and after"
EXAMPLES = """\
examples:
  patch-llm compensate --model ./llama --masks hybrid --data train.txt --heldout heldout.txt --nsamples 512 \\
      --seqlen 256 --out reconstructed
  patch-llm compensate --model ./llama --masks learned --data train.txt --heldout heldout.txt --out compensated
  patch-llm compensate --model ./llama --masks learned --data wikitext2 --out compensated
      reads its calibration text from the training split and measures on the test split
  patch-llm compensate --model ./llama --masks learned --data c4 --method least_squares --out compensated
      layer by layer, without training: less memory and time
"""


@record(kw_only=True)
class Options(inputs.ExpertSettings, inputs.CalibrationSettings, inputs.MaskSettings, inputs.PlacementSettings):
    """Settings of `compensate`."""

    model: str = setting(help="the DENSE model the masks were made for: folder or Hugging Face id", metavar="MODEL")
    masks: str = setting(help="folder made by prune or learn", metavar="DIR")
    data: str = setting(help="calibration " + inputs.DATA_HELP, metavar="TEXT")
    out: NewPath = setting(help="folder to write", metavar="DIR")
    heldout: str | None = setting(
        None, "text to measure on (default: the evaluation split, if --data is a named set)", metavar="TEXT"
    )
    heldout_windows: AtLeastOne = setting(DEFAULT_HELDOUT_WINDOWS, "held-out windows of seqlen tokens, at most")
    method: CompensationMethod | None = setting(
        None,
        "blocks (trains each block; default where memory allows), least_squares (each layer) or sparsegpt (cheaper)",
    )
    epochs: AtLeastOne | None = setting(None, "blocks: passes over the calibration samples (default 2)")
    lr: Positive | None = setting(
        None, "blocks: learning rate in root mean squares of a layer's weights (default 0.02)", metavar="LR"
    )
    batch_size: AtLeastOne | None = setting(
        None, "blocks: calibration samples a step (default: 8, or fewer for 128 steps)"
    )
    damping: Damping = setting(0.01, "share of the Hessian's mean diagonal added to it", metavar="SHARE")
    precision: Precision = setting("fp32", "of the Hessian and the update")
    seqlen: inputs.TokensToPredict = setting(None, inputs.SEQLEN_HELP, metavar="N")
    overwrite: bool = setting(False, "replace an earlier result in --out")


def run(options: Options) -> None:
    """Compensate and save masks with updated weights; see the module's docstring."""
    blocks = _block_options(options)
    out = outputs.check_new_folder(options.out, overwrite=options.overwrite, what="result")
    inputs.check_text_source(options.data)
    heldout_source = _heldout_source(options)
    masks = inputs.artifact_folder(options.masks)
    if options.overwrite:
        outputs.check_input_stays(masks, out)
    from patch.artifacts.artifact import save_artifact
    from patch.data.split import heldout_windows
    from patch.data.tokens import evaluation_text
    from patch.evaluate.results import broken_perplexity
    from patch.models.keep_masks import zeros_already
    from patch.models.structure import maskable_linears, vocabulary_size
    from patch.pruning import compensate

    model = inputs.load_model(options.model, dtype=options.dtype, device=options.device)
    source = inputs.load_masks(options, options.masks, model)
    # The update starts from dense weights and would undo what these did to them.
    inputs.refuse_further_steps(source.meta, options.masks, {"compression": "compress", "fine_tune": "fine-tune"})
    tokenizer = inputs.load_tokenizer(options.model)
    calibration, text_sha256 = inputs.load_calibration(options, model, tokenizer)
    seqlen = calibration.shape[1]
    text, _ = evaluation_text(heldout_source, text_field=options.text_field)
    heldout = heldout_windows(tokenizer, text, heldout_source, seqlen, options.heldout_windows)
    linears = maskable_linears(model)
    method = _method(options, model, calibration, blocks)
    blocks = blocks.for_samples(len(calibration)) if blocks is not None and method == "blocks" else None
    if found := zeros_already(linears):
        say(f"WARNING: {found}")
    stages = stages_folder(out)
    result = compensate(
        model,
        source.masks,
        calibration=calibration,
        heldout=heldout,
        method=method,
        damping=options.damping,
        precision=options.precision,
        blocks=blocks,
        experts=ExpertOptions(options.expert_tokens, options.few_experts),
        stages=None if blocks is None else stages,
        exclude=[name for name in linears if name not in source.masks],
    )
    # Repeating a run must not replace its result.
    resolved = dataclasses.replace(options, method=method, overwrite=False)
    compensation = outputs.provenance(
        options.data,
        text_sha256,
        masks=options.masks,
        method=method,
        damping=options.damping,
        precision=options.precision,
        blocks=None if blocks is None else dataclasses.asdict(blocks),
        nsamples=options.nsamples,
        seqlen=seqlen,
        seed=options.seed,
        heldout=heldout_source,
        heldout_windows=len(heldout),
        perplexity_before=result.perplexity_before,
        perplexity_after=result.perplexity_after,
    )
    _print_errors(result)
    covered = outputs.print_sparsity(model, source.masks)
    out = save_artifact(
        out,
        source.masks,
        meta=source.meta | covered | {"compensation": dict(compensation)},
        tile_scores=source.tile_scores,
        tile_is_sparse=source.tile_is_sparse,
        weights={name: linears[name].weight for name in source.masks},
        extra={RESOLVED_NAME: dump_yaml(resolved, header="patch-llm compensate --config THIS_FILE")},
        replace=options.overwrite,
    )
    if blocks is not None:
        remove_stages(stages)
    print(
        f"held-out perplexity ({len(heldout)} windows of {seqlen} tokens): "
        f"{result.perplexity_before:.4f} with the masks alone, {result.perplexity_after:.4f} after"
    )
    broken = broken_perplexity(result.perplexity_after or 0.0, vocabulary_size(model))
    if broken is not None:
        print(f"WARNING: the perplexity after is {broken}")
    if result.is_worse:
        print("WARNING: this is WORSE than the masks alone; use those, more --nsamples, or a larger --damping")
    next_step = f"patch-llm eval --model {options.model} --masks {options.masks},{out} --data TEXT"
    outputs.print_written(out, "masks and weights", None if broken else next_step)


def on_interrupt(options: Options) -> str:
    """Compensation keeps nothing of a part but finished blocks."""
    stages = stages_folder(options.out)
    if stages.is_dir():
        done = sum(path.name.startswith("block-") for path in stages.iterdir())
        return f"{done} finished blocks are kept in {stages}; the same command again goes on after them"
    return f"nothing was written to {options.out}; run the same command again"


def _block_options(options: Options) -> BlockOptions | None:
    """How blocks are trained, None with another method, whose settings of that are refused."""
    values = {"epochs": options.epochs, "lr": options.lr, "batch_size": options.batch_size}
    given: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
    if options.method in (None, "blocks"):
        return BlockOptions(**given, seed=options.seed)
    for name, value in given.items():
        advice = "Leave it out, or use --method blocks."
        raise ValueError(f"{name}: expected none with method {options.method}, got {value!r}. {advice}")
    return None


def _method(
    options: Options, model: PreTrainedModel, calibration: Tensor, blocks: BlockOptions | None
) -> CompensationMethod:
    """The method that was asked for; without one, blocks where the memory that is left is enough for it."""
    from patch.pruning.plan import free_bytes, reconstruction_bytes

    is_asked_for = options.method is not None or any((options.epochs, options.lr, options.batch_size))
    if blocks is None or is_asked_for:
        return options.method or "blocks"
    size = blocks.samples_a_step(len(calibration))
    needed, free = reconstruction_bytes(model, calibration, size), free_bytes(model.device)
    if needed <= free:
        return "blocks"
    advice = "Give --method blocks to try it all the same, with a smaller --batch-size, --nsamples or --seqlen"
    say(f"method least_squares: blocks needs about {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free. {advice}")
    return "least_squares"


def _heldout_source(options: Options) -> str:
    """Where the held-out text comes from; never the text the weights are fitted to."""
    from patch.data.sources import NAMED_SETS
    from patch.data.split import require_two_texts

    if options.heldout is None:
        if options.data not in NAMED_SETS:
            advice = "Give --heldout TEXT: perplexity before and after is measured on it."
            raise ValueError(f"heldout: expected a text that is not in --data, got none. {advice}")
        return options.data
    inputs.check_text_source(options.heldout, "--heldout")
    require_two_texts(options.data, options.heldout)
    return options.heldout


def _print_errors(result: Compensation) -> None:
    if not result.layer_errors and not result.block_errors:
        print("the masks prune nothing; all weights stay as they are")
        return
    for what, errors, begin, end in (
        ("updated {} layers", result.layer_errors, "with the masks alone", "after"),
        ("trained {} blocks", result.block_errors, "before", "after"),
    ):
        if errors:
            before, after = (sum(pair[i] for pair in errors.values()) / len(errors) for i in (0, 1))
            print(f"{what.format(len(errors))}; mean relative output error on the calibration text:")
            print(f"  {before:.5f} {begin}, {after:.5f} {end}")
