"""Masks of MaskLLM and of the PATCH authors: read, refused, written, and used by the commands and the original API."""

from __future__ import annotations

import hashlib
import json
import zipfile

import numpy as np
import pytest
import torch
from support.models import build_byte_tokenizer, build_tiny_model

from patch import cli
from patch.artifacts import foreign
from patch.artifacts.artifact import load_artifact
from patch.artifacts.foreign import locate, patch_meta, read_masks, write_masks
from patch.models.facts import fingerprints
from patch.models.keep_masks import keep_masks
from patch.models.structure import maskable_linears
from patch.utils import prepare_pruned_model

FIRST = "model.layers.0.self_attn.q_proj"
LAST = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def model():
    return build_tiny_model()


@pytest.fixture(scope="module")
def masks(model):
    """A random 2:4 mask for each layer."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: (torch.rand(linear.weight.numel() // 4, 4, generator=generator).argsort(1) < 2).view(linear.weight.shape)
        for name, linear in maskable_linears(model).items()
    }


def bits(keep):
    """Bit i of the flattened mask is bit 7 - i % 8 of byte i // 8, written out without numpy's packing."""
    flat = [int(value) for value in keep.flatten().tolist()]
    flat += [0] * (-len(flat) % 8)
    return np.array([int("".join(map(str, flat[i : i + 8])), 2) for i in range(0, len(flat), 8)], dtype=np.uint8)


def maskllm_arrays(masks):
    return {f"{name}.weight.mask": bits(keep) for name, keep in masks.items()}


def patch_arrays(masks, meta=None):
    arrays = {"__meta__": np.array(json.dumps(meta))} if meta is not None else {}
    for name, keep in masks.items():
        arrays[f"{name}.weight"] = bits(keep)
        arrays[f"{name}.weight.__shape__"] = np.array(keep.shape, dtype=np.int64)
    return arrays


@pytest.fixture
def npz(tmp_path):
    def write(arrays, name="mask.npz"):
        np.savez_compressed(tmp_path / name, **arrays)
        return tmp_path / name

    return write


def assert_same(found, expected):
    assert list(found) == list(expected)
    assert all(found[name].dtype == torch.bool and torch.equal(found[name], expected[name]) for name in expected)


def test_maskllm_npz(npz, model, masks):
    path = npz(maskllm_arrays(masks), "mask_compressed.npz")
    found = read_masks(path, model)
    assert_same(found.masks, masks)
    assert found.pattern == "2:4"
    assert found.provenance == {
        "source": str(path),
        "file": "mask_compressed.npz",
        "file_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "format": "maskllm",
        "meta": None,
    }
    assert_same(read_masks(path.parent, model).masks, masks)  # a folder that holds the file


def test_only_names_and_shapes_of_the_model_are_read(npz, masks):
    with torch.device("meta"):
        empty = build_tiny_model()
    assert_same(read_masks(npz(maskllm_arrays(masks)), empty).masks, masks)


@pytest.mark.parametrize(
    ("theirs", "ours"), [("2:4", "2:4"), ("Dense/2:4 tiles", "patch"), ("?", "unstructured"), (None, "unstructured")]
)
def test_patch_npz(npz, model, masks, theirs, ours):
    masks = dict(masks)
    if theirs != "2:4":
        masks[FIRST] = torch.ones_like(masks[FIRST])  # a dense layer
    meta = {"base_model": "x", "pattern": theirs, "sparsity": "45%"} if theirs is not None else None
    found = read_masks(npz(patch_arrays(masks, meta)), model)
    assert_same(found.masks, masks)
    assert found.pattern == ours
    assert found.provenance["format"] == "patch" and found.provenance["meta"] == meta


