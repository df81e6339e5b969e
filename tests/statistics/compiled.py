"""The fused kernels ahead of time: ``python -m tests.statistics.compiled`` prints in JSON what the compiler makes.

The library launches them on tensors without numbers. A driver without a device takes each launch, compiles the kernel
as that launch would, and runs nothing. In a process of its own, since Triton has one driver.

With ``--all`` every kind of launch is compiled for every target, which takes minutes.
"""

import contextlib
import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from gradbalance.statistics import _triton as fused

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Shape of the samples, their dtype, whether they are masked, and the order.
ALIGNED = ((1, 3200, 768), torch.float32, True, 4)
FEW = {
    "sm_80": [ALIGNED],
    "sm_90": [
        ALIGNED,
        ((1, 65536, 1024), torch.bfloat16, False, 2),
        ((3, 50, 74), torch.float16, True, 3),
    ],
    "gfx942": [ALIGNED],
}
SHAPES = ((1, 3200, 768), (1, 65536, 1024), (3, 50, 74), (16, 4096, 16), (1, 1, 1), (2, 40, 5))
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def every_kind():
    """All that changes what is compiled: the columns, their number, one row, one share of the rows."""
    kinds = [(False, 2), (True, 4)]
    variants = [(*of, *kind) for of in itertools.product(SHAPES, DTYPES) for kind in kinds]
    others = itertools.product(DTYPES, (False, True), (1, 3))
    return variants + [(SHAPES[0], *other) for other in others]


class Driver:
    """Says what is to be compiled for: a device for each target, as kernels are kept by device."""

    def __init__(self, name):
        self.target = TARGETS[name]
        self.device = list(TARGETS).index(name)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return 0


@contextlib.contextmanager
def noted(compiles):
    """The launches, as tuples of the kernel, its grid and what it compiles to if that is asked for."""
    run = JITFunction.run
    seen = []

    def note(self, *args, grid, warmup, **options):
        binary = run(self, *args, grid=grid, warmup=True, **options) if compiles else None
        seen.append((self.__name__, grid, binary))

    JITFunction.run = note
    try:
        yield seen
    finally:
        JITFunction.run = run


def launches(shape, dtype, masked, order, compiles=True):
    """What the library launches for moments and their gradient."""
    x = torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)
    mask = torch.empty(shape[:2], dtype=torch.bool, device="meta") if masked else None
    with noted(compiles) as seen:
        central = fused.central_moments(x, mask, order)
        sum(moment.sum() for moment in (central.mean, *central.powers)).backward()
    return seen


def spilled(binary, target, folder):
    """Bytes of registers that go to memory."""
    if target.backend == "hip":
        counts = re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", binary.asm["amdgcn"])
        return 4 * sum(map(int, counts))
    path = folder / "kernel.ptx"
    path.write_text(binary.asm["ptx"])
    architecture = sm_arch_from_capability(target.arch)
    command = [get_ptxas(target.arch).path, "-v", f"--gpu-name={architecture}", path, "-o"]
    done = subprocess.run([*command, "/dev/null"], capture_output=True, text=True, check=True)
    return sum(map(int, re.findall(r"(\d+) bytes spill", done.stderr)))


def compiled(name, variants):
    """What each launch of the variants compiles to for a target."""
    target = TARGETS[name]
    driver.set_active(Driver(name))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for variant in variants:
            shape, dtype, masked, order = variant
            for kernel, _, binary in launches(*variant):
                rows.append(
                    {
                        "kernel": kernel,
                        "shape": shape,
                        "dtype": str(dtype).removeprefix("torch."),
                        "masked": masked,
                        "order": order,
                        "spilled": spilled(binary, target, Path(folder)),
                        "code": binary.asm["amdgcn" if target.backend == "hip" else "ptx"],
                    }
                )
    return rows


if __name__ == "__main__":
    chosen = dict.fromkeys(TARGETS, every_kind()) if "--all" in sys.argv else FEW
    json.dump({name: compiled(name, chosen[name]) for name in TARGETS}, sys.stdout)
