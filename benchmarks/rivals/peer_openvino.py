"""OpenVINO in bf16 as a rival of benchmarks.studies.generate. Optional: pip install openvino.

transformers' model is traced with keys and values as inputs and outputs, which then become the state of the OpenVINO
model (optimum-intel 2.2, which does the same, needs transformers before 5.6). Precision is bf16 everywhere, also that
of keys and values, for which the CPU plugin would take 8 bits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

NEEDS = "openvino"
MODEL_FILE = "openvino_model.xml"


def prepare(dense: str, out: str, threads: int) -> dict[str, Any]:
    """Convert a folder of transformers to out/openvino_model.xml and .bin."""
    import openvino  # a missing one is reported before the model is loaded
    import torch
    from openvino._offline_transformations import apply_make_stateful_transformation

    from benchmarks.studies.generate_torch import Engine as TorchEngine

    torch.set_num_threads(threads)
    engine = TorchEngine(dense, threads, packed=False)
    _make_blocks_differ(engine.model)
    config = engine.model.config
    layers = config.num_hidden_layers
    past = torch.zeros(1, config.num_key_value_heads, 2, config.hidden_size // config.num_attention_heads)
    example = [torch.ones(1, 3, dtype=torch.long), torch.arange(2, 5)[None], torch.zeros(1, dtype=torch.int32)]
    states = [f"{kind}.{layer}" for layer in range(layers) for kind in ("key", "value")]
    traced = _traced(engine)
    with torch.no_grad():
        model = openvino.convert_model(traced, example_input=(*example, *[past.bfloat16() for _ in states]))
    inputs = ["input_ids", "position_ids", "beam_idx", *[f"past.{state}" for state in states]]
    for port, name in zip(model.inputs, inputs, strict=True):
        port.get_tensor().set_names({name})
    for port, name in zip(model.outputs, ["logits", *[f"new.{state}" for state in states]], strict=True):
        port.get_tensor().set_names({name})
    shape = openvino.PartialShape([-1, past.shape[1], -1, past.shape[3]])
    model.reshape({port: shape if "past." in port.any_name else _free(port) for port in model.inputs})
    apply_make_stateful_transformation(model, {f"past.{state}": f"new.{state}" for state in states})
    _start_empty(model)
    Path(out).mkdir(parents=True, exist_ok=True)
    openvino.save_model(model, Path(out) / MODEL_FILE, compress_to_fp16=False)
    return {}


def _make_blocks_differ(model: Any) -> None:
    """One weight of each matrix: equal constants, which the blocks of the study's models are, would be stored once."""
    for index, block in enumerate(model.model.layers):
        for parameter in block.parameters():
            if parameter.ndim == 2:
                parameter.data[0, 0] = index / 1024


def _free(port: Any) -> Any:
    import openvino

    return openvino.PartialShape([-1] * port.get_partial_shape().rank.get_length())


def _traced(engine: Any) -> Any:
    """Module (ids, positions, beam_idx, keys and values...) -> (logits of the last token, keys and values...)."""
    import torch

    class Pairs:
        """What a decoder layer asks of a cache."""

        def __init__(self, tensors: tuple[torch.Tensor, ...], order: torch.Tensor) -> None:
            self.tensors, self.order = list(tensors), order

        def update(self, key: torch.Tensor, value: torch.Tensor, layer: int, *_: Any, **__: Any) -> tuple:
            for index, new in ((2 * layer, key), (2 * layer + 1, value)):
                # The plugin fuses attention with the state only where the state goes through this Gather.
                old = self.tensors[index].index_select(0, self.order)
                self.tensors[index] = torch.cat([old, new], dim=2)
            return self.tensors[2 * layer], self.tensors[2 * layer + 1]

    class Traced(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = engine.model

        def forward(self, ids: torch.Tensor, positions: torch.Tensor, order: torch.Tensor, *past: torch.Tensor) -> Any:
            columns = torch.arange(past[0].shape[2] + ids.shape[1])
            is_later = columns[None, None, None] > positions[:, None, :, None]
            mask = torch.where(is_later, torch.finfo(torch.bfloat16).min, 0.0).bfloat16()
            cache = Pairs(past, order)
            output = self.model(
                input_ids=ids,
                position_ids=positions,
                attention_mask=mask,
                use_cache=True,
                logits_to_keep=1,
                return_dict=True,
                **{engine.cache_argument: cache},
            )
            return (output.logits.float(), *cache.tensors)  # numpy has no bf16

    return Traced().eval()


def _start_empty(model: Any) -> None:
    """Give every state its first value: no tokens for each sequence of the batch that is asked for."""
    from openvino import opset13

    sizes = opset13.shape_of(model.input("input_ids"), output_type="i64")
    batch = opset13.gather(sizes, opset13.constant([0], dtype=np.int64), opset13.constant(0, dtype=np.int64))
    for node in model.get_ops():
        if node.get_type_name() == "ReadValue":
            _, heads, _, width = node.get_output_partial_shape(0)
            rest = [opset13.constant([size], dtype=np.int64) for size in (heads.get_length(), 0, width.get_length())]
            zero = opset13.constant(0, dtype=node.get_output_element_type(0))
            node.set_arguments([opset13.broadcast(zero, opset13.concat([batch, *rest], axis=0))])
    model.validate_nodes_and_infer_types()


class Engine:
    """OpenVINO's request on the stateful model."""

    def __init__(self, folder: str, threads: int) -> None:
        import openvino

        self.version = openvino.__version__
        settings = {
            "INFERENCE_PRECISION_HINT": "bf16",
            "KV_CACHE_PRECISION": "bf16",
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
        }
        self.file = Path(folder) / MODEL_FILE
        compiled = openvino.Core().compile_model(self.file, "CPU", settings)
        self.request = compiled.create_infer_request()
        self.vocab_size = compiled.output("logits").get_partial_shape()[2].get_length()

    def start(self, prompts: list[list[int]], length: int, mode: str) -> list[int]:
        self.request.reset_state()
        self.position = 0
        return self._infer(prompts)

    def step(self, tokens: list[int]) -> list[int]:
        return self._infer([[token] for token in tokens])

    def _infer(self, rows: list[list[int]]) -> list[int]:
        ids = np.array(rows, dtype=np.int64)
        positions = np.broadcast_to(np.arange(self.position, self.position + ids.shape[1], dtype=np.int64), ids.shape)
        inputs = {
            "input_ids": ids,
            "position_ids": np.ascontiguousarray(positions),
            "beam_idx": np.arange(len(rows), dtype=np.int32),
        }
        self.position += ids.shape[1]
        self.last = self.request.infer(inputs)["logits"][:, -1]
        return self.last.argmax(-1).tolist()

    def logits(self, stride: int) -> list[float]:
        return self.last[0, ::stride].astype(np.float32).tolist()

    def facts(self) -> dict[str, Any]:
        size = self.file.with_suffix(".bin").stat().st_size
        return {"weights_bytes": size, "version": f"openvino {self.version.split('-')[0]}"}
