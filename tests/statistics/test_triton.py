"""The fused kernels, in Triton's interpreter and through its compiler; neither needs a GPU."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import needs

needs("triton")

ROOT = Path(__file__).parents[2]
KERNELS = ("_sum_parts", "_merge_parts", "_gradient")
CUDA = ("sm_80", "sm_90")
TARGETS = (*CUDA, "gfx942")

# Triton chooses between compiler and interpreter when it is imported, hence a process of its own.
EQUAL = """
import itertools
import torch
from torch.testing import assert_close
from gradbalance.statistics import _central, _triton as fused

fused._TILE, fused._COLUMNS = 64, 16
generator = torch.Generator().manual_seed(0)
shapes, kinds = ((1, 23, 5), (3, 9, 17), (2, 0, 3)), ("unmasked", "ragged", "late", "empty")
dtypes = itertools.cycle((torch.float64, torch.float32, torch.float16))
parts = itertools.cycle((1, 2, 4, 256, 3))
orders = itertools.cycle((4, 2, 3, 4, 1, 3, 4))
for shape, kind in itertools.product(shapes, kinds + kinds):
    dtype, fused._PARTS, order = next(dtypes), next(parts), next(orders)
    x = torch.randn(2, *shape, generator=generator).square().sum(0).add(100).to(dtype)
    mask = {
        "unmasked": None,
        "ragged": torch.rand(shape[:2], generator=generator) > 0.4,
        "late": (torch.arange(shape[1]) >= 7).expand(shape[:2]).contiguous(),
        "empty": torch.zeros(shape[:2], dtype=torch.bool),
    }[kind]
    x[:, :2] += 50
    if mask is not None:
        x[~mask] = float("nan")
    x.requires_grad_()
    expected = _central.central_moments(x, mask, 1, order, False, True)
    found = fused.central_moments(x, mask, order)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    close = dict(rtol=tolerance, atol=tolerance)
    assert_close(found.count, expected.count)
    assert_close([found.mean, *found.powers], [expected.mean, *expected.powers], **close)
    gradients = []
    weights = torch.randn(order, *found.mean.shape, generator=generator, dtype=torch.float64)
    for central in (found, expected):
        total = sum((w * v).sum() for w, v in zip(weights, (central.mean, *central.powers)))
        gradients.append(torch.autograd.grad(total, x)[0])
    assert gradients[0].dtype == dtype
    close["rtol"] = max(tolerance, 2e-3 if dtype == torch.float16 else 0)
    assert_close(*gradients, **close)

x = torch.randn(6, 4, 3, generator=generator, dtype=torch.float64, requires_grad=True)
mask = torch.rand(6, 4, generator=generator) > 0.3
results = []
for central in (fused.central_moments(x, mask, 4), _central.central_moments(x, mask, 1, 4, False, True)):
    (first,) = torch.autograd.grad(central.powers[2].square().sum(), x, create_graph=True)
    results.append(torch.autograd.grad(first.square().sum(), x)[0])
assert_close(*results, rtol=1e-9, atol=1e-9)
"""

EXTREMES = """
import torch
from gradbalance.statistics import _triton as fused

x = torch.tensor([[[-65504.0], [65504.0]]], dtype=torch.float16, requires_grad=True)
(1e9 * fused.central_moments(x, None, 2).powers[0]).sum().backward()
assert x.grad.flatten().tolist() == [-torch.inf, torch.inf]

for value in (torch.nan, torch.inf):
    x = torch.zeros(1, 5, 2, dtype=torch.float16)
    x[0, 1, 0] = value
    x.requires_grad_()
    _, mean, powers, _ = fused.central_moments(x, None, 4)
    for moment in (mean, *powers):
        assert moment.isnan().tolist() == [[True, False]], (value, moment)
    sum(power.sum() for power in powers).backward()
    assert x.grad[..., 0].isnan().all()
    assert x.grad[..., 1].isfinite().all()

x = torch.zeros(1, 5, 2, dtype=torch.float16, requires_grad=True)
(torch.nan * fused.central_moments(x, None, 2).mean).sum().backward()
assert x.grad.isnan().all()

x = torch.full((1, 3, 1), 1e12, requires_grad=True)  # whose fourth power is infinite
fused.central_moments(x, None, 2).powers[0].sum().backward()
assert x.grad.isfinite().all()
"""

# A tensor that only says that it is on a GPU, since everything else runs in the interpreter.
CHOICE = """
import os
import torch
from gradbalance.statistics import _triton as fused, moments

