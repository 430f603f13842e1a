"""What nvcc made of the kernels, read from the library that is built: spills, registers, tensor-core instructions.

No GPU and no compiler needed, only NVIDIA's disassembler (PyPI: nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm). It
catches what no result shows: spilled registers, serialised wgmma, a lost multicast.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from patch_kernels._library import build_info, library_path

LIBRARY = library_path()
# "80-real 90a-real": cubins; "120": cubin and PTX; "120-virtual": PTX only, which has no SASS to read.
ARCHITECTURES = [
    "sm_" + name.removesuffix("-real")
    for name in build_info(LIBRARY)["cuda_architectures"].split()
    if name != "none" and not name.endswith("-virtual")
]

DTYPES = ("6__half", "13__nv_bfloat16")
# Hopper: tokens of a CTA, and those of a chunk of sums that a split exchanges (0: the kernel does not split).
DECODE = {(8, 8), (16, 8), (32, 8)}
PREFILL = {(64, 16), (128, 0), (128, 16), (160, 0), (176, 0), (192, 0)}
# (tokens of a CTA, depth): instructions of one step, dense and sparse branch. A warp has RowBlocks x TokenBlocks
# products of 16 rows x 8 tokens: four k16 each in a dense step, two k32 in a sparse one. LDSM: x in two
# k32 of either branch, w in four k16 of the dense and two k32 of the sparse.
SM80 = {
    (16, 2): {"HMMA": 8, "HMMA.SP": 4, "LDSM": 14},
    (16, 4): {"HMMA": 8, "HMMA.SP": 4, "LDSM": 14},
    (32, 2): {"HMMA": 16, "HMMA.SP": 8, "LDSM": 22},
    (32, 4): {"HMMA": 16, "HMMA.SP": 8, "LDSM": 22},
    (128, 1): {"HMMA": 64, "HMMA.SP": 32, "LDSM": 40},
    (128, 3): {"HMMA": 128, "HMMA.SP": 64, "LDSM": 56},
}
OTHER_KERNELS = {
    "unpack_kernel": 1,
    "tile_forward": 6,
    "tile_backward": 6,
    "any_forward": 4,
    "any_backward": 4,
    "reduce_kernel": 1,
    "add_splits_sm80": 2,
    "adamw_kernel": 6,
}


@dataclass
class Kernel:
    architecture: str
    symbol: str
    resources: dict[str, int] = field(default_factory=dict)
    instructions: list[str] = field(default_factory=list)  # without predicates

    def count(self, pattern: str) -> int:
        return sum(re.match(pattern, text) is not None for text in self.instructions)

    @property
    def name(self) -> str:
        # With its length, as mangled: the file's name is in the symbol too.
        return next(n for n in ("sm90_kernel", "tile_linear_sm80", *OTHER_KERNELS) if f"{len(n)}{n}" in self.symbol)

    @property
    def config(self) -> tuple[int, ...]:
        """Template arguments of the Config."""
        return tuple(int(n) for n in re.findall(r"L[ib](\d+)E", re.search(r"ConfigI((L[ib]\d+E)+)E", self.symbol)[1]))

    @property
    def dtype(self) -> str:
        return next(d for d in DTYPES if d in self.symbol)

    @property
    def threads_and_ctas(self) -> tuple[int, int]:
        """__launch_bounds__"""
        if self.name == "sm90_kernel":
            return (384, 1) if self.config[1] else (320, 2)
        if self.name == "tile_linear_sm80":
            bn, row_warps, token_warps, _ = self.config
            return 32 * row_warps * token_warps, 1 if bn >= 64 else 2
        return 256, {"tile_forward": 4, "tile_backward": 3}.get(self.name, 1)

    @property
    def logits(self) -> str:
        """What the patterns of a tile_forward or tile_backward come from."""
        if "FixedPattern" in self.symbol:
            return "fixed"
        return "float32" if re.search(r"(Half|BFloat16)EfE", self.symbol) else "bfloat16"

    def __str__(self) -> str:
        parts = [self.architecture, self.name]
        if self.name in ("sm90_kernel", "tile_linear_sm80"):
            parts += [str(self.config), self.dtype.lstrip("0123456789")]
        return " ".join(parts)


Kernels = dict[tuple[str, str], Kernel]
INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([^;]+?)\s*;")


def parse(lines: Iterable[str], kernels: Kernels) -> None:
    """Adds what `cuobjdump -res-usage` or `-sass` prints."""
    architecture, kernel = "", None
    for line in lines:
        if match := INSTRUCTION.match(line):
            kernel.instructions.append(match[1])
        elif line.startswith("arch = "):
            architecture = line.split()[2]
        elif match := re.match(r"\s*Function\s*:?\s*(\w+)", line):
            kernel = kernels.setdefault((architecture, match[1]), Kernel(architecture, match[1]))
        elif "REG:" in line:
            kernel.resources = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", line)}


def cuobjdump_path() -> str | None:
    installed = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/bin/cuobjdump"))
    return str(installed[-1]) if installed else shutil.which("cuobjdump")


@functools.cache  # half a minute: one disassembly for all tests
def library_kernels() -> Kernels:
    tool = cuobjdump_path()
    if tool is None:
        pytest.skip("no cuobjdump: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    environment = dict(os.environ, PATH=os.pathsep.join([str(Path(tool).parent), os.environ.get("PATH", "")]))
    kernels: Kernels = {}
    for option in ("-res-usage", "-sass"):
        command = [tool, option, str(LIBRARY)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            parse(process.stdout, kernels)
        assert process.returncode == 0, f"{' '.join(command)} failed with {process.returncode}"
    return kernels


@pytest.fixture(params=ARCHITECTURES or [None])
def kernels(request) -> list[Kernel]:
    """All kernels of an architecture."""
    if request.param is None:
        pytest.skip("this build has no CUDA code")
    return [k for (architecture, _), k in library_kernels().items() if architecture == request.param]


# Complaints, in words; none if the kernel is as it should be.


def memory_complaints(kernel: Kernel) -> list[str]:
    found = [f"{name} {kernel.resources[name]} bytes" for name in ("STACK", "LOCAL") if kernel.resources[name]]
    found += [f"{op} x{n}" for op in ("LDL", "STL") if (n := kernel.count(op + r"\b"))]
    return [f"{kernel}: spills: {what}" for what in found]


def register_complaints(kernel: Kernel) -> list[str]:
    """Registers are given to warps in units of 8 a thread, and to four warps of the four schedulers alike."""
    threads, ctas = kernel.threads_and_ctas
    registers = kernel.resources["REG"]
    warps = 65536 // (32 * -(-registers // 8) * 8) // 4 * 4
    if warps < threads // 32 * ctas:
        return [f"{kernel}: {registers} registers let {warps} warps on an SM, needs {threads // 32 * ctas}"]
    return []


def expect(kernel: Kernel, counts: dict[str, int]) -> list[str]:
    return [
        f"{kernel}: expected {n} x {pattern}, got {kernel.count(pattern)}"
        for pattern, n in counts.items()
        if kernel.count(pattern) != n
    ]


def sm80_complaints(kernel: Kernel) -> list[str]:
    bn, _, _, depth = kernel.config
    counts = SM80[bn, depth]
    suffix = r"\.F32\.BF16 " if "bfloat" in kernel.dtype else r"\.F32 "
    return expect(
        kernel,
        {
            r"HMMA\.16816" + suffix: counts["HMMA"],
            r"HMMA\.SP\.16832" + suffix + r".*, 0x0$": counts["HMMA.SP"] // 2,
            r"HMMA\.SP\.16832" + suffix + r".*, 0x1$": counts["HMMA.SP"] // 2,
            r"HMMA": counts["HMMA"] + counts["HMMA.SP"],
            r"LDSM\.16\.M88\.4 ": counts["LDSM"],
            r"LDSM": counts["LDSM"],
            r"H?GMMA|WARPGROUP": 0,
        },
    )


def metadata_complaints(kernel: Kernel) -> list[str]:
    """Writes to a metadata register that a wgmma.sp in flight may still read: the ISA does not say when it has.

    The source keeps two sets of them, but only ptxas decides on registers. Instructions are followed in their order in
    the code; loops are not.
    """
    found, groups, group = [], [], set()
    for text in kernel.instructions:
        if "HGMMA" in text:
            group |= {int(register) for register in re.findall(r", R(\d+), 0x[01]", text)}
            if "gsb0" in text:
                groups, group = [*groups, group], set()
        elif wait := re.search(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x([01])", text):
            groups = groups[-1:] if wait[1] == "1" else []
        elif written := re.match(r"([A-Z0-9_.]+) R(\d+)", text):
            width = 4 if ".128" in written[1] else 2 if ".64" in written[1] or ".WIDE" in written[1] else 1
            registers = set(range(int(written[2]), int(written[2]) + width))
            if registers & set().union(group, *groups):
                found.append(f"{kernel}: metadata in flight is overwritten by {text}")
    return found


def descriptor_complaints(kernel: Kernel) -> list[str]:
    """Descriptors of a group of wgmma stay in uniform registers: R2UR in between would issue with every instruction."""
    found, moves = [], None
    for text in kernel.instructions:
        if text.startswith("WARPGROUP.ARRIVE"):
            moves = 0
        elif moves is not None and text.startswith("R2UR"):
            moves += 1
        elif moves is not None and "HGMMA" in text and "gsb0" in text:
            # The first descriptors may come from the waits before.
            if moves > 1:
                found.append(f"{kernel}: {moves} R2UR in a group of wgmma")
            moves = None
    return found


def sm90_complaints(kernel: Kernel) -> list[str]:
    bn, is_prefill, *_, exchange_tokens = kernel.config
    blocks = 2 if is_prefill else 1
    suffix = r"\.F32\.BF16 " if "bfloat" in kernel.dtype else r"\.F32 "
    sparse = rf"HGMMA\.SP\.64x{bn}x32" + suffix
    found = expect(
        kernel,
        {
            # A slot of a dense tile is four k16. A sparse tile is two halves x two selectors, and its code is there
            # twice, for the two sets of metadata registers.
            rf"HGMMA\.64x{bn}x16" + suffix: 4 * blocks,
            sparse + r".*, 0x0(, gsb0)?$": 4 * blocks,
            sparse + r".*, 0x1(, gsb0)?$": 4 * blocks,
            r"HGMMA": 12 * blocks,
            # One group a dense step, one a half of a sparse tile. Each waits for the group before; a change of type and
            # the end wait for all. If ptxas serialises (C7510), every instruction is a group with a wait for all.
            r"HGMMA.*gsb0$": 5,
            r"WARPGROUP\.ARRIVE": 5,
            r"WARPGROUP\.DEPBAR\.LE gsb0, 0x1$": 5,
            r"WARPGROUP\.DEPBAR\.LE gsb0, 0x0$": 2,
            r"WARPGROUP\.DEPBAR": 7,
            # Metadata in one load.
            r"LDS\.64 ": 2 * blocks,
            # x, for this CTA alone or for a cluster.
            r"UTMALDG\.2D ": 1,
            r"UTMALDG\.2D\.MULTICAST": 1,
            # y: 16 tokens at a time from prefill kernels.
            r"STSM\.16\.MT88\.4": blocks * bn // 16 if is_prefill else 0,
            r"UTMASTG\.2D": blocks * bn // 16 if is_prefill else 0,
            # Sums of a split are pushed from shared memory to shared memory.
            r"UBLKCP\.S\.S ": 1 if exchange_tokens else 0,
            # No fence over the whole GPU: barriers of cluster scope in the loops would bring one each step.
            r"MEMBAR\.ALL\.GPU": 0,
            # Programmatic dependent launch.
            r"ACQBULK": 1,
            r"PREEXIT": 1,
            r"USETMAXREG\.DEALLOC\S* 0x28$": 1 if is_prefill else 0,
            r"USETMAXREG\.TRY_ALLOC\S* \w+, 0xe8$": 1 if is_prefill else 0,
            r"USETMAXREG": 2 if is_prefill else 0,
        },
    )
    # W, for this CTA alone or for a cluster: once a ring, unless ptxas merges the code of the rings.
    copies = (r"UBLKCP\.S\.G ", r"UBLKCP\.S\.G\.MULTICAST ")
    found += [f"{kernel}: no {copy}" for copy in copies if not kernel.count(copy)]
    if is_prefill and kernel.resources["REG"] != 168:
        found.append(f"{kernel}: {kernel.resources['REG']} registers at launch; the setmaxnreg sums assume 168")
    return found


def mask_complaints(kernel: Kernel) -> list[str]:
    """Everything of a weight's or the logits' size moves 16 bytes at a time; a group costs 12 log2, 6 exp2, 1 division,
    and a step has two.

    Once more in the prologue: what is fetched a step ahead. The gate of the tile has two log2, one exp2, one division.
    """
    chunks = {"float32": 3, "bfloat16": 2, "fixed": 0}[kernel.logits]
    is_backward, is_learned = kernel.name == "tile_backward", kernel.logits != "fixed"
    found = expect(
        kernel,
        {
            r"LDGSTS\S*\.128 ": 2 * chunks,
            r"LDGSTS": 2 * chunks,
            r"STG\S*\.128 ": 1 + (chunks if is_backward else 0),
            r"(LDG|STG)\S*\.[US](8|16)\b": 0 if is_learned else 2,  # two groups of a fixed pattern are one byte
            r"MUFU\.LG2": 2 + (24 if is_learned else 0),
            r"MUFU\.EX2": 1 + (12 if is_learned else 0),
            r"F2F\.(BF16|F16)": 0,  # one value at a time, in the unit of log2 and exp2
            r"ATOM|RED\b": 0,
        },
    )
    loads = kernel.count(r"LDG\S*\.128 ")
    if loads < (4 if is_backward else 2):
        found.append(f"{kernel}: {loads} loads of 16 bytes for weights{' and gradients' if is_backward else ''}")
    return found


def shell_complaints(kernel: Kernel) -> list[str]:
    """A Hopper kernel on another architecture: compiled, never launched, empty."""
    if len(kernel.instructions) > 32 or kernel.count(r"HGMMA|BAR|SYNCS|ST"):
        return [f"{kernel}: expected an empty kernel, got {len(kernel.instructions)} instructions"]
    return []


def test_every_kernel_is_there(kernels):
    gemm = {(k.name, k.config[0], k.config[-1], bool(k.config[1]) if k.name == "sm90_kernel" else None, k.dtype)
            for k in kernels if k.name not in OTHER_KERNELS}  # fmt: skip
    expected = {("tile_linear_sm80", *config, None, dtype) for config in SM80 for dtype in DTYPES}
    expected |= {("sm90_kernel", *config, config in PREFILL, dtype) for config in DECODE | PREFILL for dtype in DTYPES}
    assert gemm == expected
    for name, number in OTHER_KERNELS.items():
        assert sum(k.name == name for k in kernels) == number, name
    assert len(kernels) == len(expected) + sum(OTHER_KERNELS.values())
    assert all(k.instructions and k.resources for k in kernels)


def test_no_spills(kernels):
    assert [c for k in kernels for c in memory_complaints(k)] == []


def test_registers_allow_the_launch_bounds(kernels):
    assert [c for k in kernels for c in register_complaints(k)] == []


def test_sm80_instructions(kernels):
    assert [c for k in kernels if k.name == "tile_linear_sm80" for c in sm80_complaints(k)] == []


def test_sm90_instructions(kernels):
    check = sm90_complaints if kernels[0].architecture == "sm_90a" else shell_complaints
    assert [c for k in kernels if k.name == "sm90_kernel" for c in check(k)] == []


def test_mask_instructions(kernels):
    mask = [k for k in kernels if k.name in ("tile_forward", "tile_backward")]
    assert sorted((k.name, k.logits) for k in mask) == sorted(
        (name, logits) for name in ("tile_forward", "tile_backward") for logits in ("float32", "bfloat16", "fixed") * 2
    )
    assert [c for k in mask for c in mask_complaints(k)] == []


def test_descriptors_stay_in_uniform_registers(kernels):
    assert [c for k in kernels if k.name == "sm90_kernel" for c in descriptor_complaints(k)] == []


def test_metadata_registers_stay_while_they_may_be_read(kernels):
    assert [c for k in kernels if k.name == "sm90_kernel" for c in metadata_complaints(k)] == []


def test_adamw_moves_whole_vectors(kernels):
    """Eight values at a time of six kernels: 16 bytes, 8 of 8-bit moments."""
    adamw = [k for k in kernels if k.name == "adamw_kernel"]
    counts = {r"LDG\.E\.128 ": 30, r"LDG\.E\.64 ": 4, r"STG\.E\.EF\.128 ": 21, r"STG\.E\.EF\.64 ": 4}
    assert {pattern: sum(k.count(pattern) for k in adamw) for pattern in counts} == counts


def test_unpack_moves_whole_vectors(kernels):
    """16 bytes where rows allow it, twice 8, or single elements. Flags are summed by one instruction a warp."""
    (unpack,) = [k for k in kernels if k.name == "unpack_kernel"]
    assert expect(unpack, {r"STG\.E\.128": 1, r"STG\.E\.64": 2, r"STG\.E\.U16": 8, r"STG": 11, r"REDUX": 1}) == []


def test_library_has_the_architectures_it_claims():
    if not ARCHITECTURES:
        pytest.skip("this build has no CUDA code")
    assert {architecture for architecture, _ in library_kernels()} == set(ARCHITECTURES)


def test_library_size():
    assert LIBRARY.stat().st_size <= 20 * 2**20


# The gate must be able to fail.

SYMBOL = "_ZN13patch_kernels4cuda12_GLOBAL__N_111sm90_kernelINS_4sm906ConfigILi8ELb0ELi8ELi4ELi8EEE13__nv_bfloat16EEvi"


def dense(step: int) -> str:
    return f"HGMMA.64x8x16.F32.BF16 R24, gdesc[UR20], R24{', gsb0' if step == 3 else ''}"


def sparse(selector: int, register: int = 30) -> str:
    return f"HGMMA.SP.64x8x32.F32.BF16 R24, gdesc[UR20], R24, R{register}, 0x{selector}{', gsb0' if selector else ''}"


def sparse_tile(register: int) -> list[str]:
    half = ["WARPGROUP.ARRIVE", sparse(0, register), sparse(1, register), WAIT_ONE]
    return [f"@P0 LDS.64 R{register}, [R2]", *half, *half]


WAIT_ONE, WAIT_ALL = "WARPGROUP.DEPBAR.LE gsb0, 0x1", "WARPGROUP.DEPBAR.LE gsb0, 0x0"
GOOD = [
    *("ACQBULK", "PREEXIT", "UTMALDG.2D [UR4], [UR10]", "UTMALDG.2D.MULTICAST [UR4], [UR10], UR7"),
    *("UBLKCP.S.G [UR8], [UR10], UR4", "@!P1 UBLKCP.S.G.MULTICAST [UR8], [UR10], UR4", "UBLKCP.S.S [UR8], [UR10], UR4"),
    *("WARPGROUP.ARRIVE", *map(dense, range(4)), WAIT_ONE, WAIT_ALL),
    *sparse_tile(30),
    *sparse_tile(32),
    *(WAIT_ALL, "EXIT"),
]  # fmt: skip


def parsed(instructions: list[str], registers: int = 47, stack: int = 0) -> Kernel:
    """Through the parser, in the form cuobjdump prints."""
    usage = ["Fatbin elf code:", "arch = sm_90a", "Resource usage:", " Common:", "  GLOBAL:0", f" Function {SYMBOL}:"]
    usage += [f"  REG:{registers} STACK:{stack} SHARED:1024 LOCAL:0 CONSTANT[0]:400 TEXTURE:0 SURFACE:0 SAMPLER:0"]
    sass = ["arch = sm_90a", "\t\tFunction : " + SYMBOL, '\t.headerflags\t@"EF_CUDA_SM90"']
    for i, text in enumerate(instructions):
        sass.append(f"        /*{16 * i:04x}*/                   {text} ;       /* 0x02e00000141879f0 */")
        sass.append("                                               /* 0x000fe20008000000 */")
    kernels: Kernels = {}
    parse(usage, kernels)
    parse(sass, kernels)
    (kernel,) = kernels.values()
    return kernel


def complaints(kernel: Kernel) -> list[str]:
    checks = (memory_complaints, register_complaints, sm90_complaints, descriptor_complaints, metadata_complaints)
    return [complaint for check in checks for complaint in check(kernel)]


def test_gate_accepts_a_good_kernel():
    kernel = parsed(GOOD)
    assert str(kernel) == "sm_90a sm90_kernel (8, 0, 8, 4, 8) __nv_bfloat16"
    assert len(kernel.instructions) == len(GOOD)
    assert kernel.resources == {"REG": 47, "STACK": 0, "LOCAL": 0}
    assert complaints(kernel) == []


def swapped(old: str, new: str, times: int = 1) -> list[str]:
    text = "\n".join(GOOD)
    assert old in text
    return text.replace(old, new, times).split("\n")


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (parsed([*GOOD, "STL.64 [R1+0x8], R4"]), "spills: STL x1"),
        (parsed([*GOOD, "@P0 LDL R4, [R1]"]), "spills: LDL x1"),
        (parsed(GOOD, stack=16), "spills: STACK 16 bytes"),
        (parsed(GOOD, registers=97), "97 registers let 16 warps on an SM, needs 20"),
        (parsed(swapped(", 0x1, gsb0", ", 0x0, gsb0", -1)), ", 0x1(, gsb0)?$, got 0"),
        (parsed(swapped("R30, 0x1", "R30, 0x0")), ", 0x1(, gsb0)?$, got 3"),
        (parsed([*GOOD, sparse(0)]), "expected 12 x HGMMA, got 13"),
        (parsed([*GOOD, "MEMBAR.ALL.GPU"]), "expected 0 x MEMBAR\\.ALL\\.GPU, got 1"),
        (parsed(swapped("UBLKCP.S.S", "UBLKCP.S.G")), "expected 1 x UBLKCP\\.S\\.S , got 0"),
        (parsed(swapped(dense(1), "\n".join([*3 * ["R2UR UR20, R4"], dense(1)]))), "3 R2UR in a group of wgmma"),
        (parsed(swapped("LDS.64 R32", "LDS.64 R30")), "metadata in flight is overwritten by LDS.64 R30"),
        (parsed(swapped("LDS.64 R32", "LDS.64 R29")), "metadata in flight is overwritten by LDS.64 R29"),
        (parsed([*GOOD, WAIT_ALL]), "expected 7 x WARPGROUP\\.DEPBAR, got 8"),
        (parsed(swapped(WAIT_ONE, WAIT_ALL)), "expected 5 x WARPGROUP\\.DEPBAR\\.LE gsb0, 0x1$, got 4"),
        (parsed(swapped("R24\n", "R24, gsb0\n")), "expected 5 x HGMMA.*gsb0$, got 6"),
        (parsed(swapped("64x8x16", "64x16x16")), "expected 4 x HGMMA\\.64x8x16\\.F32\\.BF16 , got 3"),
        (parsed(swapped("F32.BF16", "F32")), "expected 4 x HGMMA\\.64x8x16\\.F32\\.BF16 , got 3"),
        (parsed(swapped("UBLKCP.S.G.MULTICAST", "UBLKCP.S.G")), "no UBLKCP\\.S\\.G\\.MULTICAST "),
        (parsed(swapped("UTMALDG.2D.MULTICAST", "UTMALDG.2D")), "expected 1 x UTMALDG\\.2D\\.MULTICAST, got 0"),
        (parsed(swapped("LDS.64", "LDS")), "expected 2 x LDS\\.64 , got 1"),
        (parsed([*GOOD, "STSM.16.MT88.4 [R1], R4"]), "expected 0 x STSM\\.16\\.MT88\\.4, got 1"),
        (parsed([*GOOD, "USETMAXREG.DEALLOC.CTAPOOL 0x28"]), "expected 0 x USETMAXREG, got 1"),
    ],
)
def test_gate_complains(kernel, message):
    assert any(message in complaint for complaint in complaints(kernel)), complaints(kernel)


def test_gate_wants_a_shell_elsewhere():
    assert shell_complaints(parsed(["LDC R1, c[0x0][0x28]", "EXIT"])) == []
    assert "expected an empty kernel" in shell_complaints(parsed(GOOD))[0]
