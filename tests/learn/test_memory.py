"""The memory estimate against what real runs allocate, as reported by torch's allocator, and `learn --dry-run`."""

from __future__ import annotations

import dataclasses
import gc
import resource

import pytest
import torch
import transformers
from support.commands import run
from support.models import build_tiny_model
from transformers import TrainerCallback

from patch.learn import trainer
from patch.learn.config import LearnConfig
from patch.learn.memory import KINDS, PHASES, learning_memory
from patch.learn.objective import Objective
from patch.learn.run import learn
from patch.models.structure import maskable_linears

SIZES = {"hidden_size": 256, "max_position_embeddings": 512}
SHAPES = {
    "llama": {"intermediate_size": 512},
    "qwen2": {"intermediate_size": 512},
    "gemma3": {"intermediate_size": 512},
    "opt": {"ffn_dim": 512, "word_embed_proj_dim": 256},
}
SEQLEN = 128
cpu_only = pytest.mark.skipif(torch.cuda.is_available(), reason="learn uses the GPU; test_gpu.py measures there")


def model_of(arch: str, dtype: torch.dtype = torch.float32, **overrides):
    return build_tiny_model(arch, dtype=dtype, **(SIZES | SHAPES[arch] | overrides))


def config_of(mode: str, accumulation: int = 1, **settings) -> LearnConfig:
    sparsity = None if mode == "maskllm" else 0.45
    settings = {
        "local_batch_size": 2,
        "global_batch_size": 2 * accumulation,
        "warmup_steps": 0,
        "tile": (32, 32),
    } | settings
    return LearnConfig.from_preset(mode, sparsity, **settings)


def measured_peak(model, config: LearnConfig, callbacks=(), seqlen: int = SEQLEN) -> int:
    """Highest number of bytes during `learn`: the model's own, plus the events of torch's CPU allocator."""
    linears = maskable_linears(model)
    priors = None
    if config.mode == "tile":
        keep = torch.tensor([True, True, False, False])
        priors = {name: keep.repeat(lin.weight.numel() // 4).view(lin.weight.shape) for name, lin in linears.items()}
    blocks = torch.randint(0, 250, (2 * config.global_batch_size, seqlen))
    storages = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())]
    before = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    gc.collect()  # an earlier run's trainer, freed during this one, would count against it
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        learn(model, blocks, config, prior_masks=priors, callbacks=callbacks, progress=False)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    return before + highest


def estimate(model, config: LearnConfig, **settings):
    return learning_memory(
        model.config, config, **({"seqlen": SEQLEN, "dtype": next(model.parameters()).dtype} | settings)
    )


@cpu_only
@pytest.mark.parametrize(
    ("arch", "dtype", "mode", "accumulation", "checkpointing"),
    [
        ("llama", torch.bfloat16, "joint", 1, False),
        ("llama", torch.bfloat16, "joint", 2, True),
        ("llama", torch.float32, "tile", 1, False),
        ("llama", torch.bfloat16, "tile", 2, True),
        ("llama", torch.float32, "maskllm", 2, False),
        ("qwen2", torch.bfloat16, "maskllm", 1, True),
        ("gemma3", torch.float32, "joint", 1, True),
        ("opt", torch.float32, "tile", 1, True),
    ],
)
def test_estimate_is_the_measured_peak(arch, dtype, mode, accumulation, checkpointing):
    model, config = model_of(arch, dtype), config_of(mode, accumulation, grad_checkpoint=checkpointing)
    expected = estimate(model, config)
    assert expected.peak_phase == "step"
    assert expected.peak == pytest.approx(measured_peak(model, config), rel=0.05)


@cpu_only
@pytest.mark.parametrize(
    ("config", "dtype", "mode", "checkpointing"),
    [("MixtralConfig", torch.bfloat16, "joint", False), ("GptOssConfig", torch.bfloat16, "tile", True)],
)
def test_estimate_of_a_mixture(config, dtype, mode, checkpointing):
    """Routes are not known before: as if all experts had as many tokens."""
    sizes = SIZES | {"vocab_size": 260, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 64, "num_local_experts": 8, "num_experts_per_tok": 2}
    sizes |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**sizes), dtype=dtype)
    settings = config_of(mode, grad_checkpoint=checkpointing)
    expected = estimate(model, settings)
    assert expected.masked_elems > 0.9 * sum(parameter.numel() for parameter in model.model.layers.parameters())
    assert expected.peak == pytest.approx(measured_peak(model, settings), rel=0.05)