class OnGpu(torch.Tensor):
    @property
    def device(self):
        return torch.device("cuda", 0)

taken = []
launch = fused.central_moments
fused.central_moments = lambda *args: taken.append(1) or launch(*args)
x, mask = torch.randn(4, 3), torch.ones(4, dtype=torch.bool)
expected = moments(x, mask, order=4)
for asked, sample, times in (("", OnGpu, 0), ("0", OnGpu, 0), ("1", torch.Tensor, 0), ("1", OnGpu, 1)):
    os.environ["GRADBALANCE_TRITON"] = asked
    taken.clear()
    found = moments(x.as_subclass(sample), mask.as_subclass(sample), order=4)
    assert len(taken) == times, (asked, sample)
    for value, same in zip(found, expected):
        torch.testing.assert_close(value.as_subclass(torch.Tensor), same)

for groups, rows, features, fits in (
    (1, 2**29, 1024, True), (1, 2**31, 1, False), (2**16, 2**15, 1, False), (1, 1, 1_048_560, True),
    (1, 1, 1_048_561, False), (2**14, 2, 2**15, False), (2**20, 2, 2**9, False),
):
    assert fused.can_index(groups, rows, features) == fits, (groups, rows, features)
"""

# NaN and infinity where the tensor operations have them, and nowhere else.
PARITY = """
import itertools
import torch
from gradbalance.statistics import _central, _triton as fused

fused._TILE, fused._COLUMNS, fused._PARTS = 64, 16, 2
generator = torch.Generator().manual_seed(0)
dtypes = itertools.cycle((torch.float16, torch.bfloat16, torch.float32, torch.float64))
values, rows = (torch.nan, torch.inf, -torch.inf, "both"), (9, 22)
for value, row, is_masked in itertools.product(values, rows, (False, True)):
    dtype, order = next(dtypes), 4 - row % 2
    x = torch.randn(2, 23, 5, generator=generator).to(dtype)
    mask = torch.rand(2, 23, generator=generator) > 0.4 if is_masked else None
    x[0, row, 1] = torch.inf if value == "both" else value
    if value == "both":
        x[0, row - 1, 1] = -torch.inf
    x.requires_grad_()
    shown = []
    for central in (fused.central_moments(x, mask, order), _central.central_moments(x, mask, 1, order, False, True)):
        moments = (central.mean, *central.powers)
        (gradient,) = torch.autograd.grad(sum(moment.sum() for moment in moments), x)
        shown.append([moment.isnan().tolist() for moment in (*moments, gradient)])
    assert shown[0] == shown[1], (value, row, is_masked, dtype)
"""

# Two devices that are nowhere: a tensor that says that it is on the second one, and a driver of
# which Triton asks where it is. Both see the current device of torch.
DEVICE = """
import torch
from triton.runtime import driver
from gradbalance.statistics import _triton as fused
from tests.statistics import compiled

class OnSecond(torch.Tensor):
    is_cuda = True

    def get_device(self):
        return 1

current = [0]

def exchange(index):
    before = current[0]
    current[0] = index if index >= 0 else before
    return before

torch.cuda._exchange_device = torch.cuda._maybe_exchange_device = exchange
torch.cuda.current_device = lambda: current[0]

class Driver(compiled.Driver):
    def get_current_device(self):
        return torch.cuda.current_device()

driver.set_active(Driver("sm_90"))
note = compiled.JITFunction.run
asked = []
compiled.JITFunction.run = lambda self, *_, **__: asked.append((self.__name__, driver.active.get_current_device()))
x = torch.randn(2, 9, 4).as_subclass(OnSecond).requires_grad_()
central = fused.central_moments(x, None, 4)
assert current == [0]
sum(power.sum() for power in central.powers).backward()
assert current == [0]
assert asked == [("_sum_parts", 1), ("_merge_parts", 1), ("_gradient", 1)], asked
"""

# The largest samples that are taken, along each axis.
GRIDS = """
import torch
from gradbalance.statistics import _triton as fused
from tests.statistics.compiled import launches

