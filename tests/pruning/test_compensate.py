"""Compensation of a given mask: against plain least squares in fp64, against SparseGPT itself, on whole models."""

from __future__ import annotations

import copy
import logging
import os

import pytest
import torch
from support.models import build_byte_tokenizer, build_spread_model

from patch import cli
from patch.artifacts.apply import apply_artifact
from patch.artifacts.artifact import load_artifact, save_artifact
from patch.cli import inputs
from patch.evaluate.cross_entropy import perplexity
from patch.models.facts import fingerprints
from patch.models.keep_masks import keep_masks
from patch.models.structure import maskable_linears
from patch.pruning import COMPENSATIONS, PruneOptions, compensate, prune_model, reconstruction
from patch.pruning.compensation import compensated, output_error
from patch.pruning.hessian import Statistics, eliminate
from patch.pruning.plan import free_bytes

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}


def token_ids(samples=4, seqlen=32, seed=0):
    return torch.randint(0, 256, (samples, seqlen), generator=torch.Generator().manual_seed(seed))


def build(dtype=torch.float32):
    """A tiny Llama whose weights are large enough that a mask matters."""
    return build_spread_model(scale=0.3, dtype=dtype, **SMALL)


def random_masks(model, share=0.4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(linear.weight.shape, generator=generator) >= share
        for name, linear in maskable_linears(model).items()
    }


def make_layer(n=5, k=12, seed=0):
    """Weight (n, k), correlated inputs of three samples, and a mask with an empty and a full row."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator, dtype=torch.float64)
    mix = torch.eye(k, dtype=torch.float64) + 0.3 * torch.randn(k, k, generator=generator, dtype=torch.float64)
    inputs = [torch.randn(20 + 5 * j, k, generator=generator, dtype=torch.float64) @ mix for j in range(3)]
    keep = torch.rand(n, k, generator=generator) > 0.5
    keep[0], keep[1] = True, False
    return weight, inputs, keep


def hessian_of(inputs):
    statistics = Statistics(inputs[0].shape[1], dtype=torch.float64)
    for x in inputs:
        statistics.add(x)
    return statistics.hessian


def least_squares_reference(weight, inputs, keep, damping):
    """Row by row: fit the kept weights to the dense row's outputs and, weighted by the damping, to the row itself."""
    hessian = sum(2 * x.T @ x for x in inputs) / len(inputs)
    ridge = (damping * hessian.diagonal().mean()).sqrt()
    design = torch.cat(
        [x * (2 / len(inputs)) ** 0.5 for x in inputs] + [ridge * torch.eye(weight.shape[1], dtype=torch.float64)]
    )
    result = torch.zeros_like(weight)
    for row, kept, out in zip(weight, keep, result, strict=True):
        if kept.any():
            out[kept] = torch.linalg.lstsq(design[:, kept], design @ row).solution
    return result


@pytest.mark.parametrize("damping", [0.01, 0.5])
def test_least_squares_is_the_least_squares_fit_of_every_row(damping):
    weight, inputs, keep = make_layer()
    options = PruneOptions("unstructured", 0.0, damping=damping, precision="fp64")
    got = compensated(weight, keep, hessian_of(inputs), method="least_squares", options=options)
    expected = least_squares_reference(weight, inputs, keep, damping)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(got[0], weight[0])
    assert not got[~keep].any()


def test_small_systems_are_solved_in_chunks_of_rows(monkeypatch):
    weight, inputs, keep = make_layer(n=9)
    inverse = torch.linalg.inv(hessian_of(inputs))
    whole = eliminate(weight, inverse, ~keep)
    monkeypatch.setattr("patch.pruning.hessian._SYSTEM_ELEMS", 1)
    torch.testing.assert_close(eliminate(weight, inverse, ~keep), whole, rtol=1e-12, atol=1e-12)


