"""llama.cpp in bf16 as a rival of benchmarks.studies.generate. Optional: pip install gguf llama-cpp-python.

The weights are those of the dense folder, written as GGUF. Models without a tokenizer are driven by token ids, which
only the C functions of llama-cpp-python take for several sequences at once.
"""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

NEEDS = "gguf, llama-cpp-python and safetensors"
ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2"}  # model_type of config.json: name in GGUF
# Tensor of a decoder layer in transformers: in GGUF.
LAYER_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OTHER_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
MODEL_FILE = "model.gguf"


def prepare(dense: str, out: str, threads: int) -> dict[str, Any]:
    """Write out/model.gguf from a folder of transformers, bf16 matrices and fp32 vectors."""
    import gguf
    import llama_cpp  # noqa: F401  a missing one is reported before gigabytes are written

    config = json.loads((Path(dense) / "config.json").read_text())
    if config["model_type"] not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"{dense}: expected model_type {known}, got {config['model_type']}. Run with --no-peers.")
    Path(out).mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(Path(out) / MODEL_FILE, ARCHITECTURES[config["model_type"]])
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    for name, tensor in dense_tensors(Path(dense)):
        if config["model_type"] == "llama" and ".q_proj." in name:
            tensor = interleaved_halves(tensor, heads)
        if config["model_type"] == "llama" and ".k_proj." in name:
            tensor = interleaved_halves(tensor, kv_heads)
        if tensor.ndim == 1:
            writer.add_tensor(gguf_name(name), (tensor.astype(np.uint32) << 16).view(np.float32))
        else:
            bf16 = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(gguf_name(name), tensor.view(np.uint8), raw_dtype=bf16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {}


def dense_tensors(folder: Path):
    """(name, bits of bf16 as uint16) of every tensor of a folder."""
    import torch  # numpy has no bf16

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():
                yield name, opened.get_tensor(name).contiguous().view(torch.uint16).numpy()


def gguf_name(name: str) -> str:
    """GGUF's name of a tensor of Llama or Qwen2."""
    owner, kind = name.rsplit(".", 1)
    if owner in OTHER_NAMES:
        return f"{OTHER_NAMES[owner]}.{kind}"
    _, _, number, layer = owner.split(".", 3)
    return f"blk.{number}.{LAYER_NAMES[layer]}.{kind}"


def interleaved_halves(tensor: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k in the order of GGUF's Llama, whose rotary embedding turns neighbours, not halves of a head."""
    return np.ascontiguousarray(tensor.reshape(heads, 2, -1, *tensor.shape[1:]).swapaxes(1, 2)).reshape(tensor.shape)


class Engine:
    """llama.cpp's context on a GGUF file. Its weights are read, not mapped, so that they count as its memory."""

    def __init__(self, folder: str, threads: int) -> None:
        import llama_cpp

        self.api, self.threads = llama_cpp, threads
        self.log = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self.log, None)
        settings = llama_cpp.llama_model_default_params()
        settings.n_gpu_layers = 0
        settings.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
        self.file = Path(folder) / MODEL_FILE
        self.model = llama_cpp.llama_model_load_from_file(str(self.file).encode(), settings)
        if not self.model:
            raise RuntimeError(f"{self.file}: llama.cpp did not load it.")
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.context = None

    def start(self, prompts: list[list[int]], length: int, mode: str) -> list[int]:
        api = self.api
        if self.context is not None:
            api.llama_free(self.context)
        settings = api.llama_context_default_params()
        settings.n_seq_max = len(prompts)
        settings.n_ctx = len(prompts) * max(length, 32)
        settings.n_batch = settings.n_ubatch = max(len(prompts) * len(prompts[0]), 32)
        settings.n_outputs_max = len(prompts)
        settings.n_threads = settings.n_threads_batch = self.threads
        self.context = api.llama_init_from_model(self.model, settings)
        if not self.context:
            raise RuntimeError("llama.cpp: no context. Run fewer or shorter sequences.")
        self.position = 0
        return self._decode(prompts)

    def step(self, tokens: list[int]) -> list[int]:
        return self._decode([[token] for token in tokens])

    def _decode(self, rows: list[list[int]]) -> list[int]:
        api, width = self.api, len(rows[0])
        batch = api.llama_batch_init(len(rows) * width, 0, 1)
        batch.n_tokens = len(rows) * width
        for index in range(batch.n_tokens):
            row, column = divmod(index, width)
            batch.token[index] = rows[row][column]
            batch.pos[index] = self.position + column
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = row
            batch.logits[index] = column == width - 1
        status = api.llama_decode(self.context, batch)
        api.llama_batch_free(batch)
        if status:
            raise RuntimeError(f"llama.cpp: llama_decode returned {status}.")
        self.position += width
        self.last = [self._logits(row * width + width - 1) for row in range(len(rows))]
        return [int(logits.argmax()) for logits in self.last]

    def _logits(self, index: int) -> np.ndarray:
        pointer = self.api.llama_get_logits_ith(self.context, index)
        return np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)), (self.vocab_size,))

    def logits(self, stride: int) -> list[float]:
        return self.last[0][::stride].tolist()

    def facts(self) -> dict[str, Any]:
        return {"weights_bytes": self.file.stat().st_size, "version": f"llama_cpp {self.api.__version__}"}
