"""`patch-llm fine-tune`: train what masks keep (and adapters) on text; writes checkpoints and an artifact."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from pydantic import model_validator

from patch.cli import inputs, outputs
from patch.files.schema import part_of, record
from patch.settings import AtLeastOne, NewPath, save_resolved, setting
from patch.slim.options import DEFAULT_BLOCK_SIZE, FineTuneOptions

if TYPE_CHECKING:
    from torch import Tensor, nn

NAME = "fine-tune"
SUMMARY = "train the kept weights and adapters of a masked model; pruned weights stay zero"
EXAMPLES = """\
examples:
  patch-llm fine-tune --model ./llama --masks learned --data slimpajama --out tuned
  patch-llm fine-tune --model ./llama --masks slim --data train.jsonl --blocks 5000 --lr 5e-5 --out tuned
  patch-llm fine-tune --config tuned/config.resolved.yaml --resume              # go on after an interrupt
  patch-llm eval --model ./llama --masks learned,tuned --data heldout.txt
"""
RESULT = "result"


@record(kw_only=True)
class Options(FineTuneOptions, inputs.MaskSettings, inputs.PlacementSettings):
    """Settings of `fine-tune`: those of patch.slim.FineTuneOptions, and what is trained on what."""

    model: str = setting(help=inputs.MODEL_HELP + " (the dense model the masks were made from)", metavar="MODEL")
    masks: NewPath = setting(help="folder made by prune, learn or compress", metavar="DIR")
    data: str = setting(help=inputs.DATA_HELP, metavar="TEXT")
    out: NewPath = setting(help="folder for checkpoints and the result", metavar="DIR")
    text_field: str | None = setting(None, inputs.FIELD_HELP, metavar="NAME")
    seqlen: inputs.TokensToPredict = setting(
        None, "tokens per block (default 1024, or what the model allows)", metavar="N"
    )
    blocks: AtLeastOne = setting(30_000, "at most so many blocks of text")
    resume: bool = setting(False, "go on from the newest checkpoint in --out")
    overwrite: bool = setting(False, "replace an earlier run in --out")

    @model_validator(mode="after")
    def _resumes_or_replaces(self) -> Options:
        outputs.refuse_both(self, "resume", "overwrite", "Keep the run or replace it.")
        return self


def run(options: Options) -> None:
    """Train, and save the artifact in OUT/result; see the module's docstring."""
    settings = part_of(FineTuneOptions, options)
    complete = options.out / RESULT
    if options.resume and complete.exists():
        raise ValueError(f"--resume: expected an unfinished run, {complete} is complete. Use it as --masks.")
    outputs.check_run_folder(options)
    inputs.check_text_source(options.data)
    masks = inputs.artifact_folder(options.masks)
    if options.overwrite:
        outputs.check_input_stays(masks, options.out)
    from patch.artifacts.artifact import save_artifact
    from patch.models.structure import linear_at
    from patch.slim.compress import adapters
    from patch.slim.fine_tune import checkpoint_to_resume, fine_tune, trained_parameters

    model = inputs.load_model(options.model, dtype=options.dtype, device=options.device)
    artifact = inputs.put_masks(options, options.masks, model)
    covered = outputs.print_sparsity(model, artifact.masks)
    trained_parameters(model)  # refuses a model without anything to train before the text is read
    blocks, text_sha256 = _blocks(options, model)
    if options.resume:
        # Refuses another run before its config.resolved.yaml is replaced.
        checkpoint_to_resume(model, blocks, settings, options.out)
    if options.overwrite:
        outputs.clear_learning_run(options.out)
    resolved = dataclasses.replace(options, resume=False, overwrite=False)
    save_resolved(resolved, options.out, header="patch-llm fine-tune --config THIS_FILE --resume")
    result = fine_tune(model, blocks, settings, output_dir=options.out, resume=options.resume)
    training = dataclasses.asdict(settings) | {"blocks": list(blocks.shape)}
    source = outputs.provenance(options.data, text_sha256, **training)
    save_artifact(
        options.out / RESULT,
        artifact.masks,
        meta=artifact.meta | covered | {"fine_tune": source},
        tile_scores=artifact.tile_scores,
        tile_is_sparse=artifact.tile_is_sparse,
        weights={name: linear_at(model, name).weight for name in artifact.masks},
        adapters=adapters(model),
    )
    losses = f": loss {result.losses[0][1]:.4f} -> {result.losses[-1][1]:.4f}" if result.losses else ""
    print(f"trained {len(result.trained)} layers for {result.steps} steps{losses}")
    next_step = f"patch-llm eval --model {options.model} --masks {options.out} --data TEXT"
    outputs.print_written(options.out / RESULT, "the trained weights", next_step)


def on_interrupt(options: Options) -> str:
    """Trainer keeps its checkpoints."""
    return outputs.kept_checkpoint(options.out) or (
        f"no checkpoint was written yet in {options.out}; run again with --overwrite (or --save-steps lower)"
    )


def _blocks(options: Options, model: nn.Module) -> tuple[Tensor, str]:
    from patch.data.tokens import training_blocks
    from patch.models.facts import within_context

    seqlen = options.seqlen or within_context(model, DEFAULT_BLOCK_SIZE)
    tokenizer = inputs.load_tokenizer(options.model)
    return training_blocks(tokenizer, options.data, seqlen, max_blocks=options.blocks, text_field=options.text_field)