@cpu_only
@pytest.mark.parametrize("checkpointing", [False, True])
def test_estimate_of_distillation(checkpointing):
    """The teacher is no second copy of the weights: what it adds is a few times the logits of a micro-batch."""
    model = model_of("llama", torch.bfloat16)
    config = config_of("joint", 2, grad_checkpoint=checkpointing, objective="distill")
    found, without = (estimate(model, c) for c in (config, dataclasses.replace(config, objective="tokens")))
    assert found.peak == pytest.approx(measured_peak(model, config), rel=0.05)
    assert found.by_kind["masked weights"] == without.by_kind["masked weights"]
    assert found.by_kind["other weights"] == without.by_kind["other weights"]
    logits_bytes = 4 * config.local_batch_size * SEQLEN * 260
    assert 0 <= found.peak - without.peak <= 4 * logits_bytes


@cpu_only
@pytest.mark.parametrize(
    ("logits", "moments"), [("float32", "bfloat16"), ("float32", "int8"), ("bfloat16", "bfloat16")]
)
def test_estimate_with_less_precision(logits, moments):
    model = model_of("llama", torch.bfloat16)
    config = config_of("joint", 2, grad_checkpoint=True, logits_dtype=logits, moments=moments)
    found = estimate(model, config)
    assert found.peak == pytest.approx(measured_peak(model, config), rel=0.05)
    elems = sum(linear.weight.numel() for linear in maskable_linears(model).values())
    tiles = 12 * elems // 32**2  # logits and moments of tiles
    assert found.by_kind["logits"] <= elems * 6 * (1 if logits == "float32" else 0.5) + tiles
    assert found.by_kind["moments"] <= elems * (6 if moments == "bfloat16" else 3.1) + tiles


@cpu_only
def test_end_is_the_peak_when_activations_are_few():
    model, config = model_of("llama", torch.bfloat16, num_hidden_layers=5), config_of("tile", grad_checkpoint=True)
    found = estimate(model, config, seqlen=16)
    assert found.peak_phase == "end"
    assert found.peak == pytest.approx(measured_peak(model, config, seqlen=16), rel=0.05)


class Keep(TrainerCallback):
    """Holds memory from the first step on."""

    def on_step_begin(self, args, state, control, **kwargs):
        self.kept = torch.ones(1 << 20)


@cpu_only
def test_measurement_sees_memory_that_is_kept():
    model, config = model_of("llama"), config_of("tile")
    extra = 4 << 20
    difference = measured_peak(model, config, callbacks=[Keep()]) - estimate(model, config).peak
    assert difference == pytest.approx(extra, rel=0.2)


def test_estimate_sees_memory_that_the_step_keeps(monkeypatch):
    model, config = model_of("llama"), config_of("joint")
    before = estimate(model, config)
    penalty = Objective.__call__

    def keeping(self, *arguments):
        self.kept = torch.ones(1 << 20)
        return penalty(self, *arguments)

    monkeypatch.setattr(Objective, "__call__", keeping)
    after = estimate(model, config)
    assert after.peak - before.peak == 4 << 20
    assert after.by_kind["activations"] - before.by_kind["activations"] == 4 << 20


