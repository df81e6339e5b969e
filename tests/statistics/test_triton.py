"""The fused kernels, in Triton's interpreter and through its compiler; neither needs a GPU."""

import os
import subprocess
import sys

from tests import needs

needs("triton")

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
    found = moments(x.as_subclass(sample), mask, order=4)
    assert len(taken) == times, (asked, sample)
    for value, same in zip(found, expected):
        torch.testing.assert_close(value.as_subclass(torch.Tensor), same)

for groups, rows, features, fits in (
    (1, 2**29, 1024, True), (1, 2**31, 1, False), (2**16, 2**15, 1, False), (1, 1, 1_048_560, True),
    (1, 1, 1_048_561, False), (2**14, 2, 2**15, False), (2**20, 2, 2**9, False),
):
    assert fused.can_index(groups, rows, features) == fits, (groups, rows, features)
"""

# What the interpreter accepts is not always what the compiler does.
COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import triton
from gradbalance.statistics import _triton as fused

for dtype, wide, masked, order in (("fp16", "fp32", True, 4), ("bf16", "fp32", False, 2), ("fp64", "fp64", True, 3)):
    constants = {"MASKED": masked, "ORDER": order, "ROWS": 16, "PARTS": 4, "COLUMNS": 16}
    types = dict.fromkeys(("sums", "powers", "grad"), "*" + wide)
    types |= {"x": "*" + dtype, "gradient": "*" + dtype, "mask": "*u8"}
    types |= {"counts": "*i64", "count": "*i64", "mean": "*fp64"}
    for kernel in (fused._sum_parts, fused._merge_parts, fused._gradient):
        names = kernel.arg_names
        signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
        fixed = {(index,): constants[name] for index, name in enumerate(names) if name in constants}
        triton.compile(ASTSource(kernel, signature, fixed), target=GPUTarget("cuda", 90, 32))
"""


def run(script, **environment):
    command = [sys.executable, "-c", script]
    variables = {**os.environ, **environment}
    result = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_the_fused_kernels_equal_the_tensor_operations():
    run(EQUAL, TRITON_INTERPRET="1")


def test_the_fused_kernels_keep_nan_and_overflow_to_infinity():
    run(EXTREMES, TRITON_INTERPRET="1")


def test_the_fused_kernels_are_taken_on_cuda_alone_if_asked_for_and_if_they_can_index_the_samples():
    run(CHOICE, TRITON_INTERPRET="1")


def test_the_fused_kernels_compile_for_a_hopper_gpu():
    run(COMPILE, TRITON_INTERPRET="0")
