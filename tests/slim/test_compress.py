"""Compressed and fine-tuned models on disk: the artifact, the command line, and prepare_pruned_model."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support.models import build_byte_tokenizer, build_tiny_model

import patch
from patch import cli
from patch.artifacts.apply import apply_artifact
from patch.artifacts.artifact import load_artifact, save_artifact
from patch.cli import inputs
from patch.files.folder import MANIFEST
from patch.files.regular import file_sha256
from patch.files.strict_json import dump_json
from patch.models.adapted_linear import AdaptedLinear
from patch.models.keep_masks import keep_masks
from patch.models.structure import maskable_linears
from patch.packed.convert import pack_model
from patch.packed.save import save_dense
from patch.pruning import prune_model
from patch.published import prepare
from patch.slim import CompressOptions, compress_model, quantize_weight
from patch.slim.compress import adapters
from patch.slim.fine_tune import FineTuneOptions
from patch.utils import load_compressed_model, prepare_pruned_model

TILE = (64, 32)
SLIM = ["--quantize-weight", "--lora-rank", "0.1"]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Folder with a tiny dense model, texts, masks of three kinds and a compressed artifact, made by the commands."""
    folder = tmp_path_factory.mktemp("slim")
    build_tiny_model("llama").save_pretrained(folder / "model")
    build_byte_tokenizer().save_pretrained(folder / "model")
    lines = (f"Line {i}: the {'quick' if i % 3 else 'slow'} fox {i * i} jumps." for i in range(300))
    (folder / "train.txt").write_text("\n".join(lines))
    prune = ["prune", "--model", folder / "model", "--data", folder / "train.txt", "--nsamples", 4, "--seqlen", 32]
    assert call(*prune, "--out", folder / "wanda") == 0
    assert call(*prune, "--method", "sparsegpt", "--out", folder / "gpt") == 0
    assert compress(folder, *SLIM, "--data", folder / "train.txt", "--nsamples", 4, "--seqlen", 32) == 0
    return folder


def call(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def compress(folder: Path, *flags: object, masks: str = "wanda", out: str = "slim") -> int:
    return call("compress", "--model", folder / "model", "--masks", folder / masks, "--out", folder / out, *flags)


def restored(folder: Path, artifact: str):
    model = inputs.load_model(str(folder / "model"))
    apply_artifact(model, inputs.load_masks(folder / artifact, model))
    return model


def same_states(first, second) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def test_the_command_gives_what_the_library_gives_bit_for_bit(work):
    from patch.data.tokens import calibration_windows

    model = inputs.load_model(str(work / "model"))
    masks = load_artifact(work / "wanda").masks
    tokens, _ = calibration_windows(build_byte_tokenizer(), work / "train.txt", nsamples=4, seqlen=32)
    options = CompressOptions(quantize_weight=True, lora_rank=0.1)
    compress_model(model, masks, options, calibration=tokens, progress=False)
    again = restored(work, "slim")
    assert same_states(model, again)
    ids = tokens[:2]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)
    assert all(torch.equal(masks[name], keep) for name, keep in keep_masks(again).items())
    assert all(layer.compression == options for _, layer in again.named_modules() if isinstance(layer, AdaptedLinear))
    meta = load_artifact(work / "slim").meta
    assert meta["compression"] == options.as_dict() and meta["method"] == "wanda"


def test_eval_puts_it_on_the_dense_model(work, capsys):
    assert compress(work, "--quantize-weight", "--bitwidth", 3, out="bare") == 0
    flags = ["--model", work / "model", "--masks", f"{work}/bare,{work}/slim", "--data", work / "train.txt"]
    assert call("eval", *flags, "--window", 64, "--max-windows", 8, "--json", work / "eval.json") == 0
    models = {model["label"]: model for model in json.loads((work / "eval.json").read_text())["models"]}
    assert models["bare"]["sparsity"] == models["slim"]["sparsity"] == 0.5
    (name,) = models["dense"]["perplexity"]
    assert len({models[label]["perplexity"][name]["perplexity"] for label in ("dense", "bare", "slim")}) == 3
    assert not load_artifact(work / "bare").adapters


