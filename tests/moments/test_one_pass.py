"""The way of large inputs: in blocks, about a pilot mean, without temporaries of their size."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from gradbalance._moments import one_pass, plain
from gradbalance._moments.statistics import central_moments, moments
from tests.strategies import moment_inputs

from .reference import gamma


@pytest.fixture(scope="module", autouse=True)
def nothing_is_small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plain, "LARGEST", 0)
        yield


@given(inputs=moment_inputs(), block=st.integers(1, 30))
def test_the_size_of_a_block_changes_neither_value_nor_gradient(inputs, block):
    x, mask = inputs
    for dim in (None, 1):
        results = []
        for size in (one_pass._BLOCK, block):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(one_pass, "_BLOCK", size)
                patch.setattr(one_pass, "_PILOT", size)
                leaf = x.clone().requires_grad_()
                found = moments(leaf, mask, dim=dim, order=4)
                weights = torch.linspace(-1, 1, found.mean.numel(), dtype=x.dtype).reshape(found.mean.shape)
                sum((weights * value).sum() for value in found[1:]).backward()
                results.append([*found, leaf.grad])
        assert_close(results[0], results[1], rtol=1e-9, atol=1e-9)


def test_the_pilot_sample_holds_valid_rows_alone():
    x = torch.cat([torch.zeros(5000, 3), gamma(40, 3, offset=1.4e4)])
    mask = torch.arange(5040) >= 5000
    found, expected = moments(x, mask, order=3), moments(x[mask].double(), order=3)
    assert ((found.skewness - expected.skewness) / expected.skewness).abs().max() <= 1e-5


def test_rounding_makes_no_even_moment_negative_even_with_a_poor_pilot_sample(monkeypatch):
    monkeypatch.setattr(one_pass, "_pilot_mean", lambda x, mask: torch.zeros(1, 1, x.shape[-1]))
    found = central_moments(torch.linspace(0.1, 9.0, 500).expand(97, 500), order=4)
    assert all((even >= 0).all() for even in found.powers[::2])


@pytest.mark.parametrize("masked", [False, True])
def test_neither_direction_keeps_a_temporary_of_the_size_of_the_input(masked):
    x = gamma(6000, 100).requires_grad_()
    mask = torch.arange(6000) % 3 > 0 if masked else None
    with Sizes() as forward:
        variance = moments(x, mask).variance
    assert max(forward.sizes) <= one_pass._BLOCK
    with Sizes() as backward:
        torch.autograd.grad(variance.sum(), x)
    assert sorted(backward.sizes)[-2] <= one_pass._BLOCK
    assert max(backward.sizes) == x.numel()


class Sizes(TorchDispatchMode):
    """Records the number of elements of every tensor that an operation allocates."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.sizes.append(tensor.numel())
        return out