def test_output_error_is_the_relative_error_of_the_outputs():
    weight, inputs, keep = make_layer()
    masked = weight.masked_fill(~keep, 0)
    lost = sum(float((x @ (masked - weight).T).square().sum()) for x in inputs)
    whole = sum(float((x @ weight.T).square().sum()) for x in inputs)
    assert output_error(masked, weight, hessian_of(inputs)) == pytest.approx(lost / whole, rel=1e-12)
    assert output_error(weight, torch.zeros_like(weight), torch.zeros(12, 12)) == 0.0


@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
def test_the_sweep_with_the_mask_of_sparsegpt_gives_the_weights_of_sparsegpt(pattern):
    sparsity = 0.5 if pattern == "2:4" else 0.4
    pruned = build(torch.float64)
    masks = prune_model(
        pruned, "sparsegpt", pattern=pattern, sparsity=sparsity, calibration=token_ids(), progress=False
    )
    model = build(torch.float64)
    compensate(model, masks, calibration=token_ids(), method="sparsegpt", progress=False)
    for (name, linear), other in zip(maskable_linears(model).items(), maskable_linears(pruned).values(), strict=True):
        assert torch.equal(linear.weight, other.weight), name


def test_blocks_see_what_the_updated_blocks_before_them_produce():
    """Against plain runs of the whole model: block by block, inputs recorded by hooks, rows fitted one by one."""
    model, reference = build(torch.float64), build(torch.float64)
    masks, ids = random_masks(model), token_ids()
    compensate(model, masks, calibration=ids, method="least_squares", progress=False)
    for block in range(2):
        members = {n: m for n, m in maskable_linears(reference).items() if f"layers.{block}." in n}
        seen = {name: [] for name in members}
        handles = [
            linear.register_forward_pre_hook(lambda _, args, inputs=seen[name]: inputs.append(args[0][0]))
            for name, linear in members.items()
        ]
        with torch.no_grad():
            for sample in ids:
                reference(input_ids=sample[None], use_cache=False)
        for handle in handles:
            handle.remove()
        for name, linear in members.items():
            linear.weight.data = least_squares_reference(linear.weight.data, seen[name], masks[name], 0.01)
    for name, linear in maskable_linears(model).items():
        torch.testing.assert_close(
            linear.weight.data, reference.get_submodule(name).weight.data, rtol=1e-8, atol=1e-8, msg=name
        )


