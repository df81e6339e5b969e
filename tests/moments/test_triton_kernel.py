import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from gradbalance._moments import one_pass
from tests import needs

needs("triton")

# Triton chooses between compiler and interpreter when it is imported, hence a process of its own.
EQUAL = """
import itertools
import torch
from torch.testing import assert_close
from gradbalance._moments import one_pass as kernel, plain, triton_kernel as fused
from gradbalance._moments.one_pass import CentralMoments
from gradbalance._moments.statistics import central_moments, moments

plain.LARGEST = 0
fused._TILE, fused._COLUMNS = 64, 16
generator = torch.Generator().manual_seed(0)
shapes, kinds = ((1, 23, 5), (3, 9, 17), (2, 0, 3)), ("unmasked", "ragged", "late", "empty")
dtypes, parts = itertools.cycle((torch.float64, torch.float32, torch.float16)), itertools.cycle((1, 2, 4, 256, 3))
orders = itertools.cycle((4, 2, 3, 4, 1, 3, 4))
for shape, kind in itertools.product(shapes, kinds + kinds):
    dtype, fused._PARTS, order = next(dtypes), next(parts), next(orders)
    x = torch.randn(2, *shape, generator=generator).square().sum(0).add(100).to(dtype).requires_grad_()
    mask = {
        "unmasked": None,
        "ragged": torch.rand(shape[:2], generator=generator) > 0.4,
        "late": (torch.arange(shape[1]) >= 7).expand(shape[:2]).contiguous(),
        "empty": torch.zeros(shape[:2], dtype=torch.bool),
    }[kind]
    with torch.no_grad():
        x[:, :2] += 50
        if mask is not None:
            x[~mask] = float("nan")
    count, shift, powers = CentralMoments.apply(x, mask, 1, order, False)
    found = fused.forward(x.detach(), mask, order)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    close = dict(rtol=tolerance, atol=tolerance)
    assert_close(found[0], count)
    assert_close(found[1] + found[2][0], shift + powers[0], **close)
    assert_close(found[2][1:], powers[1:], **close)
    weights = torch.randn(powers.shape, generator=generator, dtype=powers.dtype)
    (expected,) = torch.autograd.grad((weights * powers).sum(), x)
    gradient = fused.backward(x.detach(), mask, *found, weights)
    assert gradient.dtype == dtype
    assert_close(gradient, expected, rtol=max(tolerance, 2e-3 if dtype == torch.float16 else 0), atol=tolerance)

x = torch.randn(6, 4, 3, generator=generator, dtype=torch.float64, requires_grad=True)
mask = torch.rand(6, 4, generator=generator) > 0.3
results = []
for kernels in (None, fused):
    kernel._fused = lambda x, kernels=kernels: kernels
    for dim in (None, 1, (1, 2)):
        found = moments(x, mask, dim=dim, order=4)
        (gradient,) = torch.autograd.grad(sum(value.sum() for value in found[1:]), x)
        again = moments(x, mask, dim=dim).variance
        (first,) = torch.autograd.grad(again.square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        results.append([*found, gradient, first, second, central_moments(x, mask, covariance=True).covariance])
assert_close(results[3:], results[:3], rtol=1e-9, atol=1e-9)

x = torch.tensor([[[-65504.0], [65504.0]]], dtype=torch.float16)
gradient = fused.backward(x, None, *fused.forward(x, None, 2), torch.full((2, 1, 1), 1e9))
assert gradient.flatten().tolist() == [-65504.0, 65504.0]
"""


# What the interpreter accepts is not always what the compiler does. It needs no GPU for that.
COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from gradbalance._moments import triton_kernel as fused

for dtype, wide, masked, order in (("fp16", "fp32", True, 4), ("bf16", "fp32", False, 2), ("fp64", "fp64", True, 3)):
    constants = {"MASKED": masked, "ORDER": order, "ROWS": 16, "PARTS": 4, "COLUMNS": 16, "LARGEST": 65504.0 * masked}
    types = dict.fromkeys(("partial", "shift", "powers", "grad"), "*" + wide)
    types |= {"x": "*" + dtype, "gradient": "*" + dtype, "mask": "*u8", "counts": "*i64", "count": "*i64"}
    for kernel in (fused._sum_parts, fused._merge_parts, fused._gradient):
        names = kernel.arg_names
        signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
        fixed = {(index,): constants[name] for index, name in enumerate(names) if name in constants}
        triton.compile(ASTSource(kernel, signature, fixed), target=GPUTarget("cuda", 90, 32))
"""


def run(script, **environment):
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_the_fused_kernel_equals_the_eager_one_under_the_interpreter():
    run(EQUAL, TRITON_INTERPRET="1")


def test_the_fused_kernel_compiles_for_a_hopper_gpu():
    run(COMPILE, TRITON_INTERPRET="0")


@pytest.mark.parametrize(
    ("asked", "is_cuda", "taken"), [(None, True, False), ("0", True, False), ("1", True, True), ("1", False, False)]
)
def test_the_fused_kernel_is_taken_on_cuda_alone_and_only_if_asked_for(asked, is_cuda, taken, monkeypatch):
    monkeypatch.delenv("GRADBALANCE_TRITON", raising=False)
    if asked is not None:
        monkeypatch.setenv("GRADBALANCE_TRITON", asked)
    assert (one_pass._fused(SimpleNamespace(is_cuda=is_cuda)) is not None) == taken
