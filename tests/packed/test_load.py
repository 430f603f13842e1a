"""Packed models through save_pretrained / from_pretrained, and files that must be refused."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import ROOT
from support.models import build_tiny_multimodal, mask_model
from transformers import AutoModelForCausalLM

import patch
from patch.files.folder import verify_folder
from patch.packed.convert import pack_model
from patch.packed.load import load
from patch.packed.quantization_config import PatchConfig
from patch.packed.save import save_dense, save_packed
from patch.packed.swap import packed_layers
from patch_kernels import TiledLinear

IDS = torch.randint(0, 250, (2, 24), generator=torch.Generator().manual_seed(0))
LAYER = "model.layers.0.mlp.up_proj"


@pytest.fixture
def packed(tiny_model):
    return pack_model(mask_model(tiny_model(dtype=torch.bfloat16)))


@pytest.fixture
def saved(packed, tmp_path):
    save_packed(packed, None, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("arch", "dtype", "overrides"),
    [
        ("llama", torch.bfloat16, {}),
        ("llama", torch.float16, {"tie_word_embeddings": True}),
        ("llama", torch.bfloat16, {"attention_bias": True, "mlp_bias": True, "intermediate_size": 200}),
        ("qwen2", torch.float16, {"tie_word_embeddings": True, "hidden_size": 256}),
        ("gemma3", torch.bfloat16, {}),
        ("opt", torch.bfloat16, {}),
    ],
)
def test_round_trip_is_exact(tmp_path, tiny_model, arch, dtype, overrides):
    model = tiny_model(arch, dtype=dtype, **overrides)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    pack_model(mask_model(model))
    expected = model(IDS).logits
    model.save_pretrained(tmp_path / "one", max_shard_size="60KB")
    assert len(list((tmp_path / "one").glob("*.safetensors"))) > 1
    for loaded in (AutoModelForCausalLM.from_pretrained(tmp_path / "one"), load(tmp_path / "one")):
        assert isinstance(
            loaded.model.decoder.layers[0].fc1 if arch == "opt" else loaded.get_submodule(LAYER), TiledLinear
        )
        assert torch.equal(loaded(IDS).logits, expected)
        assert all(layer.tiled_weight.schedule is not None for _, layer in packed_layers(loaded))
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 258}
    assert torch.equal(loaded.generate(IDS, **options), model.generate(IDS, **options))
    loaded.save_pretrained(tmp_path / "two")  # a loaded model can be saved again
    assert torch.equal(load(tmp_path / "two")(IDS).logits, expected)


@pytest.mark.parametrize("arch", ["gemma3", "qwen2_5_vl", "llava"])
def test_multimodal_wrappers_load_as_what_was_saved(tmp_path, arch):
    """transformers gives their tensors other names in files than in the model."""
    model = mask_model(build_tiny_multimodal(arch))
    expected = model(input_ids=IDS).logits
    save_dense(model, None, tmp_path / "dense")
    assert torch.equal(load(tmp_path / "dense")(input_ids=IDS).logits, expected)
    pack_model(model)
    save_packed(model, None, tmp_path / "packed")
    model.save_pretrained(tmp_path / "plain")
    expected = model(input_ids=IDS).logits
    loaded = [load(tmp_path / "packed"), load(tmp_path / "plain"), type(model).from_pretrained(tmp_path / "plain")]
    for again in loaded:
        assert type(again) is type(model) and len(list(packed_layers(again))) == 14
        assert torch.equal(again(input_ids=IDS).logits, expected)


def as_version_1(folder):
    """The folder as it was written before tensors of packed weights were called `weight`."""
    edit_config(lambda q: (q.update(format_version=1), q.pop("other_sha256")))(folder)
    layers = json.loads((folder / "config.json").read_text())["quantization_config"]["layers"]
    edit_tensors(lambda t: [t.update({f"{name}.payload": t.pop(f"{name}.weight")}) for name in layers])(folder)


def test_folders_of_version_1_load_and_are_saved_as_version_2(saved, packed, tmp_path):
    as_version_1(saved)
    for model in (load(saved), AutoModelForCausalLM.from_pretrained(saved)):
        assert torch.equal(model(IDS).logits, packed(IDS).logits)
    model.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]["format_version"] == 2
    assert torch.equal(load(tmp_path / "again")(IDS).logits, packed(IDS).logits)
    add_tensor(f"{LAYER}.weight", torch.zeros(192, 128))(saved)
    with pytest.raises(ValueError, match=r"up_proj.weight: expected no dense weight beside the packed one, got F32"):
        load(saved)


PLAIN = """
import sys, transformers
assert not [name for name in sys.modules if name.split(".")[0].startswith("patch")]
for folder in sys.argv[1:]:
    assert transformers.AutoConfig.from_pretrained(folder).model_type == "llama"
    for name in ("AutoModel", "AutoModelForCausalLM", "LlamaForCausalLM"):
        try:
            getattr(transformers, name).from_pretrained(folder)
        except RuntimeError as error:
            print(name, "refused:", error)
        else:
            sys.exit(f"{name} opened it")