def test_quantised_weights_without_adapters_are_exported_as_they_are(work):
    assert compress(work, "--quantize-weight", "--no-slim-quant", out="absmax") == 0
    flags = ["--format", "dense", "--dtype", "auto", "--out", work / "dense"]
    assert call("export", "--model", work / "model", "--masks", work / "absmax", *flags) == 0
    assert same_states(inputs.load_model(str(work / "dense")), restored(work, "absmax"))
    status = call("export", "--model", work / "model", "--masks", work / "slim", "--out", work / "refused")
    assert status == 2 and not (work / "refused").exists()


def test_updated_weights_are_what_is_compressed(work):
    assert compress(work, "--lora-rank", "0.1", "--no-slim-lora", masks="gpt", out="gpt-slim") == 0
    before, after = load_artifact(work / "gpt"), load_artifact(work / "gpt-slim")
    assert all(torch.equal(before.weights[name], after.weights[name]) for name in before.weights)
    assert after.adapters.keys() == before.masks.keys()


def test_fine_tune_command_resumes_and_its_result_is_read_again(work, capsys):
    flags = ["fine-tune", "--model", work / "model", "--data", work / "train.txt", "--out", work / "tuned"]
    flags += ["--seqlen", 32, "--blocks", 32, "--batch-size", 8, "--local-batch-size", 4, "--lr", "1e-3"]
    flags += ["--save-steps", 2, "--warmup-steps", 1]
    assert call(*flags, "--masks", work / "slim") == 0
    assert "trained 14 layers for 4 steps" in capsys.readouterr().out
    before, after = load_artifact(work / "slim"), load_artifact(work / "tuned" / "result")
    assert all(torch.equal(before.masks[name], after.masks[name]) for name in before.masks)
    assert all(torch.equal(before.weights[name], after.weights[name]) for name in before.weights)  # quantised
    assert all(not torch.equal(before.adapters[name][0], after.adapters[name][0]) for name in before.adapters)
    assert after.meta["fine_tune"]["lr"] == 1e-3 and after.meta["compression"] == before.meta["compression"]
    restored(work, "tuned")
    assert call(*flags, "--masks", work / "slim") == 2
    assert "--out: expected no earlier run" in capsys.readouterr().err
    assert call(*flags, "--masks", work / "slim", "--resume") == 2
    assert "--resume: expected an unfinished run" in capsys.readouterr().err
    # As if it had been interrupted after the last checkpoint.
    resolved = (work / "tuned" / "config.resolved.yaml").read_bytes()
    for file in (work / "tuned" / "result").iterdir():
        file.unlink()
    (work / "tuned" / "result").rmdir()
    assert call(*flags, "--masks", work / "wanda", "--resume") == 2
    assert "resume: expected the model, masks, blocks and settings of the run" in capsys.readouterr().err
    assert (work / "tuned" / "config.resolved.yaml").read_bytes() == resolved
    assert call("fine-tune", "--config", work / "tuned" / "config.resolved.yaml", "--resume") == 0
    again = load_artifact(work / "tuned" / "result")
    for name, pair in after.adapters.items():
        assert all(torch.equal(*parts) for parts in zip(pair, again.adapters[name], strict=True))
    assert call(*flags, "--masks", work / "wanda", "--overwrite") == 0
    assert not load_artifact(work / "tuned" / "result").adapters