def test_kept_zeros_are_missing_in_the_authors_two_of_four(npz, model, masks):
    keep = masks[FIRST].clone()
    keep[0, :4] = torch.tensor([True, False, False, False])  # the other kept weight was zero
    arrays = patch_arrays(masks | {FIRST: keep}, {"pattern": "2:4"})
    assert torch.equal(read_masks(npz(arrays), model).masks[FIRST], keep)
    with pytest.raises(
        ValueError, match=rf"exactly 2 kept of every 4 weights, .* layers: 1 \({FIRST}: 1 groups of four"
    ):
        read_masks(npz(maskllm_arrays(masks | {FIRST: keep})), model)


def test_bits_beyond_the_last_weight_are_padding(npz, masks):
    odd = torch.nn.Sequential(torch.nn.Linear(3, 3))
    keep = torch.tensor([[True, False, True], [False, True, True], [True, True, False]])
    found = read_masks(npz(patch_arrays({"0": keep})), odd)
    assert bits(keep).size == 2 and torch.equal(found.masks["0"], keep)


def test_pt_of_masks_and_of_masked_weights(tmp_path, model, masks):
    path = tmp_path / "mask.pt"
    torch.save({f"{name}.weight.mask": keep.float() for name, keep in masks.items()}, path)
    with pytest.raises(ValueError, match=r"expected an \.npz, got a \.pt; .*--allow-pt"):
        read_masks(path, model)
    found = read_masks(path, model, allow_pt=True)
    assert_same(found.masks, masks)
    assert (found.pattern, found.provenance["format"]) == ("2:4", "maskllm pt")
    # A whole state dict: the embeddings, the head, norms and biases stay out.
    state = {key: torch.ones_like(value) for key, value in model.state_dict().items()}
    state |= {f"{name}.weight": keep.half() for name, keep in masks.items()}
    for legacy in (False, True):
        torch.save(state, path, _use_new_zipfile_serialization=not legacy)
        found = read_masks(path, model, allow_pt=True)
        assert_same(found.masks, masks)
        assert found.provenance["format"] == "weights pt"


class Bomb:
    def __reduce__(self):
        return (print, ("run",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda m: {"a": Bomb()}, "holds only tensors, it does not load"),
        (lambda m: [1], "a dict of tensors by name, got list"),
        (lambda m: {f"{n}.weight.mask": k.float() * 3 for n, k in m.items()}, f"{FIRST}: values other than 0 and 1"),
        (lambda m: {f"{n}.weight": k for n, k in m.items()}, rf"{FIRST}: torch\.bool, not floating point"),
        (lambda m: {f"{n}.weight": k.float()[:1] for n, k in m.items()}, rf"{FIRST}: \(1, 128\), not \(128, 128\)"),
        (lambda m: {f"{n}.weight": k.float().to_sparse() for n, k in m.items()}, r"missing 14"),
        (lambda m: {f"{n}.weight.mask": 1 for n in m}, rf"{FIRST}: no tensor, not \(128, 128\)"),
        (lambda m: {f"{n}.weight": torch.ones(k.shape) for n, k in m.items()}, "at most 2 kept of every 4 weights"),
        (lambda m: {"x.weight": torch.ones(4, 4)}, rf"missing 14 \({FIRST}, .*layers of the model 1 \(x\)"),
    ],
)
def test_pt_is_refused(tmp_path, model, masks, capsys, content, message):
    torch.save(content(masks), tmp_path / "a.pt")
    with pytest.raises(ValueError, match=message):
        read_masks(tmp_path / "a.pt", model, allow_pt=True)
    assert "run" not in capsys.readouterr().out


def test_pt_of_transposed_tensors(tmp_path, masks, model):
    torch.save({f"{name}.weight": keep.float().t().contiguous().t() for name, keep in masks.items()}, tmp_path / "a.pt")
    found = read_masks(tmp_path / "a.pt", model, allow_pt=True)
    assert_same(found.masks, masks)
    assert all(keep.is_contiguous() for keep in found.masks.values())