"""


def test_plain_transformers_refuses_a_packed_folder(packed, saved, tmp_path):
    """In a process that knows nothing of this package: layers without a weight would be filled with random numbers."""
    packed.save_pretrained(tmp_path / "plain")
    load(saved).save_pretrained(tmp_path / "again", max_shard_size="60KB")
    folders = [saved, tmp_path / "plain", tmp_path / "again"]
    result = subprocess.run([sys.executable, "-c", PLAIN, *folders], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("refused:") == 9
    assert "up_proj.weight" in result.stderr and "Unknown quantization type, got patch" in result.stderr


def test_dequantize_gives_a_plain_model(saved, packed, tmp_path):
    expected = packed(IDS).logits
    model = load(saved)
    model.dequantize()
    assert not list(packed_layers(model)) and not getattr(model, "is_quantized", False)
    torch.testing.assert_close(model(IDS).logits, expected, rtol=2e-2, atol=2e-2)
    model.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert torch.equal(load(tmp_path / "dense")(IDS).logits, model(IDS).logits)
    wide = load(saved)
    wide.dequantize(torch.float32)
    assert wide.get_submodule(LAYER).weight.dtype == torch.float32


def test_deepcopy_and_state_dict(packed):
    expected = packed(IDS).logits
    twin = copy.deepcopy(packed)
    packed.get_submodule(LAYER).payload.zero_()
    assert torch.equal(twin(IDS).logits, expected)
    assert not torch.equal(packed(IDS).logits, expected)
    packed.load_state_dict(twin.state_dict())
    assert torch.equal(packed(IDS).logits, expected)


def test_compile_without_graph_breaks(packed):
    expected = packed(IDS).logits
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(IDS).logits, expected, rtol=2e-2, atol=2e-2)


def test_footprint_counts_the_packed_weights(packed, tiny_model):
    payload = sum(layer.payload.numel() for _, layer in packed_layers(packed))
    dense = tiny_model(dtype=torch.bfloat16)
    for name, _ in packed_layers(packed):
        dense.set_submodule(name, torch.nn.Identity())
    assert packed.get_memory_footprint() >= payload + dense.get_memory_footprint()


def test_unverified_load_and_lazy_export(saved, packed):
    assert torch.equal(patch.load(saved, verify=False)(IDS).logits, packed(IDS).logits)


def edit_config(change):
    def damage(folder):
        config = json.loads((folder / "config.json").read_text())
        change(config["quantization_config"])
        (folder / "config.json").write_text(json.dumps(config))

    return damage


def edit_layer(**values):
    return edit_config(lambda q: q["layers"][LAYER].update(values))


def edit_tensors(change):
    def damage(folder):
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def flip(name):
    def change(tensors):
        tensors[name].view(-1)[5] ^= 1

    return edit_tensors(change)


def flip_byte(name):
    def change(tensors):
        tensors[name].view(torch.uint8)[3, 1] ^= 1

    return edit_tensors(change)


def edit_top(**values):
    def damage(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))

    return damage


def rename_layer(new):
    return edit_config(lambda q: q["layers"].update({new: q["layers"].pop(LAYER)}))


def truncate(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def outside_index(folder):
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def missing_shard(folder):
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def resize_payload(tensors):
    tensors[f"{LAYER}.weight"] = tensors[f"{LAYER}.weight"][:-2048]


def add_tensor(name, value):
    return edit_tensors(lambda t: t.update({name: value}))


# up_proj is 192x128: 2x1 tiles, 36864 to 65536 bytes.
DAMAGES = [
    (
        edit_config(lambda q: q.update(format_version=4)),
        "quantization_config: format_version: expected 1 to 3, got 4. It was written by another version",
    ),
    (edit_config(lambda q: q.update(format_version="1")), "format_version: expected 1 to 3, got '1'"),
    (edit_config(lambda q: q.update(tile=[64, 64])), r"tile: expected \[128, 128\], got \[64, 64\]. Export"),
    (edit_config(lambda q: q.update(tile=128)), r"tile: expected \[128, 128\], got 128. Export"),
    (
        edit_config(lambda q: q.update(kernel="os.system")),
        "quantization_config: expected known keys, got 'kernel'. Export",
    ),
    (edit_config(lambda q: q.update(layers={})), "layers: expected 1 to 100000 layers by name, got {}. Export"),
    (edit_config(lambda q: q.update(layers=[1])), r"layers: expected 1 to 100000 layers by name, got \[1\]"),
    (edit_config(lambda q: q.pop("layers")), "layers: expected 1 to 100000 layers by name, got None"),
    (edit_layer(out_features=0), f"{LAYER}.out_features: expected a size of 1 to .*, got 0. Export"),
    (edit_layer(in_features=-128), f"{LAYER}.in_features: expected a size of 1 to 2.31-1, got -128"),
    (edit_layer(in_features=2**40), "in_features: expected a size of 1 to .*, got 1099511627776"),
    (edit_layer(in_features="128"), "in_features: expected a size of 1 to .*, got '128'"),
    (edit_layer(in_features=128.0), "in_features: expected a size of 1 to .*, got 128.0"),
    (edit_layer(bias=0), f"{LAYER}.bias: expected true or false, got 0. Export"),
    (edit_layer(dtype="float32"), f"{LAYER}.dtype: expected float16 or bfloat16, got 'float32'. Export"),
    (edit_layer(dtype="float16"), r"expected one dtype for all layers, got \['bfloat16', 'float16'\]"),
    (
        edit_layer(payload_bytes=36864 - 1),
        "payload_bytes of 36864 to 65536 in steps of 14336 for 2x1 tiles, got 36863",
    ),
    (edit_layer(payload_bytes=2**60), "payload_bytes of 36864 to 65536"),
    (edit_layer(payload_bytes=36864 + 2048), "payload_bytes of 36864 to 65536 in steps of 14336"),
    (edit_layer(sha256="x" * 64), f"{LAYER}.sha256: expected a SHA-256 of 64 hex digits, got 'x+'"),
    (edit_layer(sha256="0" * 64), f"{LAYER}: expected a packed weight of SHA-256 0+, got [^0]"),
    (edit_layer(loader="x"), f"expected known keys, got 'layers.{LAYER}.loader'"),
    (edit_config(lambda q: q["layers"].update({LAYER: 3})), f"{LAYER}: expected values by name, got 3. Export"),
    (rename_layer("../up"), "expected module paths .*, got '../up'"),
    (rename_layer("__class__.x y"), "expected module paths .*, got '__class__.x y'"),
    (
        rename_layer("model.layers.7.mlp.up_proj"),
        r"expected an nn.Linear \(192, 128\) at 'model.layers.7.mlp.up_proj'.*found nothing",
    ),
    (rename_layer("model.norm"), "at 'model.norm' of LlamaForCausalLM, found LlamaRMSNorm"),
    (edit_layer(out_features=190), r"expected an nn.Linear \(190, 128\) at .*, found Linear \(192, 128\)"),
    (edit_layer(bias=True), "up_proj': expected bias True as packed, got False"),
    (edit_tensors(lambda t: t.pop(f"{LAYER}.weight")), r"up_proj.weight: expected U8 .* got nothing"),
    (
        edit_tensors(lambda t: t.pop(f"{LAYER}.tile_is_sparse")),
        r"tile_is_sparse: expected U8 \(2, 1\), got nothing",
    ),
    (edit_tensors(resize_payload), r"up_proj.weight: expected U8 \(\d+,\), got U8"),
    (add_tensor(f"{LAYER}.weight", torch.zeros(9)), r"got F32 \(9,\)"),
    (
        add_tensor(f"{LAYER}.tile_is_sparse", torch.zeros(1, 2).byte()),
        r"expected U8 \(2, 1\), got U8 \(1, 2\)",
    ),
    (
        add_tensor(f"{LAYER}.weight", torch.zeros(192, 128)),
        r"up_proj.weight: expected U8 \(\d+,\), got F32 \(192, 128\)",
    ),
    (add_tensor(f"{LAYER}.bias", torch.zeros(192)), "up_proj.bias: expected no bias by config.json, got F32"),
    (
        add_tensor(f"{LAYER}.tile_is_sparse", torch.tensor([[2], [0]]).byte()),
        "tile_is_sparse: expected flags of 0 and 1, got 2",
    ),
    (flip(f"{LAYER}.weight"), f"{LAYER}: expected a packed weight of SHA-256 .*, got"),
    (
        lambda f: (
            edit_config(lambda q: q.pop("other_sha256"))(f),
            edit_tensors(lambda t: t.pop("model.norm.weight"))(f),
        ),
        r"found missing keys: 1 \(model.norm.weight\)",
    ),
    (
        flip_byte("model.embed_tokens.weight"),
        r"model: expected tensors beside the packed layers .* of SHA-256 .*, got .*\. The file was changed",
    ),
    (edit_top(rms_norm_eps=0.5), r"config\.json: expected the settings that the weights were saved with, got others"),
    (edit_top(hidden_size=130), "expected a config.json that describes the model of its tensors, got one that transf"),
    (
        edit_top(num_attention_heads="four"),
        "expected a config.json that describes .* got one that .*num_attention_heads",
    ),
    (
        lambda f: (edit_config(lambda q: q.pop("config_sha256"))(f), edit_top(num_hidden_layers=5)(f)),
        r"expected every tensor of LlamaForCausalLM, found missing keys: 27 \(",
    ),
    (truncate, "model.safetensors: expected the end of the file at byte"),
    (outside_index, "plain names of safetensors files, got '../model.safetensors'. Do not load it"),
    (missing_shard, "model-00002-of-00002.safetensors: expected a file of the model, found none"),
    (pickled, "model.safetensors: expected a file of the model, found none"),
    (lambda f: (f / "config.json").unlink(), "config.json: expected a file of the model, found none"),
    (lambda f: (f / "config.json").write_text('{"a": 1, "a": 2}'), "a key occurs twice"),
    (lambda f: (f / "config.json").write_text("[]"), r"config.json: expected values by name, got \[\]"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_load_refuses(saved, damage, message):
    damage(saved)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load(saved)


def test_damage_beside_the_packed_layers_is_found_only_when_asked(saved):
    flip_byte("model.embed_tokens.weight")(saved)
    assert load(saved, verify=False) is not None


def test_weights_changed_after_packing_are_saved_as_they_are(saved, tmp_path):
    """config.json describes what is saved, not what was packed."""
    model = load(saved)
    model.get_submodule(LAYER).payload[5] ^= 1
    model.model.norm.weight.data.fill_(2)
    expected = model(IDS).logits
    model.save_pretrained(tmp_path / "plain")
    save_packed(model, None, tmp_path / "packed")
    assert torch.equal(load(tmp_path / "plain")(IDS).logits, expected)
    assert torch.equal(load(tmp_path / "packed")(IDS).logits, expected)


def test_sizes_are_checked_before_anything_is_allocated(saved, monkeypatch):
    """The headers are enough to refuse: no tensor of the file is read."""
    import safetensors

    edit_layer(payload_bytes=65536)(saved)
    edit_tensors(resize_payload)(saved)

    def forbidden(*args, **kwargs):
        raise AssertionError("a tensor file was opened")

    monkeypatch.setattr(safetensors, "safe_open", forbidden)
    monkeypatch.setattr("transformers.modeling_utils.safe_open", forbidden)
    with pytest.raises(ValueError, match=r"up_proj.weight: expected U8 \(65536,\), got U8"):
        load(saved)


def test_from_pretrained_checks_as_well(saved):
    flip(f"{LAYER}.weight")(saved)
    with pytest.raises(ValueError, match=f"{LAYER}: expected a packed weight of SHA-256 .*, got"):
        AutoModelForCausalLM.from_pretrained(saved)
    assert load(saved, verify=False) is not None  # a damaged value, but a valid layout


def test_wrong_dtype_and_device_map_are_refused(saved):
    with pytest.raises(ValueError, match=r"expected dtype torch.bfloat16 .* got torch.float32. Leave dtype out"):
        load(saved, dtype=torch.float32)
    with pytest.raises(ValueError, match="device_map without 'disk'"):
        load(saved, device_map={"": "disk"})


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "auto"},
        {"torch_dtype": torch.bfloat16},
        {"device_map": "cpu"},
        {"device_map": "auto"},
        {"dtype": None},
    ],
)
def test_options_of_from_pretrained_work(saved, packed, options):
    assert torch.equal(load(saved, **options)(IDS).logits, packed(IDS).logits)


def test_a_missing_path_is_refused_before_anything_heavy_is_imported(tmp_path):
    code = "import sys, patch\ntry: patch.load(sys.argv[1])\nexcept FileNotFoundError as error: print(error)\n"
    code += "print(*sorted({'torch', 'transformers'} & sys.modules.keys()))"
    paths = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(ROOT)}}
    found = subprocess.run([sys.executable, "-c", code, "./missing"], capture_output=True, text=True, **paths)
    assert found.stdout == "expected a folder with a model at ./missing, found none; check the path\n\n", found.stderr


def test_paths_that_are_no_models(tmp_path):
    for path in (tmp_path / "nothing", "./nothing", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="expected a folder with a model"):
            load(path)


def test_interrupted_export_is_recovered_by_load(saved, packed):
    os.rename(saved, saved.with_name("model.old-999999999"))
    assert torch.equal(load(saved)(IDS).logits, packed(IDS).logits)


def test_config_object_is_strict():
    with pytest.raises(ValueError, match="quant_method: expected 'patch', got 'gptq'"):
        PatchConfig(layers={"a": {}}, quant_method="gptq")
    with pytest.raises(ValueError, match="layers: expected 1 to 100000 layers by name, got None"):
        PatchConfig()


def test_a_folder_gets_its_name_once_it_is_finished(packed, tmp_path):
    def finish(directory):
        assert not (tmp_path / "packed").exists()
        load(directory)
        (directory / "README.md").write_text("# card")

    assert save_packed(packed, None, tmp_path / "packed", finish=finish) == tmp_path / "packed"
    assert (tmp_path / "packed" / "README.md").read_text() == "# card"
    assert "README.md" in verify_folder(tmp_path / "packed").files

    def fail(directory):
        raise RuntimeError("not as it should be")

    with pytest.raises(RuntimeError, match="not as it should be"):
        save_packed(packed, None, tmp_path / "other", finish=fail)
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]
