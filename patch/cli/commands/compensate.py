"""`patch-llm compensate`: update the weights a mask keeps, so that the layers' outputs stay near the dense ones."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patch.cli import inputs, outputs
from patch.files.progress import say
from patch.files.schema import record
from patch.pruning.options import CompensationMethod, Damping, Precision
from patch.settings import RESOLVED_NAME, AtLeastOne, NewPath, dump_yaml, setting

if TYPE_CHECKING:
    from torch import Tensor

NAME = "compensate"
SUMMARY = "update the kept weights for a mask; perplexity before and after"
EXAMPLES = """\
examples:
  patch-llm compensate --model ./llama --masks learned --data train.txt --heldout heldout.txt --out compensated
  patch-llm compensate --model ./llama --masks learned --data wikitext2 --out compensated
      reads its calibration text from the training split and measures on the test split
"""


@record(kw_only=True)
class Options(inputs.CalibrationSettings, inputs.PlacementSettings):
    """Settings of `compensate`."""

    model: str = setting(help="the DENSE model the masks were made for: folder or Hugging Face id", metavar="MODEL")
    masks: str = setting(help="folder made by prune or learn", metavar="DIR")
    data: str = setting(help="calibration " + inputs.DATA_HELP, metavar="TEXT")
    out: NewPath = setting(help="folder to write", metavar="DIR")
    heldout: str | None = setting(
        None, "text to measure on (default: the evaluation split, if --data is a named set)", metavar="TEXT"
    )
    heldout_windows: AtLeastOne = setting(64, "held-out windows of seqlen tokens, at most")
    method: CompensationMethod = setting("least_squares", "least_squares (exact) or sparsegpt (cheaper)")
    damping: Damping = setting(0.01, "share of the Hessian's mean diagonal added to it", metavar="SHARE")
    precision: Precision = setting("fp32", "of the Hessian and the update")
    seqlen: inputs.TokensToPredict = setting(None, inputs.SEQLEN_HELP, metavar="N")
    overwrite: bool = setting(False, "replace an earlier result in --out")


def run(options: Options) -> None:
    """Compensate and save masks with updated weights; see the module's docstring."""
    out = outputs.check_new_folder(options.out, overwrite=options.overwrite, what="result")
    inputs.check_text_source(options.data)
    heldout_source = _heldout_source(options)
    masks = inputs.artifact_folder(options.masks)
    if options.overwrite:
        outputs.check_input_stays(masks, out)
    from patch.artifacts.artifact import save_artifact
    from patch.models.keep_masks import measured_sparsity, zeros_already
    from patch.models.structure import maskable_linears
    from patch.pruning import compensate

    model = inputs.load_model(options.model, dtype=options.dtype, device=options.device)
    source = inputs.load_masks(options.masks, model)
    # The update starts from dense weights and would undo what these did to them.
    inputs.refuse_further_steps(source.meta, options.masks, {"compression": "compress", "fine_tune": "fine-tune"})
    tokenizer = inputs.load_tokenizer(options.model)
    calibration, text_sha256 = inputs.load_calibration(options, model, tokenizer)
    seqlen = calibration.shape[1]
    heldout = _heldout_windows(options, tokenizer, heldout_source, seqlen)
    linears = maskable_linears(model)
    if found := zeros_already(linears):
        say(f"WARNING: {found}")
    result = compensate(
        model,
        source.masks,
        calibration=calibration,
        heldout=heldout,
        method=options.method,
        damping=options.damping,
        precision=options.precision,
        exclude=[name for name in linears if name not in source.masks],
    )
    resolved = dataclasses.replace(options, overwrite=False)  # repeating a run must not replace its result
    compensation = outputs.provenance(
        options.data,
        text_sha256,
        masks=options.masks,
        method=options.method,
        damping=options.damping,
        precision=options.precision,
        nsamples=options.nsamples,
        seqlen=seqlen,
        seed=options.seed,
        heldout=heldout_source,
        heldout_windows=len(heldout),
        perplexity_before=result.perplexity_before,
        perplexity_after=result.perplexity_after,
    )
    save_artifact(
        out,
        source.masks,
        meta=source.meta | {"compensation": dict(compensation)},
        tile_scores=source.tile_scores,
        tile_is_sparse=source.tile_is_sparse,
        weights={name: linears[name].weight for name in source.masks},
        extra={RESOLVED_NAME: dump_yaml(resolved, header="patch-llm compensate --config THIS_FILE")},
    )
    _print_errors(result.layer_errors)
    print(f"sparsity {measured_sparsity(source.masks):.4f}, as before")
    print(
        f"held-out perplexity ({len(heldout)} windows of {seqlen} tokens): "
        f"{result.perplexity_before:.4f} with the masks alone, {result.perplexity_after:.4f} after"
    )
    if result.is_worse:
        print("WARNING: this is WORSE than the masks alone; use those, more --nsamples, or a larger --damping")
    outputs.print_written(
        out, "masks and weights", f"patch-llm eval --model {options.model} --masks {options.masks},{out} --data TEXT"
    )


def on_interrupt(options: Options) -> str:
    """Compensation keeps nothing of a part."""
    return f"nothing was written to {options.out}; run the same command again"


def _heldout_source(options: Options) -> str:
    """Where the held-out text comes from; never the text the weights are fitted to."""
    from patch.data.sources import NAMED_SETS

    if options.heldout is None:
        if options.data not in NAMED_SETS:
            advice = "Give --heldout TEXT: perplexity before and after is measured on it."
            raise ValueError(f"heldout: expected a text that is not in --data, got none. {advice}")
        return options.data
    inputs.check_text_source(options.heldout, "--heldout")
    if options.data not in NAMED_SETS and Path(options.heldout).resolve() == Path(options.data).resolve():
        why = "The weights are fitted to --data, so perplexity on it says nothing."
        raise ValueError(f"heldout: expected another text than --data, got {options.heldout!r} for both. {why}")
    return options.heldout


def _heldout_windows(options: Options, tokenizer: Any, source: str, seqlen: int) -> Tensor:
    import torch

    from patch.data.tokens import evaluation_text, tokenize

    text, _ = evaluation_text(source, text_field=options.text_field)
    ids = torch.tensor(tokenize(tokenizer, [text])[0], dtype=torch.int64)
    windows = min(len(ids) // seqlen, options.heldout_windows)
    if windows == 0:
        raise ValueError(
            f"heldout: expected at least one window of {seqlen} tokens, {source!r} has {len(ids)} tokens. Give more "
            "text or a smaller --seqlen."
        )
    return ids[: windows * seqlen].reshape(windows, seqlen)


def _print_errors(errors: dict[str, tuple[float, float]]) -> None:
    if not errors:
        print("the masks prune nothing; all weights stay as they are")
        return
    before, after = (sum(pair[i] for pair in errors.values()) / len(errors) for i in (0, 1))
    print(f"updated {len(errors)} layers; mean relative output error on the calibration text:")
    print(f"  {before:.5f} with the masks alone, {after:.5f} after")
