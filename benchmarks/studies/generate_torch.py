"""Dense and packed models of benchmarks.studies.generate, as transformers runs them: folders on disk and the engine."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedConfig, PreTrainedModel, StaticCache

import patch
from benchmarks.ops.bench_tile_linear import random_keep
from benchmarks.studies import generate_worker
from patch.models.keep_masks import apply_keep_masks, keep_masks
from patch.models.structure import decoder_blocks, maskable_linears
from patch.packed import pack_model, save_packed
from patch.packed.quantizer import mark_packed
from patch.packed.swap import packed_layers

NEEDS = "torch and transformers"
# All weights are cut from one pool, as drawing a billion values takes a minute and speed does not depend on them. Its
# length is odd, so that rows differ.
POOL = (1 << 24) + 43
CHECKED_TOKENS = 4


def variant_folder(out: Path, sparsity: float) -> Path:
    return out / ("dense" if sparsity == 0 else f"packed-{sparsity:g}")


def prepare(config: str, out: str, sparsities: list[float], prompt: int, threads: int) -> dict[str, Any]:
    """Write the random dense model, and packed ones with these shares of zeros, below out.

    config   folder with config.json
    prompt   tokens of the text that every variant has to continue
    returns  {sparsity: {"tokens": text, "logits": ..., "choices": ...}} of the dense model with the same zeros
    """
    torch.set_num_threads(threads)
    model = random_model(AutoConfig.from_pretrained(config))
    model.save_pretrained(variant_folder(Path(out), 0.0))
    del model
    wanted = {}
    for sparsity in [0.0, *sparsities]:
        dense = load_dense(variant_folder(Path(out), 0.0))
        if sparsity > 0:
            apply_keep_masks(dense, random_masks(dense, sparsity))
        wanted[f"{sparsity:g}"] = expected(Engine.of(dense), prompt)
        if sparsity > 0:
            save_packed(pack_equal_blocks(dense), None, variant_folder(Path(out), sparsity))
    return {"wanted": wanted}


def random_model(config: PreTrainedConfig) -> PreTrainedModel:
    """bf16 model of normal weights of deviation 0.02, norms of ones, the same in every decoder block."""
    pool = 0.02 * torch.randn(POOL, generator=torch.Generator().manual_seed(0))
    pool = pool.bfloat16()
    with torch.device("meta"):
        shell = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    tensors: dict[str, Tensor] = {}
    start = 0
    prefix = f"{decoder_blocks(shell)[0]}."
    for name, parameter in shell.named_parameters():  # a tied weight once
        block, _, rest = name.removeprefix(prefix).partition(".")
        if name.startswith(prefix) and block != "0":
            tensors[name] = tensors[f"{prefix}0.{rest}"].clone()
            continue
        if name.endswith("norm.weight"):
            tensors[name] = torch.ones(parameter.shape, dtype=torch.bfloat16)
            continue
        count = parameter.numel()
        repeats = (start + count) // POOL + 1
        tensors[name] = pool.repeat(repeats)[start : start + count].clone().reshape(parameter.shape)
        start = (start + count) % POOL
    return type(shell).from_pretrained(None, config=config, state_dict=tensors, dtype=torch.bfloat16)


def load_dense(folder: Path | str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def random_masks(model: nn.Module, sparsity: float) -> dict[str, Tensor]:
    """Random masks of the decoder's linears, one for all layers of a shape."""
    by_shape: dict[tuple[int, int], Tensor] = {}
    masks = {}
    for name, linear in maskable_linears(model).items():
        shape = (linear.out_features, linear.in_features)
        if shape not in by_shape:
            by_shape[shape] = random_keep(shape, sparsity)[0]
        masks[name] = by_shape[shape]
    return masks


