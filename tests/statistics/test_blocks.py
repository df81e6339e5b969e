"""Large inputs on the CPU are processed in blocks; parts are merged."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from gradbalance.statistics import _central, moments
from tests.strategies import moment_inputs

from .reference import gamma


@given(inputs=moment_inputs(), block=st.integers(1, 30))
def test_the_size_of_a_block_changes_neither_value_nor_gradient(inputs, block):
    x, mask = inputs
    for dim in (None, 1):
        results = []
        for size in (10**9, block):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(_central, "_BLOCK", size)
                leaf = x.clone().requires_grad_()
                found = moments(leaf, mask, dim=dim, order=4)
                weights = torch.linspace(-1, 1, found.mean.numel(), dtype=x.dtype)
                weights = weights.reshape(found.mean.shape)
                sum((weights * value).sum() for value in found[1:]).backward()
                results.append([*found, leaf.grad])
        assert_close(results[0], results[1], rtol=1e-9, atol=1e-9)


def test_valid_samples_that_follow_many_masked_ones_are_as_accurate_as_by_themselves():
    x = torch.cat([torch.zeros(5000, 3), gamma(40, 3, offset=1.4e4)])
    mask = torch.arange(5040) >= 5000
    found, expected = moments(x, mask, order=3), moments(x[mask].double(), order=3)
    assert ((found.skewness - expected.skewness) / expected.skewness).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("shape", "dim"),
    [((9000, 20), None), ((3, 9000, 20), 1), ((2000, 50, 2), 1), ((20, 90, 70), None)],
)
@pytest.mark.parametrize("masked", [False, True])
def test_a_large_input_is_as_exact_as_in_float64_up_to_second_derivatives(shape, dim, masked):
    x = gamma(*shape, offset=3.0).requires_grad_()
    mask = torch.rand(shape[:-1], generator=torch.Generator().manual_seed(0)) > 0.3
    mask = mask if masked else None
    results = []
    for kind in (torch.float32, torch.float64):
        leaf = x.detach().to(kind, copy=True).requires_grad_()
        found = moments(leaf, mask, dim=dim, order=4)
        (first,) = torch.autograd.grad(found.kurtosis.sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), leaf)
        results.append([*(value.double() for value in (*found[1:], first, second))])
    for value, expected in zip(*results, strict=True):
        assert (value - expected).norm() <= 1e-5 * expected.norm()


def test_vmap_over_large_inputs_equals_a_loop(monkeypatch):
    monkeypatch.setattr(_central, "_BLOCK", 20)
    x = gamma(3, 40, 2).double()
    mask = torch.rand(3, 40, generator=torch.Generator().manual_seed(0)) > 0.3

    def kurtosis(x, mask):
        return moments(x, mask, order=4).kurtosis.sum()

    for function in (kurtosis, torch.func.grad(kurtosis)):
        singles = [function(*pair) for pair in zip(x, mask, strict=True)]
        assert_close(torch.func.vmap(function)(x, mask), torch.stack(singles))
