"""`patch-llm fine-tune`: train what masks keep (and adapters) on text; writes checkpoints and an artifact."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from pydantic import model_validator

from patch.cli import inputs, outputs, plans
from patch.files.schema import part_of, record
from patch.settings import AtLeastOne, DistinctNames, NewPath, save_resolved, setting
from patch.slim.options import DEFAULT_BLOCK_SIZE, FineTuneOptions

if TYPE_CHECKING:
    from torch import Tensor, nn

NAME = "fine-tune"
SUMMARY = "train the kept weights and adapters of a masked model; pruned weights stay zero"
EXAMPLES = """\
examples:
  # a small model and a text of 1 MB, minutes on two cores:
  patch-llm fine-tune --model ./llama --masks learned --data text.txt --seqlen 256 --blocks 800 --batch-size 4 \\
      --local-batch-size 4 --lr 1e-4 --out tuned
  # as published, 468 steps of 64 blocks of 1024 tokens, for a GPU:
  patch-llm fine-tune --model ./llama --masks slim --data slimpajama --out tuned
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
    report_to: DistinctNames = setting((), "send metrics to wandb, tensorboard or trackio", metavar="A,B")

    @model_validator(mode="after")
    def _resumes_or_replaces(self) -> Options:
        outputs.refuse_both(self, "resume", "overwrite", "Keep the run or replace it.")
        self.total_steps(self.blocks)
        return self


def run(options: Options) -> None:
    """Train, and save the artifact in OUT/result; see the module's docstring."""
    settings = part_of(FineTuneOptions, options)
    complete = options.out / RESULT
    if options.resume and complete.exists():
        raise ValueError(f"--resume: expected an unfinished run, {complete} is complete. Use it as --masks.")
    masks = inputs.artifact_folder(options.masks)
    if options.overwrite:
        outputs.check_input_stays(masks, options.out)
    outputs.check_run_folder(options)
    inputs.check_text_source(options.data)
    from patch.artifacts.artifact import save_artifact
    from patch.models.structure import linear_at
    from patch.runs.arguments import rank, require_trackers
    from patch.runs.progress import StepLines, shows_bars
    from patch.slim.compress import adapters
    from patch.slim.fine_tune import check_fine_tuning, fine_tune, trained_parameters

    require_trackers("--report-to", options.report_to)
    model = inputs.load_model(options.model, dtype=options.dtype, device=options.device)
    artifact = inputs.put_masks(options, options.masks, model)
    covered = outputs.print_sparsity(model, artifact.masks)
    trained_parameters(model)  # refuses a model without anything to train before the text is read
    tokenizer = inputs.load_tokenizer(options.model)
    blocks, text_sha256 = _blocks(options, model, tokenizer)
    where: dict[str, Any] = {"output_dir": options.out, "resume": options.resume, "report_to": options.report_to}
    check_fine_tuning(model, blocks, settings, overwrite=options.overwrite, **where)
    if rank() == 0:
        _print_plan(options, model, blocks, tokenizer)
        if options.overwrite:
            outputs.clear_learning_run(options.out)
        resolved = dataclasses.replace(options, resume=False, overwrite=False)
        save_resolved(resolved, options.out, header="patch-llm fine-tune --config THIS_FILE --resume")
    result = fine_tune(model, blocks, settings, callbacks=() if shows_bars() else (StepLines(),), **where)
    if rank() != 0:
        return
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
    means = [f"{loss:.4f}" for _, loss in result.losses]
    losses = f": loss {' -> '.join([*means[:1], *means[1:][-1:]])}" if means else ""
    print(f"trained {len(result.trained)} layers for {result.steps} steps{losses}")
    next_step = f"patch-llm eval --model {options.model} --masks {options.out} --data TEXT"
    outputs.print_written(options.out / RESULT, "the trained weights", next_step)


def _print_plan(options: Options, model: nn.Module, blocks: Tensor, tokenizer: Any) -> None:
    """What will be done, and a warning where it will not lead far."""
    from patch.files.progress import say
    from patch.slim.fine_tune import trained_parameters

    steps = options.total_steps(len(blocks))
    plans.say_steps(steps, blocks, options.batch_size, options.epochs, options.data, tokenizer)
    trained = trained_parameters(model)
    count = sum(parameter.numel() for parameters in trained.values() for parameter in parameters)
    held = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    # fp32 copies of 16-bit parameters, gradients, and two moments.
    copies = sum(4 * p.numel() for parameters in trained.values() for p in parameters if p.element_size() == 2)
    say(
        f"plan: {len(trained)} layers with {count / 1e6:,.2f} M weights are trained; pruned ones stay zero; at least "
        f"{(held + copies + 12 * count) / 1e9:.2f} GB at the peak; a checkpoint every {options.save_steps} steps in "
        f"{options.out}"
    )
    plans.warn_of_few_steps(steps, ("--batch-size", options.batch_size), ("--epochs ", options.epochs))


def on_interrupt(options: Options) -> str:
    """Trainer keeps its checkpoints."""
    return outputs.kept_checkpoint(options.out) or (
        f"no checkpoint was written yet in {options.out}; run again with --overwrite (or --save-steps lower)"
    )


def _blocks(options: Options, model: nn.Module, tokenizer: Any) -> tuple[Tensor, str]:
    from patch.data.tokens import training_blocks
    from patch.models.facts import within_context

    seqlen = options.seqlen or within_context(model, DEFAULT_BLOCK_SIZE)
    return training_blocks(tokenizer, options.data, seqlen, max_blocks=options.blocks, text_field=options.text_field)