@pytest.mark.parametrize("header", [b"{'descr': '|u1', 'x': (", b"{'descr': '|u1'\n  x"])
def test_npz_with_a_broken_header_is_refused(tmp_path, model, header):
    with zipfile.ZipFile(tmp_path / "mask.npz", "w") as archive:
        archive.writestr("a.weight.mask.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    with pytest.raises(ValueError, match=r"not a readable \.npz of plain arrays"):
        read_masks(tmp_path / "mask.npz", model)


def without(arrays, key):
    return {k: v for k, v in arrays.items() if k != key}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda a: without(a, f"{LAST}.weight.mask"),
            rf"mask.npz: expected one for each of the 14 layers .*missing 1 \({LAST}\); .* model 0",
        ),
        (lambda a: a | {"lm_head.weight.mask": a[f"{FIRST}.weight.mask"]}, r"missing 0; .* model 1 \(lm_head\)"),
        (
            lambda a: a | {f"{LAST}.weight.mask": np.zeros(5, np.uint8)},
            rf"layers: 1 \({LAST}: .*\(5,\).*, not uint8 \(3072,\)",
        ),
        (lambda a: a | {f"{FIRST}.weight.mask": np.zeros(2048, np.int8)}, rf"{FIRST}: .*int8.*, not uint8 \(2048,\)"),
        (lambda a: a | {f"{FIRST}.weight.mask": np.array([{}] * 2048)}, rf"{FIRST}: .*'O'.*, not uint8 \(2048,\)"),
        (
            lambda a: a | {f"{LAST}.weight.mask": ~a[f"{LAST}.weight.mask"] & 254},
            rf"2 kept of every 4 .*\({LAST}: \d+ groups",
        ),
        (
            lambda a: {"a": np.zeros(3)},
            r"keys that end in \.mask \(MaskLLM\), or names with their \.__shape__ \(PATCH\), got 1 \(a\)",
        ),
        (lambda a: {}, "got 0; give a file of masks"),
    ],
)
def test_maskllm_npz_is_refused_naming_the_layers(npz, model, masks, change, message):
    with pytest.raises(ValueError, match=message):
        read_masks(npz(change(maskllm_arrays(masks))), model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda a: a | {f"{LAST}.weight.__shape__": np.array([192, 128])},
            rf"layers: 1 \({LAST}: \(192, 128\), not \(128, 192\)",
        ),
        (lambda a: without(a, f"{LAST}.weight.__shape__"), rf"{LAST}: no \.__shape__ of two integers"),
        (lambda a: a | {f"{LAST}.weight.__shape__": np.ones(2)}, rf"{LAST}: no \.__shape__ of two integers"),
        (lambda a: a | {"__meta__": np.array("[1]")}, "__meta__ to be the text of a JSON object"),
        (lambda a: a | {"__meta__": np.array("{")}, "__meta__ to be the text of a JSON object"),
        (lambda a: a | {"__meta__": np.zeros(3)}, r"JSON object, got float64 \(3,\)"),
        (
            lambda a: (
                a
                | {
                    "__meta__": np.array(json.dumps({"pattern": "2:4"})),
                    f"{FIRST}.weight": np.full(2048, 255, np.uint8),
                }
            ),
            rf"at most 2 kept of every 4 weights, .*{FIRST}: 4096 groups",
        ),
    ],
)
def test_patch_npz_is_refused_naming_the_layers(npz, model, masks, change, message):
    with pytest.raises(ValueError, match=message):
        read_masks(npz(change(patch_arrays(masks, {}))), model)


def test_damaged_npz_is_refused(tmp_path, npz, model, masks):
    path = npz(maskllm_arrays(masks))
    whole = path.read_bytes()
    path.write_bytes(whole[:-50])
    with pytest.raises(ValueError, match=r"mask\.npz: not a readable \.npz of plain arrays"):
        read_masks(path, model)
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes(64) + whole[middle + 64 :])
    with pytest.raises(ValueError, match=r"not a readable \.npz of plain arrays .*; get the file again"):
        read_masks(path, model)
    for entries in (["a.txt"], ["a.npy", "a.npy"]):
        with zipfile.ZipFile(path, "w") as archive, pytest.warns(UserWarning) if len(entries) > 1 else _nothing():
            for entry in entries:
                with archive.open(entry, "w") as file:
                    np.save(file, np.zeros(1, np.uint8))
        with pytest.raises(ValueError, match=f"unexpected or repeated entry '{entries[-1]}'"):
            read_masks(path, model)