COMPRESS = ["compress", "--model", "{w}/model", "--masks", "{w}/wanda", "--out", "{t}/o"]
TUNE = ["fine-tune", "--model", "{w}/model", "--masks", "{w}/wanda", "--data", "{w}/train.txt", "--out", "{t}/o"]
LEARN = ["learn", "--model", "{w}/model", "--prior", "{w}/wanda", "--data", "{w}/train.txt", "--sparsity", "0.3"]
REFUSED = [
    (COMPRESS, "expected --quantize-weight or --lora-rank, got neither"),
    ([*COMPRESS, "--lora-rank", "0.1"], "--data: expected a text, got none"),
    ([*COMPRESS, "--lora-rank", "2"], "--lora-rank: expected a share of the layer's smaller size, 0 to 1, got 2"),
    ([*COMPRESS, "--quantize-weight", "--nsamples", "0"], "nsamples: expected an integer >= 1, got 0"),
    ([*COMPRESS, "--quantize-weight", "--seed", "-1"], "seed: expected an integer >= 0, got -1"),
    ([*COMPRESS, "--quantize-weight", "--masks", "{w}/absent"], "--masks: expected a folder made by"),
    ([*COMPRESS, "--quantize-weight", "--masks", "{w}/slim"], "is a result of compress, whose weights would be lost"),
    (
        [*COMPRESS, "--quantize-weight", "--out", "{w}/wanda", "--overwrite"],
        "--out: expected another folder than that of --masks, ",
    ),
    ([*LEARN, "--out", "{w}/wanda", "--overwrite"], "--out: expected another folder than that of --prior, "),
    ([*TUNE, "--out", "{w}/wanda", "--overwrite"], "which --overwrite replaces. Choose another --out."),
    ([*COMPRESS, "--quantize-weight", "--out", "{w}/slim"], "--out: expected a new folder"),
    ([*TUNE, "--blocks", "0"], "blocks: expected an integer >= 1, got 0"),
    ([*TUNE, "--seqlen", "1"], "seqlen: expected an integer >= 2, got 1"),
    ([*TUNE, "--resume", "--overwrite"], "--resume and --overwrite: expected one of them, got both"),
    ([*TUNE, "--lr", "0"], "lr: expected a number > 0, got 0"),
    ([*TUNE, "--out", "{w}/train.txt"], "--out: expected a folder, "),
    ([*TUNE, "--data", "{w}/none.txt"], "--data: expected a file"),
    ([*TUNE, "--batch-size", "1000", "--seqlen", "64"], "blocks: expected at least --batch-size = 1000, got"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_refused_commands(work, tmp_path, capsys, arguments, message):
    assert call(*(argument.format(w=work, t=tmp_path) for argument in arguments)) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.safetensors"))


def test_interrupts_say_what_is_kept(tmp_path):
    from patch.cli.commands import compress as compress_command
    from patch.cli.commands import fine_tune as command

    options = command.Options(model="m", masks=tmp_path, data="c4", out=tmp_path)
    assert "no checkpoint was written yet" in command.on_interrupt(options)
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert "checkpoint-10 is kept" in command.on_interrupt(options)
    compress_options = compress_command.Options(model="m", masks=tmp_path, out=tmp_path)
    assert "nothing was written" in compress_command.on_interrupt(compress_options)


def test_packed_loader_refuses_a_folder_with_adapters(tmp_path):
    """save_pretrained writes them, and from_pretrained would leave them out with a warning."""
    model, _ = adapted_model()
    model.save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match=r"expected a model without adapters, found tensors of adapters: 28 "):
        patch.load(tmp_path / "m")


def adapted_model():
    model = build_tiny_model("llama", dtype=torch.bfloat16)
    masks = prune_model(copy.deepcopy(model), "magnitude", progress=False)
    compress_model(model, masks, CompressOptions(lora_rank=0.1, slim_lora=False), progress=False)
    return model, masks


def test_formats_without_adapters_refuse_them(tmp_path):
    model, _ = adapted_model()
    for write in (lambda: save_dense(model, None, tmp_path / "dense"), lambda: pack_model(model)):
        with pytest.raises(ValueError, match="expected a layer without adapters, 14 layers have some"):
            write()
    assert not (tmp_path / "dense").exists() and isinstance(model.model.layers[0].mlp.up_proj, AdaptedLinear)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda parts, name: parts.update(other=parts[name]), r"only, got also 2 \(other.left, other.right\)"),
        (
            lambda parts, name: parts.update({name: parts[name][::-1]}),
            r"left: expected F16 or .* \(128, rank\), got BF16",
        ),
        (
            lambda parts, name: parts.update({name: (parts[name][0][:, :0], parts[name][1][:0])}),
            r"\(128, rank\), got BF16 \(128, 0\)",
        ),
        (lambda parts, name: parts.update({name: (parts[name][0].char(), parts[name][1])}), "got torch.int8"),
    ],
)
def test_wrong_adapters_are_not_saved(tmp_path, change, message):
    model, masks = adapted_model()
    parts = adapters(model)
    change(parts, next(iter(masks)))
    with pytest.raises(ValueError, match=message):
        save_artifact(tmp_path / "a", masks, meta={}, adapters=parts)
    assert not (tmp_path / "a").exists()