@pytest.mark.parametrize("mode", ["joint", "tile", "maskllm"])
def test_kinds(mode):
    model = model_of("llama", torch.bfloat16)
    linears = maskable_linears(model)
    elems = sum(linear.weight.numel() for linear in linears.values())
    tiles = sum(linear.weight.numel() // 1024 for linear in linears.values())
    found = estimate(model, config_of(mode, accumulation=2))
    assert tuple(found.phases) == PHASES
    step = found.phases["step"]
    assert tuple(step) == KINDS
    logits = 4 * ((elems // 4 * 6 if mode != "tile" else 0) + (tiles if mode != "maskllm" else 0))
    tensors = len(linears) * (2 if mode == "joint" else 1)
    assert step["masked weights"] == 2 * elems
    assert step["other weights"] == sum(
        tensor.nbytes
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        if name.removesuffix(".weight") not in linears
    )
    assert step["logits"] == step["gradients"] == logits
    assert step["moments"] == 2 * logits + 4 * tensors  # AdamW counts steps per tensor
    assert step["fixed patterns"] == (elems // 8 if mode == "tile" else 0)
    assert found.phases["start"]["moments"] == 0
    assert found.phases["end"]["gradients"] == 0
    assert (found.masked_elems, found.masked_layers) == (elems, len(linears))
    assert found.host_bytes == (elems if mode == "tile" else 0)


def test_tied_weights_count_once():
    config = transformers.LlamaConfig(**build_tiny_model("llama").config.to_diff_dict() | {"tie_word_embeddings": True})
    free = build_tiny_model("llama").config
    kinds = [
        learning_memory(c, config_of("tile"), seqlen=32, dtype=torch.float32).phases["step"]["other weights"]
        for c in (free, config)
    ]
    assert kinds[0] - kinds[1] == 4 * free.vocab_size * free.hidden_size


def test_excluded_layers_have_no_logits():
    model = model_of("llama")
    whole, part = (estimate(model, config_of("maskllm"), exclude=names) for names in ((), ("*.mlp.*",)))
    assert part.masked_layers == 8
    assert part.by_kind["logits"] == part.masked_elems * 6
    assert part.by_kind["masked weights"] + part.by_kind["other weights"] == (
        whole.by_kind["masked weights"] + whole.by_kind["other weights"]
    )


def test_prior_masks_are_host_memory():
    model = model_of("llama")
    found = estimate(model, config_of("joint"), with_prior=True)
    assert found.host_bytes == found.masked_elems
    assert "note: host memory holds the prior masks besides, 1.18 MB" in found.text()
    assert found.peak == estimate(model, config_of("joint")).peak


def test_any_optimiser_is_walked(monkeypatch):
    def momentum(logits, config):
        return torch.optim.SGD(list(logits.values()), lr=config.lr, momentum=0.9)

    monkeypatch.setattr(trainer, "make_optimizer", momentum)
    step = estimate(model_of("llama"), config_of("joint")).phases["step"]
    assert step["moments"] == step["logits"]


def test_a_large_model_takes_no_memory():
    config = transformers.LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=2, num_attention_heads=64, vocab_size=32000
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = learning_memory(config, config_of("joint"), seqlen=2048, dtype=torch.bfloat16)
    assert found.peak > 40e9
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB


def test_text_says_what_fits():
    found = estimate(model_of("llama"), config_of("joint"))
    text = found.text(cards_gb=(24, 0))
    assert "14 masked layers with 0.001 billion weights" in text
    assert f"24 GB           fits, {(24e9 - found.peak) / 1e9:.2f} GB left" in text
    assert f"0 GB            does not fit, {found.peak / 1e6:.2f} MB too much" in text
    assert "in phase step (start" in text
    assert "note: not in these figures: CUDA context" in text
    assert [line.split("  ")[1].strip() for line in text.splitlines()[1:8]] == list(KINDS)


def test_what_learning_refuses_is_refused():
    with pytest.raises(ValueError, match=r"expected float32, bfloat16 or float64 weights, got torch\.float16"):
        estimate(model_of("llama"), config_of("joint"), dtype=torch.float16)
    with pytest.raises(
        ValueError, match=r"train_blocks: expected samples of 2 to 512 tokens \(max_position_embeddings\), got 1024"
    ):
        estimate(model_of("opt"), config_of("joint"), seqlen=1024)
    with pytest.raises(ValueError, match=r"moments: expected float32 for the float64 weights of .* got bfloat16"):
        estimate(model_of("llama"), config_of("joint", moments="bfloat16"), dtype=torch.float64)
    with pytest.raises(ValueError, match="which matches none"):
        estimate(model_of("llama"), config_of("joint"), exclude=("*.nothing",))


@pytest.fixture
def config_only(tmp_path):
    """A folder with a config.json and nothing else."""
    model_of("llama", torch.bfloat16).config.save_pretrained(tmp_path / "model")
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["config.json"]
    return tmp_path / "model"


def test_dry_run_needs_a_configuration_only(config_only, tmp_path, capsys):
    flags = ["learn", "--model", config_only, "--preset", "joint", "--sparsity", "0.45", "--dry-run"]
    status, out, err = run(capsys, *flags)
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == (
        f"memory to learn {config_only}: preset joint, bfloat16 weights, 1 x 512 tokens, gradient checkpointing off"
    )
    expected = learning_memory(
        transformers.AutoConfig.from_pretrained(config_only),
        LearnConfig.from_preset("joint", 0.45),
        seqlen=512,
        dtype=torch.bfloat16,
    )
    assert "\n".join(lines[1:]) == expected.text()
    assert sum(line.strip().startswith(("24 GB", "80 GB", "141 GB")) for line in lines) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_dry_run_reads_and_writes_nothing_else(config_only, tmp_path, capsys):
    flags = ["--data", tmp_path / "absent.txt", "--out", tmp_path / "out", "--prior", tmp_path / "absent"]
    more = ["--preset", "tile", "--sparsity", "0.45", "--seqlen", "64", "--dtype", "fp32", "--exclude", "*.k_proj"]
    status, out, _ = run(
        capsys, "learn", "--model", config_only, *flags, *more, "--set", "learn.grad_checkpoint=true", "--dry-run"
    )
    assert status == 0
    assert "preset tile, float32 weights, 1 x 64 tokens, gradient checkpointing on" in out
    assert "12 masked layers" in out
    assert "note: host memory holds the prior masks" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--preset", "both"], "preset: expected one of joint, tile, maskllm, got 'both'"),
        (["--preset", "tile"], "--sparsity: expected a target with preset tile, got none"),
        (
            ["--preset", "maskllm", "--dtype", "int8"],
            "dtype: expected one of auto, float32, bfloat16, float16, bf16, fp16, fp32, got 'int8'",
        ),
        (["--preset", "maskllm", "--dtype", "fp16"], "expected float32, bfloat16 or float64 weights"),
        (["--preset", "maskllm", "--seqlen", "1"], "expected samples of 2 or more tokens, got 1"),
        (["--preset", "maskllm", "--model", "./absent"], "--model: expected a model folder, found none"),
    ],
)
def test_dry_run_refuses_what_learning_refuses(config_only, capsys, flags, message):
    status, out, err = run(capsys, "learn", "--model", config_only, "--dry-run", *flags)
    assert (status, out) == (2, "")
    assert message in err


def test_dry_run_needs_a_dtype_and_a_dense_model(config_only, capsys):
    flags = ["learn", "--model", config_only, "--preset", "maskllm", "--dry-run"]
    config = transformers.AutoConfig.from_pretrained(config_only)
    config.dtype = None
    config.save_pretrained(config_only)
    status, _, err = run(capsys, *flags)
    assert status == 2
    assert f"--dtype: expected a dtype in the config.json of {config_only}, got none. Give it, for example" in err
    assert run(capsys, *flags, "--dtype", "bf16")[0] == 0
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    config.save_pretrained(config_only)
    status, _, err = run(capsys, *flags)
    assert status == 2
    assert f"--model: expected a dense model, '{config_only}' has a quantization_config in its config.json" in err


def test_dry_run_refuses_float64_with_less_precision(tmp_path, capsys):
    model_of("llama", torch.float64).config.save_pretrained(tmp_path)
    flags = ["learn", "--model", tmp_path, "--preset", "maskllm", "--set", "learn.moments=bfloat16", "--dry-run"]
    status, out, err = run(capsys, *flags)
    assert (status, out) == (2, "")
    assert "moments: expected float32 for the float64 weights of model.layers.0.self_attn.q_proj, got bfloat16" in err


def test_learning_still_needs_text_and_folder(config_only, capsys):
    status, _, err = run(capsys, "learn", "--model", config_only, "--sparsity", "0.45")
    assert status == 2
    assert "expected --data, --out, got nothing. Give it as a flag" in err