def pack_equal_blocks(model: PreTrainedModel) -> PreTrainedModel:
    """pack_model of a model with equal decoder blocks: one is packed, which takes seconds, the others are copies."""
    name, blocks = decoder_blocks(model)
    masks = keep_masks(model)
    pack_model(model, {path: mask for path, mask in masks.items() if path.startswith(f"{name}.0.")})
    for path, layer in list(packed_layers(model)):
        rest = path.removeprefix(f"{name}.0.")
        for block in blocks[1:]:
            block.set_submodule(rest, copy.deepcopy(layer))
    mark_packed(model)
    return model


def expected(engine: Engine, prompt: int) -> dict[str, Any]:
    """A text that the engine continues greedily, and what it makes of it."""
    server = generate_worker.Server(__name__, 1)
    server.engine = engine
    tokens = generate_worker.random_prompts(1, prompt, engine.vocab_size)[0]
    chosen = engine.start([tokens], prompt + CHECKED_TOKENS, "eager")
    for _ in range(CHECKED_TOKENS):
        tokens = tokens + chosen
        chosen = engine.step(chosen)
    return {"tokens": tokens} | server.follow(tokens, prompt, prompt + CHECKED_TOKENS, "eager")


def weight_facts(model: PreTrainedModel) -> dict[str, int]:
    """Bytes of all parameters and buffers, of the decoder's linears (weights, tile flags, biases), and of the head."""
    linears = [layer for _, layer in packed_layers(model)] or list(maskable_linears(model).values())
    head = model.get_output_embeddings()
    parts = {"weights": [model], "linears": linears, "head": [head]}
    return {f"{name}_bytes": _distinct_bytes(modules) for name, modules in parts.items()}


def _distinct_bytes(modules: list[Any]) -> int:
    tensors = {id(t): t for module in modules for t in (*module.parameters(), *module.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())


class Engine:
    """A transformers model with its cache: DynamicCache and plain calls, or StaticCache and torch.compile.

    The prompt is run eagerly in both modes, as transformers' generate does; compiled is the step of one token.
    """

    def __init__(self, folder: str, threads: int, packed: bool) -> None:
        torch.set_num_threads(threads)
        self._init(patch.load(folder) if packed else load_dense(folder))

    @classmethod
    def of(cls, model: PreTrainedModel) -> Engine:
        engine = cls.__new__(cls)
        engine._init(model)
        return engine

    def _init(self, model: PreTrainedModel) -> None:
        self.model = model.eval()
        self.vocab_size = model.config.vocab_size
        # Calls transformers' argument by the name that this version has.
        named = inspect.signature(type(model).forward).parameters
        self.cache_argument = "cache" if "cache" in named else "past_key_values"
        self.static: dict[tuple[int, int], StaticCache] = {}
        self.compiled: Any = None

    @torch.inference_mode()
    def start(self, prompts: list[list[int]], length: int, mode: str) -> list[int]:
        self.run = self.model
        if mode == "eager":
            self.cache: Any = DynamicCache(config=self.model.config)
        else:
            if self.compiled is None:
                self.compiled = torch.compile(self.model, fullgraph=True, dynamic=False)
            key = (len(prompts), length)
            if key not in self.static:
                self.static[key] = StaticCache(config=self.model.config, max_cache_len=length)
            self.cache = self.static[key]
            self.cache.reset()
        self.position = 0
        result = self._call(prompts)
        if mode != "eager":
            self.run = self.compiled
        return result

    @torch.inference_mode()
    def step(self, tokens: list[int]) -> list[int]:
        return self._call([[token] for token in tokens])

    def _call(self, rows: list[list[int]]) -> list[int]:
        ids = torch.tensor(rows)
        positions = torch.arange(self.position, self.position + ids.shape[1])[None]
        self.position += ids.shape[1]
        arguments = {self.cache_argument: self.cache}
        output = self.run(input_ids=ids, position_ids=positions, use_cache=True, logits_to_keep=1, **arguments)
        self.last = output.logits[:, -1]
        return self.last.argmax(-1).tolist()

    def logits(self, stride: int) -> list[float]:
        return self.last[0, ::stride].float().tolist()

    def facts(self) -> dict[str, Any]:
        return weight_facts(self.model) | {"version": f"transformers {transformers.__version__}"}
