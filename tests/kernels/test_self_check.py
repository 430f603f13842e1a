"""The library binds to this torch, reports itself, and its self-check notices a wrong op."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from patch_kernels import _library, masked_weight, self_check
from patch_kernels.ops import LIBRARY_PATH


def test_report_is_json_and_every_op_works_here():
    report = json.loads(json.dumps(self_check.report()))
    assert report["build"]["torch_target"] == "2.11"
    rows = [row for row in report["checks"] if row["device"] == "cpu"]
    assert len(rows) == len(self_check.CHECKS) and all(row["ok"] for row in rows)


def test_self_check_notices_a_wrong_result(monkeypatch):
    monkeypatch.setattr(
        self_check.masked_weight, "masked_weight", lambda w, p, t, **k: (w + 0 * p.sum() + 0 * t.sum(), w.sum())
    )
    monkeypatch.setattr(self_check.TiledWeight, "unpack", lambda self: torch.zeros(self.shape))
    monkeypatch.setattr(self_check.adamw, "adamw_step", lambda *a, **k: None)
    rows = {row["op"]: row for row in self_check.check_device(torch.device("cpu"))}
    assert not rows["pack_tiles, unpack_tiles"]["ok"] and not rows["masked_weight"]["ok"]
    assert rows["tile_linear"]["ok"]
    assert "Rebuild" in rows["masked_weight"]["advice"]
    assert rows["adamw_step"]["error"] == "with torch.float32 moments the bits are not those of the reference"


def test_cuda_stream_symbol_is_bound_exactly_on_a_cuda_torch():
    assert torch.ops.patch_kernels.has_cuda_shim() == (torch.version.cuda is not None)


def test_gemm_status_without_a_gpu():
    status = _library.gemm_status(LIBRARY_PATH, 100)
    assert status["state"] == "disabled"
    has_cuda = _library.build_info(LIBRARY_PATH)["cuda_architectures"] != "none"
    expected = "device number 100 is outside 0..63" if has_cuda else "this build has no CUDA kernels"
    assert expected in status["reason"]


def test_missing_library(monkeypatch, tmp_path):
    monkeypatch.setenv("PATCH_KERNELS_LIBRARY", str(tmp_path / "none.so"))
    with pytest.raises(ImportError, match=r"expected the compiled ops at .*none\.so, got no such file\. Build them"):
        _library.load_library()


def test_library_that_does_not_load(monkeypatch, tmp_path):
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setenv("PATCH_KERNELS_LIBRARY", str(broken))
    with pytest.raises(ImportError, match=r"broken\.so does not load into torch .* rebuild it here"):
        _library.load_library()


def test_library_of_another_version(monkeypatch):
    monkeypatch.setattr(_library, "_INTERFACE", "0")
    with pytest.raises(ImportError, match=r"expected compiled ops with interface 0, got 3 at .*Rebuild them: pip"):
        _library.load_library()


def test_a_switch_that_says_nothing(monkeypatch):
    monkeypatch.setenv("PATCH_KERNELS_SPARSE_GEMM", "off")
    with pytest.raises(ImportError, match="expected PATCH_KERNELS_SPARSE_GEMM to be one of 0, 1 on this machine, got"):
        _library.load_library()


def test_torch_too_old(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.10.1")
    with pytest.raises(ImportError, match=r"expected torch 2\.11 or newer, got 2\.10\.1"):
        _library.load_library()


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_every_instruction_set_gives_the_same_mask_and_exact_products(isa, tmp_path):
    """Each in a process of its own; masked weights must be equal bit for bit."""
    script = (
        "import sys, torch; from patch_kernels import masked_weight, self_check; torch.manual_seed(0);"
        "w, l, t = torch.randn(130, 260), torch.randn(130 * 65, 6), torch.randn(3, 3);"
        "m, s = masked_weight(w, l, t, tile=(64, 128), noise=(1, 2, 3));"
        "ok = all(r['ok'] for r in self_check.check_device(torch.device('cpu')));"
        "torch.set_printoptions(precision=10);"
        "import hashlib; print(hashlib.sha256(m.numpy().tobytes()).hexdigest(), ok)"
    )
    environment = dict(os.environ, PATCH_KERNELS_CPU_ISA=isa)
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    torch.manual_seed(0)
    weight, logits, tiles = torch.randn(130, 260), torch.randn(130 * 65, 6), torch.randn(3, 3)
    masked, _ = masked_weight(weight, logits, tiles, tile=(64, 128), noise=(1, 2, 3))
    import hashlib

    assert run.stdout.split() == [hashlib.sha256(masked.numpy().tobytes()).hexdigest(), "True"]
