"""Masks belong to the weights they were made from: every command that reads them refuses others."""

from __future__ import annotations

import json

import pytest
import torch
from support.commands import run
from support.models import build_byte_tokenizer, build_tiny_model

from patch.artifacts.apply import apply_artifact
from patch.artifacts.artifact import load_artifact
from patch.cli import inputs
from patch.files.folder import MANIFEST
from patch.files.regular import file_sha256
from patch.files.strict_json import dump_json
from patch.models.facts import fingerprints

SMALL = ["--nsamples", "2", "--seqlen", "32"]


@pytest.fixture(scope="module")
def twin(work):
    """A model of the same configuration with other weights, as base and instruct models are."""
    build_tiny_model("llama", seed=1).save_pretrained(work / "twin")
    build_byte_tokenizer().save_pretrained(work / "twin")
    return work / "twin"


def readers(work, masks="prior"):
    """{command: arguments but --model and --out} of every command that reads masks."""
    data, short = ["--data", work / "train.txt"], ["--seqlen", "32", "--global-batch-size", "2"]
    return {
        "learn": [*data, "--prior", work / masks, "--sparsity", "0.35", "--tile", "64", *short, "--steps", "2"],
        "compensate": [*data, "--masks", work / masks, "--heldout", work / "held.txt", *SMALL],
        "compress": ["--masks", work / masks, "--quantize-weight", "--lora-rank", "0", "--device", "cpu"],
        "fine-tune": [*data, "--masks", work / masks, "--seqlen", "32", "--blocks", "4", "--batch-size", "2"],
        "export": ["--masks", work / masks],
        "eval": ["--masks", work / masks, "--data", work / "held.txt", "--window", "32"],
    }


@pytest.mark.parametrize("command", ["learn", "compensate", "compress", "fine-tune", "export", "eval"])
@pytest.mark.parametrize("masks", ["prior", "learned"])
def test_masks_of_other_weights_are_refused(work, twin, tmp_path, capsys, command, masks):
    if (command, masks) == ("learn", "learned"):
        pytest.skip("a prior is made by prune")
    flags = readers(work, masks)[command]
    out = [] if command == "eval" else ["--out", tmp_path / "o"]
    status, _, err = run(capsys, command, "--model", twin, *flags, *out)
    assert status == 2
    assert f"/{masks}" in err and f"expected an artifact made from {twin}" in err
    assert f"got one made from {work / 'model'} whose weights differ" in err and "--masks-of-another-model" in err
    assert not (tmp_path / "o").exists()


def test_masks_alone_are_put_on_another_model_when_asked(work, twin, tmp_path, capsys):
    out = tmp_path / "o"
    flags = ["--model", twin, *readers(work)["compensate"], "--out", out, "--masks-of-another-model"]
    assert run(capsys, "compensate", *flags)[0] == 0
    made, prior = load_artifact(out), load_artifact(work / "prior")
    assert made.meta["masks_of_another_model"]["weights_fingerprint"] == prior.meta["weights_fingerprint"]
    assert made.meta["weights_fingerprint"] == fingerprints(inputs.load_model(str(twin)))["weights_fingerprint"]
    # The result belongs to the twin now, and its weights to no other model, whatever is asked.
    data = ["--data", work / "held.txt", "--window", "32", "--masks", out]
    results = tmp_path / "r.json"
    assert run(capsys, "eval", "--model", twin, *data, "--json", results)[0] == 0
    entry = json.loads(results.read_text())["models"][1]
    assert entry["masks"]["meta"]["masks_of_another_model"]["model"] == str(work / "model")
    status, _, err = run(capsys, "eval", "--model", work / "model", *data, "--masks-of-another-model")
    assert status == 2 and "It holds weights, which fit no other model" in err


def test_python_refuses_them_too(work, twin):
    model = inputs.load_model(str(twin))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"whose weights differ.*masks_of_another_model=True"):
        load_artifact(work / "prior", model=model)
    artifact = load_artifact(work / "prior")
    with pytest.raises(ValueError, match=r"prior: expected an artifact made from .*twin, got one made from .*model"):
        apply_artifact(model, artifact)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    apply_artifact(model, artifact, masks_of_another_model=True)
    # Pruned weights are not those it was made from: putting further masks on them is refused.
    model = inputs.load_model(str(work / "model"))
    apply_artifact(model, load_artifact(work / "prior"))
    with pytest.raises(ValueError, match="whose weights differ"):
        apply_artifact(model, load_artifact(work / "learned" / "result"))


def test_a_model_has_one_fingerprint_in_every_dtype(work):
    found = {dtype: fingerprints(inputs.load_model(str(work / "model"), dtype=dtype)) for dtype in ("fp32", "bf16")}
    assert found["fp32"] == found["bf16"]
    half = inputs.load_model(str(work / "model"), dtype="fp16")
    with pytest.raises(ValueError, match="A float32 model must be loaded in the dtype that it was pruned in"):
        load_artifact(work / "prior", model=half)
    with pytest.raises(ValueError, match=r"weight: expected a weight with values, got none \(meta"):
        fingerprints(inputs.load_model_shapes(str(work / "model")))


def _edit_meta(folder, change):
    path, manifest = folder / "artifact.json", folder / MANIFEST
    description = json.loads(path.read_bytes())
    change(description["meta"])
    path.write_bytes(dump_json(description))
    value = json.loads(manifest.read_bytes())
    value["files"]["artifact.json"] = {"size": path.stat().st_size, "sha256": file_sha256(path)}
    manifest.write_bytes(dump_json(value))


def test_configurations_are_compared_within_one_version_of_transformers(work, tmp_path, caplog):
    import shutil

    shutil.copytree(work / "prior", tmp_path / "a")
    model = build_tiny_model("llama")
    model.config.rms_norm_eps *= 2
    with pytest.raises(ValueError, match=r"whose settings in config\.json differ"):
        load_artifact(tmp_path / "a", model=model)
    _edit_meta(tmp_path / "a", lambda meta: meta["versions"].update(transformers="5.0.0"))
    load_artifact(tmp_path / "a", model=model)
    assert "another version of transformers: the configuration was not compared" in caplog.text
    _edit_meta(tmp_path / "a", lambda meta: meta.pop("weights_fingerprint"))
    load_artifact(tmp_path / "a", model=model)
    assert "does not say which weights it was made from" in caplog.text
