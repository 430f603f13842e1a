"""The ops: typed wrappers with checks, fake kernels and autograd. Importing them loads the compiled library.

One module an op, by the name it has in csrc, in tests and in benchmarks. They are a package of their own because a
module patch_kernels.tile_linear and the function of that name could not both be reached.
"""

from __future__ import annotations

import torch

from patch_kernels import by_torch
from patch_kernels._library import driver_complaint, load_library

LIBRARY_PATH = load_library()
if torch.version.cuda is not None and driver_complaint(LIBRARY_PATH):
    BY_TORCH = by_torch.serve("CUDA")
