"""Norms and scaling: what is read, what is written."""

from operator import attrgetter

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from gradbalance import _buckets
from gradbalance._buckets import gather, in_buckets
from gradbalance._norms import reduce_norms
from gradbalance._scaling import scale_

GRADIENT = attrgetter("grad")


def gathered_gradients(sizes):
    groups = [[torch.nn.Parameter(torch.ones(size)) for size in group] for group in sizes]
    for p in (p for group in groups for p in group):
        p.grad = torch.arange(1.0, p.numel() + 1)
    return groups, gather(in_buckets(groups), GRADIENT)


def test_a_group_whose_factor_is_one_is_not_written_on_the_host():
    groups, gathered = gathered_gradients([[3, 4], [5], [6]])
    parameters = [p for group in groups for p in group]
    before = [p.grad._version for p in parameters]
    scale_(gathered, torch.tensor([1.0, 0.5, 1.0]))
    assert [p.grad._version - v for p, v in zip(parameters, before, strict=True)] == [0, 0, 1, 0]
    assert groups[1][0].grad.tolist() == [0.5, 1.0, 1.5, 2.0, 2.5]


@pytest.mark.parametrize("host", [True, False])
@pytest.mark.parametrize("factors", [0.5, [0.5, 1.0, 0.25]])
def test_each_group_is_multiplied_by_its_factor_or_all_by_one(monkeypatch, host, factors):
    monkeypatch.setattr(_buckets, "on_host", lambda device: host)
    groups, gathered = gathered_gradients([[3, 4], [], [6]])
    factors = torch.tensor(factors, dtype=torch.float64)
    scale_(gathered, factors)
    for group, factor in zip(groups, factors.expand(3).tolist(), strict=True):
        for p in group:
            assert torch.equal(p.grad, factor * torch.arange(1.0, p.numel() + 1))


def test_parameters_without_a_gradient_shift_no_other_group():
    groups, _ = gathered_gradients([[3, 4], [5, 2], [6]])
    groups[0][1].grad = groups[1][0].grad = None
    gathered = gather(in_buckets(groups), GRADIENT)
    norms, *_ = reduce_norms(gathered, 3, torch.device("cpu"))
    expected = [sum(float(p.grad.square().sum()) for p in group if p.grad is not None) ** 0.5 for group in groups]
    assert norms.tolist() == pytest.approx(expected, rel=1e-6)


def test_norms_are_taken_without_a_read_inside_an_operator():
    _, gathered = gathered_gradients([[3, 4], [5], [6]])
    reduce_norms(gathered, 3, torch.device("cpu"))  # the offsets are made once
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        reduce_norms(gathered, 3, torch.device("cpu"))
    names = {event.name for event in trace.events()}
    assert "aten::segment_reduce" in names
    assert "aten::_local_scalar_dense" not in names