def _nothing():
    import contextlib

    return contextlib.nullcontext()


def test_excluded_layers_stay_dense_whether_the_file_has_them_or_not(npz, model, masks):
    rest = {name: keep for name, keep in masks.items() if not name.endswith("k_proj")}
    for given in (masks, rest):
        found = read_masks(npz(maskllm_arrays(given)), model, exclude=["*.k_proj"])
        assert_same(found.masks, rest)
    with pytest.raises(ValueError, match=r"missing 2 \(.*k_proj.*name layers that stay dense in exclude"):
        read_masks(npz(maskllm_arrays(rest)), model)
    with pytest.raises(ValueError, match="exclude: expected patterns that match a layer"):
        read_masks(npz(maskllm_arrays(masks)), model, exclude=["nothing"])


@pytest.fixture
def hub(monkeypatch, npz, masks):
    """A stand-in for huggingface_hub.hf_hub_download: serves files by repository, records what was asked for."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    npz(maskllm_arrays(masks), "mask_compressed.npz")
    path = npz(patch_arrays(masks, {"pattern": "2:4"}))
    calls = []

    def download(repository, name):
        calls.append((repository, name))
        if repository == "me/offline":
            raise LocalEntryNotFoundError("no route")
        if repository == "me/none":
            raise OSError("404 Repository Not Found")
        if (repository, name) in {("Vinnnf/M", "mask_compressed.npz"), ("mohammad-mozaffari/P", "mask.npz")}:
            return str(path.parent / name)
        raise EntryNotFoundError("404 Entry Not Found")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return calls


def test_repositories(hub, model, masks):
    found = read_masks("Vinnnf/M", model)
    assert_same(found.masks, masks)
    assert (found.provenance["source"], found.provenance["format"]) == ("Vinnnf/M", "maskllm")
    found = read_masks("mohammad-mozaffari/P", model)
    assert (found.provenance["file"], found.provenance["format"]) == ("mask.npz", "patch")
    assert hub == [
        ("Vinnnf/M", "mask_compressed.npz"),
        ("mohammad-mozaffari/P", "mask_compressed.npz"),
        ("mohammad-mozaffari/P", "mask.npz"),
    ]


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("me/empty", FileNotFoundError, r"mask_compressed\.npz or mask\.npz in the repository, found neither"),
        ("me/offline", ConnectionError, "repository 'me/offline', got LocalEntryNotFoundError: no route; check"),
        (
            "me/none",
            ConnectionError,
            "got OSError: 404 Repository Not Found; check the name, the access and the network",
        ),
        ("no/such.npz", FileNotFoundError, r"expected a mask file .* got 'no/such\.npz' which is none; check the path"),
        ("./x/y", FileNotFoundError, "which is none"),
        ("gpt2", FileNotFoundError, "which is none"),
    ],
)
def test_sources_that_are_not_there(hub, source, error, message):
    with pytest.raises(error, match=message):
        locate(source)


def test_folders_without_one_file_are_refused(tmp_path, npz):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"mask_compressed\.npz or mask\.npz in the folder, found neither"):
        locate(tmp_path / "empty")
    npz({}, "mask.npz")
    npz({}, "mask_compressed.npz")
    with pytest.raises(ValueError, match="found both; name the file"):
        locate(tmp_path)


def test_written_file_is_the_authors_format_and_reads_back(tmp_path, model, masks):
    meta = patch_meta(masks, {"model": "base", "method": "joint", "pattern": "patch", "sparsity": 0.45})
    path = tmp_path / "new" / "mask.npz"
    write_masks(path, masks, meta)
    with np.load(path, allow_pickle=False) as archive:
        assert set(archive.files) == set(patch_arrays(masks, meta))
        for key, value in patch_arrays(masks, meta).items():
            if key != "__meta__":
                assert archive[key].dtype == value.dtype and np.array_equal(archive[key], value)
        assert json.loads(str(archive["__meta__"])) == meta
    assert meta == {
        "base_model": "base",
        "method": "PATCH",
        "variant": "PATCH-Joint",
        "sparsity": "45%",
        "pattern": "Dense/2:4 tiles",
        "format": "bit-packed uint8 (np.packbits); unpack with np.unpackbits",
        "measured_sparsity": 0.5,
    }
    found = read_masks(path, model)
    assert_same(found.masks, masks)
    assert found.pattern == "patch" and found.provenance["meta"] == meta
    write_masks(tmp_path / "again.npz", found.masks, found.provenance["meta"])
    assert (tmp_path / "again.npz").read_bytes() == path.read_bytes()
    assert sorted(p.name for p in path.parent.iterdir()) == ["mask.npz"]


def test_meta_of_other_artifacts(masks):
    for name in ("maskllm", "mask_llm"):  # the second in artifacts of 0.1.0
        meta = patch_meta(masks, {"method": name, "pattern": "patch"}, "base")
        assert (meta["base_model"], meta["method"], meta["pattern"]) == ("base", "MaskLLM", "2:4")
        assert meta["sparsity"] == "50%"
    assert patch_meta(masks, {"method": "wanda", "pattern": "unstructured"})["pattern"] == "unstructured"
    assert patch_meta(masks, {"method": "maskllm", "pattern": "2:4"})["variant"] == "MaskLLM"
    imported = {"imported_from": {"meta": {"base_model": "a", "variant": "v"}}}
    assert patch_meta(masks, imported) == {"base_model": "a", "variant": "v"}
    assert patch_meta(masks, imported, "b") == {"base_model": "b", "variant": "v"}


def test_write_refuses(tmp_path, masks, monkeypatch):
    write_masks(tmp_path / "mask.npz", masks, {})
    before = (tmp_path / "mask.npz").read_bytes()
    for call, error, message in (
        (lambda: write_masks(tmp_path / "mask.npz", masks, {}), FileExistsError, "expected a new file, found one"),
        (lambda: write_masks(tmp_path / "mask", masks, {}), ValueError, r"ending in \.npz"),
        (lambda: write_masks(tmp_path / "b.npz", {}, {}), ValueError, "at least one keep mask"),
        (
            lambda: write_masks(tmp_path / "b.npz", {"a": torch.ones(2, 2)}, {}),
            TypeError,
            "layer 'a': expected torch.bool",
        ),
        (
            lambda: write_masks(tmp_path / "b.npz", {"a": torch.ones(2).bool()}, {}),
            ValueError,
            r"torch.bool \(N, K\), got torch.bool \(2,\)",
        ),
        (lambda: write_masks(tmp_path / "b.npz", masks, {"x": float("nan")}), ValueError, "not JSON compliant"),
    ):
        with pytest.raises(error, match=message):
            call()

    def full(file, **arrays):
        file.write(b"part")
        raise OSError("No space left on device")

    monkeypatch.setattr(foreign.np, "savez_compressed", full)
    with pytest.raises(OSError, match="No space left"):
        write_masks(tmp_path / "b.npz", masks, {})
    assert [p.name for p in tmp_path.iterdir()] == ["mask.npz"]
    assert (tmp_path / "mask.npz").read_bytes() == before


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model):
    folder = tmp_path_factory.mktemp("foreign")
    model.save_pretrained(folder / "model")
    build_byte_tokenizer().save_pretrained(folder / "model")
    return folder


def run(capsys, *arguments):
    status = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_commands_round_trip(folder, tmp_path, capsys, npz, model, masks):
    source = npz(maskllm_arrays(masks), "mask_compressed.npz")
    status, out, _ = run(capsys, "import-masks", source, "--model", folder / "model", "--out", tmp_path / "a")
    assert status == 0 and "imported 14 layers (2:4)\nsparsity 0.5000" in out
    artifact = load_artifact(tmp_path / "a", model=model)
    assert artifact.masks.keys() == masks.keys()
    assert all(torch.equal(artifact.masks[name], masks[name]) for name in masks)
    assert artifact.meta["method"] == "maskllm" and artifact.meta["pattern"] == "2:4"
    assert artifact.meta["sparsity"] == 0.5
    provenance = artifact.meta["imported_from"]
    assert provenance["source"] == str(source) and provenance["format"] == "maskllm"
    assert provenance["file_sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()

    status, out, _ = run(capsys, "export-masks", tmp_path / "a", "--out", tmp_path / "m.npz", "--base-model", "hub/id")
    assert status == 0 and "14 layers: sparsity 0.5000" in out and "note" not in out
    found = read_masks(tmp_path / "m.npz", model)
    assert found.provenance["meta"]["base_model"] == "hub/id"
    # The flag and the word are one setting, and a configuration file may hold it as well.
    again = ("--model", folder / "model", "--out", tmp_path / "b")
    assert run(capsys, "import-masks", "--source", tmp_path / "m.npz", *again)[0] == 0
    assert load_artifact(tmp_path / "b").meta["method"] == "maskllm"  # as the file in the PATCH authors' format tells
    assert run(capsys, "import-masks", "--config", tmp_path / "b" / "config.resolved.yaml", "--overwrite")[0] == 0
    assert run(capsys, "export-masks", "--masks", tmp_path / "b", "--out", tmp_path / "n.npz")[0] == 0
    assert (tmp_path / "n.npz").read_bytes() == (tmp_path / "m.npz").read_bytes()


def test_imported_masks_serve_the_other_commands(folder, tmp_path, capsys, npz, masks):
    source = npz(maskllm_arrays(masks))
    imported = ("import-masks", source, "--model", folder / "model", "--out", tmp_path / "a", "--exclude", "*.k_proj")
    assert run(capsys, *imported)[0] == 0
    text = tmp_path / "t.txt"
    text.write_text("the quick fox " * 60)
    status, out, _ = run(
        capsys, "eval", "--model", folder / "model", "--masks", tmp_path / "a", "--data", text, "--window", "64"
    )
    assert status == 0 and "a: sparsity 0.5000 in the masked layers" in out
    status, out, _ = run(
        capsys, "export", "--model", folder / "model", "--masks", tmp_path / "a", "--out", tmp_path / "packed"
    )
    assert status == 0 and "sparsity 0.5000 in the masked layers, 0.4667 over the whole decoder" in out


def test_commands_refuse(folder, tmp_path, capsys, npz, masks):
    model, out = ("--model", folder / "model"), ("--out", tmp_path / "a")
    source = npz(maskllm_arrays(masks))
    torch.save({f"{name}.weight.mask": keep.float() for name, keep in masks.items()}, tmp_path / "m.pt")
    sparse = {name: torch.zeros_like(keep) for name, keep in masks.items()}
    zero = npz(patch_arrays(sparse, {}), "zero.npz")
    for arguments, message in (
        (("import-masks", *model, *out), "expected --source, got nothing"),
        (("import-masks", tmp_path / "m.pt", *model, *out), "--allow-pt"),
        (("import-masks", zero, *model, *out), "prune at most half of the weights, got sparsity 1.0000"),
        (("import-masks", source, "--model", tmp_path / "no", *out), "--model: expected a model folder"),
        (("import-masks", source, *model, "--out", source), "--out: expected a folder"),
        (("export-masks", "--out", tmp_path / "n.npz"), "expected --masks, got nothing"),
        (("export-masks", tmp_path / "none", "--out", tmp_path / "n.npz"), "expected a folder made by prune or learn"),
        (("export-masks", tmp_path / "none", "--out", source), "--out: expected a new file"),
    ):
        status, _, err = run(capsys, *arguments)
        assert status == 2 and message in err
    assert not (tmp_path / "a").exists() and not (tmp_path / "n.npz").exists()
    assert run(capsys, "import-masks", tmp_path / "m.pt", *model, *out, "--allow-pt")[0] == 0


def test_export_says_that_updated_weights_stay_behind(tmp_path, capsys):
    from patch.artifacts.artifact import save_artifact

    keep = torch.ones(4, 4, dtype=torch.bool)
    save_artifact(
        tmp_path / "a",
        {"x": keep},
        meta={"model": "m"} | fingerprints(torch.nn.Linear(4, 4)),
        weights={"x": torch.ones(4, 4)},
    )
    status, out, _ = run(capsys, "export-masks", tmp_path / "a", "--out", tmp_path / "m.npz")
    assert status == 0 and "note: mask.npz holds masks only" in out


def test_prepare_pruned_model_takes_a_maskllm_checkpoint(tmp_path, npz, masks, tokenizer, text_file):
    from patch.priors import tile_scores
    from patch.pruning import prune_model

    source = npz(maskllm_arrays(masks))
    args = {
        "prune_method": "maskllm",
        "maskllm_checkpoint": str(source),
        "nsamples": 4,
        "calibration_dataset": str(text_file),
    }
    model = build_tiny_model()
    model.seqlen = 32
    dense = {name: linear.weight.detach().clone() for name, linear in maskable_linears(model).items()}
    prepare_pruned_model(model, tokenizer, tmp_path / "c", args, (64, 32), 0.35)
    assert_same(keep_masks(model), masks)
    for name, keep in masks.items():
        assert torch.equal(model.get_submodule(name).weight, dense[name].masked_fill(~keep, 0))
    # Tiles are scored by Wanda, as a stored mask has no scores.
    from patch.data.tokens import calibration_windows

    windows, _ = calibration_windows(tokenizer, text_file, nsamples=4, seqlen=32)
    reference = prune_model(
        build_tiny_model(), "wanda", pattern="unstructured", sparsity=0.35, calibration=windows, progress=False
    )
    for name, keep in reference.items():
        assert torch.equal(model.get_submodule(name).distribution_scores, tile_scores(keep, (64, 32)))

    again = build_tiny_model()
    again.seqlen = 32
    prepare_pruned_model(again, tokenizer, tmp_path / "c", args, (64, 32), 0.35)
    assert_same(keep_masks(again), masks)
    # Another file of masks is another checkpoint.
    torch.save({f"{name}.weight.mask": keep.roll(4, 1).float() for name, keep in masks.items()}, tmp_path / "m.pt")
    fresh = build_tiny_model()
    fresh.seqlen = 32
    other = args | {"maskllm_checkpoint": tmp_path / "m.pt"}
    with pytest.raises(ValueError, match="expected maskllm_sha256 = "):
        prepare_pruned_model(fresh, tokenizer, tmp_path / "c", other, (64, 32), 0.35)
    prepare_pruned_model(fresh, tokenizer, tmp_path / "d", other, (64, 32), 0.35)
    assert torch.equal(keep_masks(fresh)[FIRST], masks[FIRST].roll(4, 1))
    hybrid = npz(patch_arrays(masks, {"pattern": "Dense/2:4 tiles"}), "hybrid.npz")
    with pytest.raises(ValueError, match=r"maskllm_checkpoint: expected 2:4 masks, .* holds 'patch'"):
        prepare_pruned_model(fresh, tokenizer, tmp_path / "e", args | {"maskllm_checkpoint": hybrid}, (64, 32), 0.35)
