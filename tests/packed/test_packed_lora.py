"""LoRA of peft on packed models: trained by hand and by transformers' Trainer, saved, loaded, not merged."""

from __future__ import annotations

import copy

import pytest
import torch
from support.models import mask_model

import patch
from patch.packed import pack_model, save_packed, unpack_model
from patch_kernels import TiledLinear

peft = pytest.importorskip("peft", minversion="0.21")
packed_lora = pytest.importorskip("patch.packed.lora", exc_type=ImportError)

IDS = torch.randint(0, 250, (2, 24), generator=torch.Generator().manual_seed(0))


def lora(**values):
    return packed_lora.for_packed(peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], **values))


@pytest.fixture
def packed(tiny_model):
    return pack_model(mask_model(tiny_model(dtype=torch.bfloat16)))


def test_lora_trains_saves_and_loads_beside_the_packed_weight(packed, tmp_path):
    save_packed(packed, None, tmp_path / "packed")
    before = {name: tensor.clone() for name, tensor in packed.state_dict().items()}
    dense = peft.get_peft_model(unpack_model(copy.deepcopy(packed)), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    model = peft.get_peft_model(packed, lora())
    layers = [module for module in model.modules() if isinstance(module, packed_lora.PackedLora)]
    assert len(layers) == 4 and all(isinstance(layer.get_base_layer(), TiledLinear) for layer in layers)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(8):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2
    for name, tensor in model.get_base_model().state_dict().items():
        if "lora_" not in name:
            assert torch.equal(tensor, before[name.replace(".base_layer", "")])
    model.save_pretrained(tmp_path / "adapter")
    config = packed_lora.for_packed(peft.LoraConfig.from_pretrained(tmp_path / "adapter"))
    again = peft.PeftModel.from_pretrained(patch.load(tmp_path / "packed"), tmp_path / "adapter", config=config)
    assert torch.equal(again.eval()(IDS).logits, model.eval()(IDS).logits)
    with again.disable_adapter():
        torch.testing.assert_close(again(IDS).logits, dense.get_base_model()(IDS).logits, rtol=2e-2, atol=2e-2)
    with pytest.raises(
        ValueError, match=r"merging LoRA: expected a dense layer, got a packed one.*on a dense copy \(unp"
    ):
        model.merge_and_unload()
    assert torch.equal(again(IDS).logits, model(IDS).logits)  # nothing was merged


def test_kinds_of_lora_that_read_the_weight_are_refused(packed):
    for values in ({"use_dora": True}, {"init_lora_weights": "pissa"}):
        with pytest.raises(ValueError, match="LoRA on a packed layer: expected plain LoRA, got init_lora_weights="):
            peft.get_peft_model(copy.deepcopy(packed), lora(**values))


def test_trainer_trains_adapters_and_refuses_the_packed_weights(packed, tmp_path):
    import transformers

    options = transformers.TrainingArguments(
        tmp_path,
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=0.02,
        report_to=[],
        use_cpu=True,
        save_steps=3,
    )
    data = [{"input_ids": row, "labels": row} for row in IDS]
    with pytest.raises(ValueError, match="cannot perform fine-tuning on purely quantized models"):
        transformers.Trainer(packed, options, train_dataset=data)
    model = peft.get_peft_model(packed, lora())
    start = model(IDS, labels=IDS).loss.item()
    transformers.Trainer(model, options, train_dataset=data).train()
    assert model.eval()(IDS, labels=IDS).loss.item() < start
    assert (tmp_path / "checkpoint-3" / "adapter_model.safetensors").is_file()
