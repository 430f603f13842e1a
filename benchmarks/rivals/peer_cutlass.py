"""The GEMM of cutlass_sparse_gemm.cu as a function of tensors. Optional: python -m benchmarks.card.build --peer."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch


class CutlassSparse:
    """y = x @ weight.T for a weight (N, K) that is 2:4 everywhere, bf16, compressed once by CUTLASS."""

    def __init__(self, library: ctypes.CDLL, weight: torch.Tensor):
        self._library = library
        self.rows, self.cols = weight.shape
        sizes = [ctypes.c_int64(), ctypes.c_int64()]
        library.peer_sizes(self.rows, self.cols, *map(ctypes.byref, sizes))
        self.values, self.metadata = (torch.zeros(s.value, dtype=torch.uint8, device=weight.device) for s in sizes)
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (weight, self.values, self.metadata)]
        _check("peer_compress", library.peer_compress(*pointers, self.rows, self.cols, _stream()))

    def clone(self) -> CutlassSparse:
        """The same weight at another address."""
        twin = object.__new__(CutlassSparse)
        twin.__dict__ = self.__dict__ | {"values": self.values.clone(), "metadata": self.metadata.clone()}
        return twin

    @property
    def nbytes(self) -> int:
        return self.values.numel() + self.metadata.numel()

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.shape[0]
        y = x.new_empty(tokens, self.rows)
        workspace_bytes = self._library.peer_workspace_bytes(self.rows, self.cols, tokens)
        workspace = torch.empty(max(workspace_bytes, 16), dtype=torch.uint8, device=x.device)
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (self.values, self.metadata, x, y)]
        place = ctypes.c_void_p(workspace.data_ptr())
        _check("peer_run", self._library.peer_run(*pointers, self.rows, self.cols, tokens, place, _stream()))
        return y


def load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path.resolve()))
    library.peer_workspace_bytes.restype = ctypes.c_int64
    return library


def _stream() -> ctypes.c_void_p:
    return ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)


def _check(name: str, status: int) -> None:
    if status:
        raise RuntimeError(f"{name}: CUTLASS returned status {status}. Leave out --peer to run without this rival.")