@pytest.mark.parametrize("method", COMPENSATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_hold_and_every_layer_comes_nearer_to_the_dense_outputs(method, dtype):
    model = build(dtype)
    masks = random_masks(model)
    first = next(iter(masks))
    masks[first] = torch.ones_like(masks[first])
    dense = copy.deepcopy(maskable_linears(model)[first].weight.data)
    result = compensate(model, masks, calibration=token_ids(), method=method, progress=False)
    assert result.layer_errors.keys() == masks.keys() - {first}
    assert all(after < before for before, after in result.layer_errors.values())
    assert result.perplexity_before is None
    assert not result.is_worse
    for name, linear in maskable_linears(model).items():
        assert torch.equal(linear.keep_mask, masks[name])
        assert not linear.weight[~masks[name]].any()
        assert linear.weight.dtype == dtype
    assert torch.equal(maskable_linears(model)[first].weight.data, dense)


def test_perplexity_is_that_of_the_masked_and_of_the_compensated_model():
    model, masked = build(), build()
    masks, heldout = random_masks(model), token_ids(samples=3, seed=9)
    with torch.no_grad():
        for name, linear in maskable_linears(masked).items():
            linear.weight.masked_fill_(~masks[name], 0)
    result = compensate(model, masks, calibration=token_ids(), heldout=heldout, method="least_squares", progress=False)
    assert result.perplexity_before == perplexity(masked, heldout.reshape(-1), heldout.shape[1])
    assert result.perplexity_after == perplexity(model, heldout.reshape(-1), heldout.shape[1])


def test_a_rise_of_the_perplexity_is_said(caplog, monkeypatch):
    values = iter([10.0, 10.5])
    monkeypatch.setattr("patch.pruning.compensation.perplexity", lambda *args, **kwargs: next(values))
    model = build()
    with caplog.at_level(logging.WARNING):
        result = compensate(
            model, random_masks(model), calibration=token_ids(), heldout=token_ids(seed=9), progress=False
        )
    assert result.is_worse
    assert "made held-out perplexity worse: 10.0000 with the masks alone, 10.5000 after" in caplog.text


def test_a_singular_hessian_is_damped_more_and_said(caplog):
    weight, inputs, keep = make_layer()
    few = [x[:1] for x in inputs]
    options = PruneOptions("unstructured", 0.0, damping=0.0, precision="fp64")
    with caplog.at_level(logging.WARNING):
        got = compensated(weight, keep, hessian_of(few), method="least_squares", options=options)
    assert torch.isfinite(got).all()
    assert "not positive definite with damping 0; retrying with 0.0001" in caplog.text


def test_columns_that_were_always_zero_keep_their_kept_weights():
    weight, inputs, keep = make_layer()
    for x in inputs:
        x[:, 3] = 0
    keep[:, 3] = torch.tensor([True, False, True, True, False])
    got = compensated(weight, keep, hessian_of(inputs), method="least_squares", options=PruneOptions("unstructured", 0))
    torch.testing.assert_close(got[:, 3], weight[:, 3] * keep[:, 3])


def refused(match, kind=ValueError, /, model=None, masks=None, **arguments):
    model = build() if model is None else model
    before = copy.deepcopy(model.state_dict())
    arguments = {"calibration": token_ids(), "progress": False} | arguments
    with pytest.raises(kind, match=match):
        compensate(model, random_masks(model) if masks is None else masks, **arguments)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not keep_masks(model)


def test_bad_input_is_refused_before_any_work():
    refused("method: expected one of blocks, least_squares, sparsegpt, got 'adam'", method="adam")
    refused("damping: expected a finite share", damping=-1.0)
    refused("precision: expected one of fp32, fp64, got 'bf16'", precision="bf16")
    refused(r"calibration: expected .* \(samples, tokens\), got torch.int64 \(32,\)", calibration=token_ids()[0])
    refused(r"heldout: expected .* \(samples, tokens\), got torch.int64 \(32,\)", heldout=token_ids()[0])
    refused("device: expected a torch device", device="gpu")
    refused("mlp.down_proj", masks={k: v for k, v in random_masks(build()).items() if "down" not in k})
    masked = build()
    masks = random_masks(masked)
    with torch.no_grad():
        for name, linear in maskable_linears(masked).items():
            linear.weight.masked_fill_(~masks[name], 0)
    refused("model: expected its dense weights, got a model in which everything", model=masked, masks=masks)


def test_a_failed_update_leaves_masks_only_on_layers_that_are_masked(monkeypatch):
    model = build()
    dense = copy.deepcopy(model.state_dict())
    updated = iter([True, True, True])

    def failing(*args, **kwargs):
        if not next(updated, False):
            raise ValueError("no update")
        return compensated(*args, **kwargs)

    monkeypatch.setattr("patch.pruning.compensation.compensated", failing)
    masks = random_masks(model)
    with pytest.raises(ValueError, match=r"layer 'model.layers.0.self_attn.o_proj': no update"):
        compensate(model, masks, calibration=token_ids(), method="least_squares", progress=False)
    done = keep_masks(model)
    assert list(done) == list(masks)[:3]
    for name, linear in maskable_linears(model).items():
        assert torch.equal(linear.weight, dense[f"{name}.weight"]) == (name not in done)
        assert name not in done or not linear.weight[~masks[name]].any()


# The command.


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Folder with a dense model, two texts and the masks of a one-shot method."""
    folder = tmp_path_factory.mktemp("compensate")
    build().save_pretrained(folder / "model")
    build_byte_tokenizer().save_pretrained(folder / "model")
    lines = [f"Line {i}: the {'quick' if i % 3 else 'slow'} fox {i * i} jumps." for i in range(500)]
    (folder / "train.txt").write_text("\n".join(lines[:400]))
    (folder / "held.txt").write_text("\n".join(lines[400:]))
    masks = random_masks(build())
    save_artifact(
        folder / "masks", masks, meta={"model": "dense", "method": "joint", "sparsity": 0.4} | fingerprints(build())
    )
    return folder


def command(work, out, *extra, data="train.txt"):
    data = str(work / data) if data.endswith(".txt") else data
    flags = ["--model", str(work / "model"), "--masks", str(work / "masks"), "--data", data, "--out", str(out)]
    if "--method" not in extra:
        flags += ["--epochs", "1"]
    return cli.main(["compensate", *flags, "--nsamples", "8", "--seqlen", "32", *map(str, extra)])


def test_too_little_memory_is_said_in_flags(work, tmp_path, capsys, monkeypatch):
    def full(*arguments, **settings):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(reconstruction, "fit_block", full)
    assert command(work, tmp_path / "out", "--heldout", work / "held.txt", "--batch-size", 1) == 2
    got = "got too little for 1 of 32 tokens. Give shorter ones such as --seqlen 16, or --method least_squares.\n"
    assert capsys.readouterr().err.endswith(
        f"--batch-size: expected memory to fit block 0 to so many samples a step, {got}"
    )


def test_the_command_saves_weights_and_both_perplexities(work, tmp_path, capsys):
    out = tmp_path / "out"
    assert command(work, out, "--heldout", work / "held.txt", "--heldout-windows", 3) == 0
    said = capsys.readouterr().out
    artifact = load_artifact(out)
    done = artifact.meta["compensation"]
    before, after = done["perplexity_before"], done["perplexity_after"]
    assert f"(3 windows of 32 tokens): {before:.4f} with the masks alone, {after:.4f} after" in said
    assert ("WARNING: this is WORSE" in said) == (after > before)
    assert artifact.meta["method"] == "joint"
    assert done["method"] == "blocks"
    assert done["blocks"] == {"epochs": 1, "lr": 0.02, "batch_size": 1, "seed": 0}
    assert "trained 2 blocks; mean relative output error on the calibration text:" in said
    assert not (tmp_path / "out.stages").exists()
    assert done["heldout"] == str(work / "held.txt")
    model = inputs.load_model(str(work / "model"))
    apply_artifact(model, artifact)
    for name, linear in maskable_linears(model).items():
        assert torch.equal(linear.weight, artifact.weights[name])
        assert torch.equal(artifact.masks[name], load_artifact(work / "masks").masks[name])
        assert not linear.weight[~artifact.masks[name]].any()


def test_the_command_refuses_weights_that_it_would_lose(work, tmp_path, capsys):
    masks = load_artifact(work / "masks").masks
    for key, name in (("compression", "compress"), ("fine_tune", "fine-tune")):
        save_artifact(
            tmp_path / name, masks, meta={"model": "dense", "method": "joint", key: {"seed": 0}} | fingerprints(build())
        )
        status = command(work, tmp_path / "out", "--heldout", work / "held.txt", "--masks", tmp_path / name)
        assert status == 2
        message = capsys.readouterr().err
        assert f"--masks: expected masks alone, {tmp_path / name} is a result of {name}, whose weights" in message
        assert not (tmp_path / "out").exists()


def test_the_resolved_configuration_replaces_nothing(work, tmp_path, capsys):
    out = tmp_path / "out"
    flags = ["--heldout", work / "held.txt", "--heldout-windows", 1]
    assert command(work, out, *flags) == 0
    assert command(work, out, *flags, "--overwrite") == 0
    capsys.readouterr()
    assert cli.main(["compensate", "--config", str(out / "config.resolved.yaml")]) == 2
    assert "exists already" in capsys.readouterr().err


def test_the_command_warns_when_it_made_things_worse(work, tmp_path, capsys, monkeypatch):
    values = iter([10.0, 10.5])
    monkeypatch.setattr("patch.pruning.compensation.perplexity", lambda *args, **kwargs: next(values))
    assert command(work, tmp_path / "out", "--heldout", work / "held.txt") == 0
    said = capsys.readouterr().out
    assert "WARNING: this is WORSE than the masks alone" in said and "\nnext: " in said


def test_the_command_says_when_the_result_is_broken(work, tmp_path, capsys, monkeypatch):
    values = iter([2000.0, 1000.0])
    monkeypatch.setattr("patch.pruning.compensation.perplexity", lambda *args, **kwargs: next(values))
    assert command(work, tmp_path / "out", "--heldout", work / "held.txt") == 0
    said = capsys.readouterr().out
    assert "WARNING: the perplexity after is worse than a uniform guess over 260 tokens: the model or its" in said
    assert "WORSE" not in said and "next: " not in said


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ((), "heldout: expected a text that is not in --data, got none. Give --heldout TEXT"),
        (("--heldout", "train.txt"), "heldout: expected another text than that to calibrate on"),
        (("--heldout", "none.txt"), "--heldout: expected a file"),
        (("--heldout", "held.txt", "--seqlen", "100000"), "expected a text of more than 100000 tokens, got 14492"),
        (("--heldout", "held.txt", "--nsamples", "0"), "nsamples: expected an integer >= 1, got 0"),
        (
            ("--heldout", "held.txt", "--method", "least_squares", "--epochs", "2"),
            "--epochs: expected none with method least_squares, got 2. Leave it out, or use --method blocks",
        ),
        (("--heldout", "held.txt", "--method", "adam"), "method: expected one of blocks, least_squares, sparsegpt"),
    ],
)
def test_the_command_refuses(work, tmp_path, capsys, monkeypatch, extra, message):
    monkeypatch.chdir(work)
    assert command(work, tmp_path / "out", *extra) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_command_takes_least_squares_where_memory_is_short(work, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("patch.pruning.plan.free_bytes", lambda device: 1 << 10)
    flags = ["--model", work / "model", "--masks", work / "masks", "--data", work / "train.txt", "--seqlen", "32"]
    flags += ["--heldout", work / "held.txt", "--heldout-windows", "1", "--nsamples", "8"]
    for extra, method in (((), "least_squares"), (("--epochs", "1"), "blocks"), (("--method", "blocks"), "blocks")):
        out = tmp_path / "-".join(("out", *extra))
        assert cli.main(["compensate", *map(str, flags), "--out", str(out), *extra]) == 0
        said = capsys.readouterr().err
        assert ("method least_squares: blocks needs about" in said) == (method == "least_squares")
        assert load_artifact(out).meta["compensation"]["method"] == method


def test_free_memory_is_that_of_this_machine():
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < free_bytes(torch.device("cpu")) < total


def test_the_command_does_not_replace_the_masks_it_reads(work, capsys):
    assert command(work, work / "masks", "--heldout", work / "held.txt", "--overwrite") == 2
    assert "--out: expected another folder than that of --masks" in capsys.readouterr().err
    assert load_artifact(work / "masks").meta["method"] == "joint"


def test_the_command_refuses_too_little_heldout_text(work, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("short")
    assert command(work, tmp_path / "out", "--heldout", tmp_path / "short.txt") == 2
    assert "heldout: expected at least one window of 32 tokens" in capsys.readouterr().err


def test_an_interrupt_says_that_nothing_was_written(work, tmp_path, capsys, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(inputs, "load_masks", interrupt)
    assert command(work, tmp_path / "out", "--heldout", work / "held.txt") == 130
    assert "nothing was written" in capsys.readouterr().err