taken = [
    (1, 2**30, 1), (1, 2**29, 1024), (1, 1, 1_048_560), (204, 1, 1_048_560), (2**27, 8, 1), (2**27, 1, 1),
    (2**20, 2, 200), (1, 1023, 1_048_560), (2**30 // 5, 1, 1), (65_536, 16_384, 3),
]
for shape in taken:
    assert fused.can_index(*shape), shape
    found = launches(shape, torch.bfloat16, True, 4, compiles=False)
    assert [kernel for kernel, _, _ in found] == ["_sum_parts", "_merge_parts", "_gradient"]
    for kernel, grid, _ in found:
        assert all(size >= 1 for size in grid), (kernel, shape, grid)
        limits = (2**31 - 1, 65_535, 65_535)
        assert all(size <= limit for size, limit in zip(grid, limits)), (kernel, shape, grid)
for shape in ((1, 2**30 + 1, 1), (1, 1, 1_048_561), (2**30 // 5 + 1, 1, 1)):
    assert not fused.can_index(*shape), shape
"""


def run(script, **environment):
    command = [sys.executable, "-c", script]
    variables = {**os.environ, **environment}
    result = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_the_fused_kernels_equal_the_tensor_operations():
    run(EQUAL, TRITON_INTERPRET="1")


def test_the_fused_kernels_keep_nan_where_the_tensor_operations_do_and_overflow_to_infinity():
    run(EXTREMES + PARITY, TRITON_INTERPRET="1")


def test_the_fused_kernels_are_taken_on_cuda_alone_if_asked_for_and_if_they_can_index_the_samples():
    run(CHOICE, TRITON_INTERPRET="1")


def test_the_kernels_are_launched_in_grids_that_fit_on_the_device_of_the_samples():
    run(GRIDS + DEVICE, TRITON_INTERPRET="0")


ACCESS = {
    "ld": re.compile(r"ld\.global\.(?:v(\d)\.)?b(\d+)|(?:global|buffer)_load_(\w+)"),
    "st": re.compile(r"st\.global\.(?:v(\d)\.)?b(\d+)|(?:global|buffer)_store_(\w+)"),
}
HIP = {"dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16, "ushort": 2, "short": 2}


# What the interpreter accepts is not always what the compiler does. Every kind of launch: EVERY_KERNEL=1.
@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    command = [sys.executable, "-W", "ignore", "-m", "tests.statistics.compiled"]
    if os.environ.get("EVERY_KERNEL") == "1":
        command.append("--all")
    cache = str(tmp_path_factory.mktemp("triton"))
    variables = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": cache}
    result = subprocess.run(
        command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture
def kernels(compiled, target):
    assert {kernel["kernel"] for kernel in compiled[target]} == set(KERNELS)
    return compiled[target]


def share_of_wide(access, kernel):
    """How many of the bytes that a kernel reads or writes come 16 at a time."""
    sizes = []
    for count, bits, hip in ACCESS[access].findall(kernel["code"]):
        sizes.append(HIP.get(hip, 1) if hip else int(count or 1) * int(bits) // 8)
    return sum(size for size in sizes if size >= 16) / sum(sizes)


def described(kernel):
    """All but the code, for a message."""
    return {name: value for name, value in kernel.items() if name != "code"}


@pytest.mark.parametrize("target", TARGETS)
def test_no_kernel_spills_registers(kernels):
    for kernel in kernels:
        is_known = kernel["kernel"] == "_merge_parts" and kernel["dtype"] == "float64"
        assert is_known or kernel["spilled"] == 0, described(kernel)


@pytest.mark.parametrize("target", TARGETS)
def test_no_kernel_has_atomic_operations(kernels):
    for kernel in kernels:
        found = re.findall(r"\b(?:atom|red)\.\S+|\w*atomic\w*", kernel["code"])
        assert not found, (described(kernel), found)


@pytest.mark.parametrize("target", CUDA)
def test_no_maximum_drops_nan(kernels):
    for kernel in kernels:
        found = re.findall(r"\b(?:max|min)\.\S*f(?:16|32)\S*", kernel["code"])
        assert all(".NaN" in name for name in found), (described(kernel), found)
        # There is none in float64 that keeps NaN: it is looked for beside.
        guarded = re.findall(
            r"setp\.nan\.f64\s+\S+ (\S+), \1;\s+max\.f64\s+\S+ \1,", kernel["code"]
        )
        assert len(guarded) == len(re.findall(r"\b(?:max|min)\.f64", kernel["code"]))


@pytest.mark.parametrize("target", TARGETS)
def test_the_samples_are_read_and_written_16_bytes_at_a_time_where_the_features_allow_it(kernels):
    for kernel in kernels:
        if kernel["kernel"] == "_merge_parts" or kernel["shape"][2] % 16:
            continue
        for access in ("ld",) if kernel["kernel"] == "_sum_parts" else ("ld", "st"):
            assert share_of_wide(access, kernel) > 0.5, (described(kernel), access)
