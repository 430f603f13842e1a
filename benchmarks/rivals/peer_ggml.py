"""llama.cpp's matrix product as a function of tensors: ggml through the libraries that llama-cpp-python brings.

Optional: pip install -e ".[bench]". The package itself is not imported.
"""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path

import torch

TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}  # enum ggml_type
ALIGNMENT = 64  # ggml ends the process over less


class InitParams(ctypes.Structure):
    """struct ggml_init_params"""

    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


# {name: (result, arguments)} of what is called here.
_POINTER, _SIZE, _INT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
BASE_FUNCTIONS = {
    "ggml_init": (_POINTER, [InitParams]),
    "ggml_free": (None, [_POINTER]),
    "ggml_tensor_overhead": (_SIZE, []),
    "ggml_graph_overhead": (_SIZE, []),
    "ggml_new_tensor_2d": (_POINTER, [_POINTER, _INT, ctypes.c_int64, ctypes.c_int64]),
    "ggml_mul_mat": (_POINTER, [_POINTER, _POINTER, _POINTER]),
    "ggml_new_graph": (_POINTER, [_POINTER]),
    "ggml_build_forward_expand": (None, [_POINTER, _POINTER]),
    "ggml_backend_cpu_buffer_from_ptr": (_POINTER, [_POINTER, _SIZE]),
    "ggml_backend_buffer_free": (None, [_POINTER]),
    "ggml_backend_tensor_alloc": (_INT, [_POINTER, _POINTER, _POINTER]),
    "ggml_backend_graph_compute": (_INT, [_POINTER, _POINTER]),
}
CPU_FUNCTIONS = {
    "ggml_backend_cpu_init": (_POINTER, []),
    "ggml_backend_cpu_set_n_threads": (None, [_POINTER, _INT]),
}


class Ggml:
    """ggml's CPU backend with torch's number of threads, from the folder of its libraries.

    torch 2.13 has loaded its libgomp.so.1 already, and the loader gives the same one to ggml: one pool of threads, of
    which none spins while the other library works.
    raises  OSError or AttributeError for libraries that are missing or lack a function.
    """

    def __init__(self, folder: Path):
        self.base = _load(folder / "libggml-base.so", BASE_FUNCTIONS)
        self.cpu = _load(folder / "libggml-cpu.so", CPU_FUNCTIONS)
        self.backend = self.cpu.ggml_backend_cpu_init()
        self.cpu.ggml_backend_cpu_set_n_threads(self.backend, torch.get_num_threads())


def load() -> Ggml:
    """ggml of the installed llama-cpp-python; raises RuntimeError where there is none that can be used."""
    package = importlib.util.find_spec("llama_cpp")
    if package is None or not package.submodule_search_locations:
        raise RuntimeError("needs the package llama-cpp-python, found none; pip install llama-cpp-python.")
    folder = Path(package.submodule_search_locations[0]) / "lib"
    try:
        return Ggml(folder)
    except (OSError, AttributeError) as error:
        raise RuntimeError(
            f"needs ggml as llama-cpp-python 0.3.36 builds it, in {folder} got: {error}; reinstall llama-cpp-python."
        ) from error


class MatMul:
    """x @ weight.T as llama.cpp does it: weight (N, K) bf16, fp16 or fp32, x (M, K) fp32; a call gives y (M, N) fp32.

    The graph is built once and a call computes it. All calls write the same y, which is not allocated in a call:
    llama.cpp does so too. raises  ValueError for tensors that ggml cannot take as they are.
    """

    def __init__(self, ggml: Ggml, weight: torch.Tensor, x: torch.Tensor):
        self._context, self._buffers = None, []
        for tensor in (weight, x):
            if not tensor.is_contiguous() or tensor.data_ptr() % ALIGNMENT:
                raise ValueError(
                    f"llama.cpp: expected contiguous tensors from a multiple of {ALIGNMENT} bytes on, got strides "
                    f"{tuple(tensor.stride())} at {tensor.data_ptr():#x}. Use clone(memory_format=contiguous_format)."
                )
        if x.dtype != torch.float32:
            raise ValueError(f"llama.cpp: expected x in float32, got {x.dtype}. Use x.float().")
        self._ggml = ggml
        self._tensors = (weight, x, torch.empty(x.shape[0], weight.shape[0]))  # the graph holds addresses alone
        base = ggml.base
        size = 3 * base.ggml_tensor_overhead() + base.ggml_graph_overhead()
        self._context = base.ggml_init(InitParams(size, None, True))
        places = [base.ggml_new_tensor_2d(self._context, TYPES[t.dtype], *reversed(t.shape)) for t in (weight, x)]
        places.append(base.ggml_mul_mat(self._context, *places))
        for place, tensor in zip(places, self._tensors, strict=True):
            address = tensor.data_ptr()
            self._buffers.append(base.ggml_backend_cpu_buffer_from_ptr(address, tensor.nbytes))
            _check("ggml_backend_tensor_alloc", base.ggml_backend_tensor_alloc(self._buffers[-1], place, address))
        self._graph = base.ggml_new_graph(self._context)
        base.ggml_build_forward_expand(self._graph, places[-1])

    def __call__(self) -> torch.Tensor:
        status = self._ggml.base.ggml_backend_graph_compute(self._ggml.backend, self._graph)
        _check("ggml_backend_graph_compute", status)
        return self._tensors[-1]

    def __del__(self):
        for buffer in self._buffers:
            self._ggml.base.ggml_backend_buffer_free(buffer)
        if self._context:
            self._ggml.base.ggml_free(self._context)


def _load(path: Path, functions: dict) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    for name, (result, arguments) in functions.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def _check(name: str, status: int) -> None:
    if status:
        raise RuntimeError(f"{name} returned status {status}.")