def rewrite(folder: Path, name: str, content: bytes) -> None:
    """Change a file and its line in the manifest."""
    path, manifest = folder / name, folder / MANIFEST
    path.write_bytes(content)
    value = json.loads(manifest.read_bytes())
    value["files"][name] = {"size": len(content), "sha256": file_sha256(path)}
    manifest.write_bytes(dump_json(value))


def damaged(folder: Path, case: str) -> None:
    from safetensors.torch import load_file, save

    tensors = load_file(folder / "adapters.safetensors")
    name = sorted(tensors)[0].rpartition(".")[0]
    if case == "version":
        value = json.loads((folder / "artifact.json").read_bytes()) | {"version": 1}
        rewrite(folder, "artifact.json", dump_json(value))
        return
    if case == "layer":
        tensors["other.left"] = torch.ones(2, 2)
    elif case == "missing":
        del tensors[f"{name}.right"]
    elif case == "shape":
        tensors[f"{name}.left"] = tensors[f"{name}.left"][1:].contiguous()
    elif case == "more":
        tensors[f"{name}.middle"] = torch.ones(2, 2)
    rewrite(folder, "adapters.safetensors", save(tensors))


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("version", "expected adapters.safetensors exactly in version 2, got version 1 with it"),
        ("layer", r"only, got also 1 \(other.left\)"),
        ("missing", r"right: expected F16 or BF16 .* \(\d+, \d+\), got nothing"),
        ("shape", r"left: expected F16 or BF16 .* \(\d+, rank\), got BF16"),
        ("more", r"only, got also 1 \(.*\.middle\)"),
    ],
)
def test_damaged_adapters_are_refused(tmp_path, case, message):
    model, masks = adapted_model()
    save_artifact(tmp_path / "a", masks, meta={}, adapters=adapters(model))
    load_artifact(tmp_path / "a", model=model)
    damaged(tmp_path / "a", case)
    with pytest.raises(ValueError, match=message):
        load_artifact(tmp_path / "a", model=model)


def test_settings_of_another_version_are_refused(tmp_path):
    model, masks = adapted_model()
    dense = build_tiny_model("llama", dtype=torch.bfloat16)
    save_artifact(tmp_path / "a", masks, meta={"compression": {"other": 1}}, adapters=adapters(model))
    with pytest.raises(ValueError, match="compression: expected the settings of CompressOptions, got others"):
        apply_artifact(dense, load_artifact(tmp_path / "a"))
    assert same_states(dense, build_tiny_model("llama", dtype=torch.bfloat16)) and not keep_masks(dense)


def test_adapters_come_back_in_the_dtype_they_were_saved_in(tmp_path):
    model, masks = adapted_model()
    model.float()
    for layer in model.modules():
        if isinstance(layer, AdaptedLinear):
            layer.lora_left.data.mul_(1.001)  # no longer a bf16 number
    meta = {"compression": CompressOptions(lora_rank=0.1, slim_lora=False).as_dict()}
    weights = {name: model.get_submodule(name).weight for name in masks}
    save_artifact(tmp_path / "a", masks, meta=meta, weights=weights, adapters=adapters(model))
    again = build_tiny_model("llama").bfloat16().float()
    apply_artifact(again, load_artifact(tmp_path / "a", model=again))
    assert same_states(model, again)


@pytest.fixture
def arguments(text_file):
    return {"nsamples": 4, "calibration_dataset": str(text_file), "fine_tune_dataset": str(text_file)}


def small_model(**overrides):
    model = build_tiny_model("llama", **overrides)
    model.seqlen = 32
    return model


@pytest.mark.parametrize(
    ("settings", "adapted"),
    [
        ({"prune_method": "magnitude", "quantize_weight": True}, False),
        ({"prune_method": "wanda", "quantize_weight": True, "lora_rank": 0.1}, True),
        ({"prune_method": "sparsegpt", "lora_rank": 0.1}, True),
        ({"prune_method": "magnitude", "lora_rank": 0.1, "pad_lora": True, "lora_tile_size": 16}, True),
    ],
)
def test_prepare_pruned_model_compresses_and_loads_again(tmp_path, arguments, settings, adapted):
    values = arguments | settings
    made = prepare_pruned_model(small_model(), build_byte_tokenizer(), tmp_path / "c", values, TILE, 0.35)
    assert isinstance(made.model.layers[1].mlp.down_proj, AdaptedLinear) == adapted
    again = prepare_pruned_model(small_model(), build_byte_tokenizer(), tmp_path / "c", values, TILE, 0.35)
    third = load_compressed_model(small_model(), TILE, tmp_path / "c")
    plain = prepare_pruned_model(
        small_model(),
        build_byte_tokenizer(),
        tmp_path / "p",
        arguments | {"prune_method": settings["prune_method"]},
        TILE,
        0.35,
    )
    assert same_states(made, again) and same_states(made, third)
    masks = keep_masks(plain)
    for name, keep in keep_masks(third).items():
        assert torch.equal(keep, masks[name])
        assert torch.equal(third.get_submodule(name).distribution_scores, plain.get_submodule(name).distribution_scores)
    for other in ({}, settings | {"bitwidth": 5}):
        with pytest.raises(ValueError, match=r"expected (a result without )?compression"):
            other = arguments | {"prune_method": settings["prune_method"]} | other
            prepare_pruned_model(small_model(), build_byte_tokenizer(), tmp_path / "c", other, TILE, 0.35)


@pytest.mark.parametrize(
    "settings",
    [
        {"quantize_weight": True},
        {"quantize_weight": True, "lora_rank": 0.1, "fine_tune": True},
        {"fine_tune": True},
    ],
)
def test_masks_from_elsewhere_are_compressed_and_fine_tuned(tmp_path, arguments, monkeypatch, settings):
    """MaskLLM's masks: the weights are made from the dense ones under these very masks."""
    monkeypatch.setattr(prepare, "FineTuneOptions", lambda seed=42: FineTuneOptions(lr=1e-3, batch_size=32, seed=seed))
    dense = small_model()
    masks = {}
    for name, linear in maskable_linears(dense).items():
        if name.endswith("o_proj"):
            linear.weight.data[:4] = 0  # kept zeros
        masks[name] = torch.tensor([True, False, False, True]).repeat(linear.weight.numel() // 4)
        masks[name] = masks[name].reshape(linear.weight.shape)
    packed = {f"{name}.weight.mask": np.packbits(keep.numpy().reshape(-1)) for name, keep in masks.items()}
    np.savez_compressed(tmp_path / "mask_compressed.npz", **packed)
    source = {"prune_method": "maskllm", "maskllm_checkpoint": str(tmp_path / "mask_compressed.npz")}
    values = arguments | source | settings

    def prepared(path):
        model = copy.deepcopy(dense)
        return prepare_pruned_model(model, build_byte_tokenizer(), tmp_path / path, values, TILE, 0.35)

    made = prepared("c")
    quantised = settings.get("quantize_weight", False)
    for name, keep in masks.items():
        layer = made.get_submodule(name)
        assert torch.equal(layer.keep_mask, keep) and not layer.weight[~keep].any()
        assert isinstance(layer, AdaptedLinear) == ("lora_rank" in settings)
        if quantised and "lora_rank" not in settings:
            expected = quantize_weight(dense.get_submodule(name).weight, keep).weight
            assert torch.equal(layer.weight, expected)
        assert not quantised or layer.weight.unique().numel() <= 16
        if not quantised and name.endswith("o_proj"):  # kept zeros were trained, too
            assert layer.weight[:4][keep[:4]].all()
    assert same_states(made, prepared("c"))
    loaded = load_compressed_model(copy.deepcopy(dense), TILE, tmp_path / "c")
    assert same_states(made, loaded)
    assert load_artifact(tmp_path / "c").meta["method"] == "maskllm"


def test_a_seed_that_training_refuses_is_refused_before_pruning(tmp_path, arguments):
    model = small_model()
    values = arguments | {"prune_method": "magnitude", "fine_tune": True}
    with pytest.raises(ValueError, match="seed: expected an integer >= 0, got -1"):
        prepare_pruned_model(model, build_byte_tokenizer(), tmp_path / "c", values, TILE, 0.35, seed=-1)
    assert not keep_masks(model)


def test_prepare_pruned_model_fine_tunes(tmp_path, arguments, monkeypatch):
    # The published batch and rate are for larger models than this one.
    monkeypatch.setattr(prepare, "FineTuneOptions", lambda seed=42: FineTuneOptions(lr=1e-3, batch_size=32, seed=seed))
    values = arguments | {"prune_method": "magnitude", "fine_tune": True}
    made = prepare_pruned_model(small_model(), build_byte_tokenizer(), tmp_path / "c", values, TILE, 0.35)
    plain = prune_model(dense := small_model(), "magnitude", progress=False)
    for name, keep in plain.items():
        weight = made.get_submodule(name).weight
        assert torch.equal(made.get_submodule(name).keep_mask, keep) and not weight[~keep].any()
        assert not torch.equal(weight, dense.get_submodule(name).weight)
    assert same_states(made, load_compressed_model(small_model(), TILE, tmp_path / "c"))
    with pytest.raises(ValueError, match="expected a result without fine_tune, the artifact was made with"):
        prepare_pruned_model(
            small_model(), build_byte_tokenizer(), tmp_path / "c", values | {"fine_tune": False}, TILE, 0.35
        )


@pytest.mark.parametrize(
    ("settings", "dtype", "error", "message"),
    [
        ({"fine_tune": True, "quantize_weight": True}, torch.float32, ValueError, "got quantised ones only"),
        (
            {"fine_tune": True},
            torch.float16,
            ValueError,
            "q_proj': expected float32, bfloat16 or float64 weights, got torch.float16",
        ),
        (
            {"fine_tune": True, "quantize_weight": True, "lora_rank": 0.1, "prune_lora": True},
            torch.float32,
            ValueError,
            "got quantised ones only. Set lora_rank without quantize_lora and prune_lora",
        ),
        ({"lora_rank": 3}, torch.float32, ValueError, "lora_rank: expected a share"),
        ({"separate_lora": False}, torch.float32, ValueError, "separate_lora: expected True"),
        (
            {"fine_tune_dataset": "nowhere"},
            torch.float32,
            FileNotFoundError,
            "fine_tune_dataset: expected a file .* or one of .*'nowhere'",
        ),
        (
            {"quantize_weight": True, "weight_tiled_quantization": True},
            torch.float32,
            ValueError,
            "rows: expected a multiple of the group size 256, got 128",
        ),
    ],
)
def test_prune_args_are_checked_before_any_work(tmp_path, arguments, settings, dtype, error, message):
    model = small_model(dtype=dtype)
    values = arguments | {"prune_method": "magnitude"} | settings
    with pytest.raises(error, match=message):
        prepare_pruned_model(model, build_byte_tokenizer(), tmp_path / "c", values, TILE, 0.35)
    assert not keep_masks(model) and not (tmp_path / "c").exists()


def test_too_little_text_to_fine_tune_is_refused_before_pruning(tmp_path, arguments, text_file):
    text_file.write_text("short " * 100)
    model = small_model()
    with pytest.raises(ValueError, match="blocks: expected at least batch_size = 64, got 4"):
        values = arguments | {"prune_method": "magnitude", "fine_tune": True}
        prepare_pruned_model(model, build_byte_tokenizer(), tmp_path / "c", values, TILE, 0.35)
    assert not keep_masks(model)
