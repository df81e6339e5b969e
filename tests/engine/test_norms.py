"""Norms and scaling: what is read, what is written."""

import math
from operator import attrgetter

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from gradbalance import _buckets
from gradbalance._buckets import CPU_PART, gather, in_buckets
from gradbalance._norms import _mean, _summable, reduce_norms
from gradbalance._rule import UNSEEN
from gradbalance._scaling import clipped, scale_

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


def test_the_norm_of_a_group_spans_its_dtypes():
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64)
    groups = [
        [torch.nn.Parameter(torch.zeros(2, dtype=dtype)) for dtype in dtypes],
        [torch.nn.Parameter(torch.zeros(2))],
    ]
    for group in groups:
        for p in group:
            p.grad = torch.full_like(p, 3 + 4j if p.is_complex() else 5)
    norms, *_ = reduce_norms(gather(in_buckets(groups), GRADIENT), 2, torch.device("cpu"))
    assert norms.tolist() == pytest.approx([250**0.5, 50**0.5], rel=1e-6)


def test_a_norm_does_not_overflow_where_those_of_its_tensors_do_not():
    group = [torch.nn.Parameter(torch.zeros(1)) for _ in range(64)]
    for p in group:
        p.grad = torch.full_like(p, 1e19)
    norms, *_ = reduce_norms(gather(in_buckets([group, []]), GRADIENT), 2, torch.device("cpu"))
    assert norms.tolist() == pytest.approx([8e19, 0.0], rel=1e-6)


@pytest.mark.parametrize(("host", "size", "parts"), [(True, 1, 1), (True, 5, 3), (False, 5, 1)])
def test_tensors_are_taken_in_parts_where_they_are_large_and_on_the_host(monkeypatch, host, size, parts):
    monkeypatch.setattr(_buckets, "on_host", lambda device: host)
    p = torch.nn.Parameter(torch.zeros(2 * size, CPU_PART // 4))
    p.grad = torch.ones_like(p)
    gathered = gather(in_buckets([[p]]), GRADIENT)
    reduce_norms(gathered, 1, torch.device("cpu"))
    assert gathered[0].bucket._counts == [parts]


def test_rows_too_long_for_one_part_are_parts_of_their_own():
    p = torch.nn.Parameter(torch.zeros(3, 2 * CPU_PART))
    p.grad = torch.ones_like(p)
    norms, *_ = reduce_norms(gather(in_buckets([[p]]), GRADIENT), 1, torch.device("cpu"))
    assert norms.item() == pytest.approx((6 * CPU_PART) ** 0.5, rel=1e-4)


@pytest.mark.parametrize("host", [True, False])
def test_gradients_in_double_precision_are_scaled_in_it(monkeypatch, host):
    monkeypatch.setattr(_buckets, "on_host", lambda device: host)
    p = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    p.grad = torch.ones_like(p)
    scale_(gather(in_buckets([[p]]), GRADIENT), torch.tensor([0.1], dtype=torch.float64))
    assert p.grad.tolist() == [0.1] * 3


def test_errors_are_averaged_over_the_ranks_that_have_them():
    ranks = [[0.0, 2.0, UNSEEN, -1.0, math.nan, 0.5], [UNSEEN, 4.0, UNSEEN, 0.0, 1.0, -0.5]]
    mean = _mean(sum(_summable(torch.tensor(errors)) for errors in ranks))
    assert mean[[0, 1, 3, 5]].tolist() == [0.0, 3.0, 0.0, 0.5]
    assert mean[2] < 0
    assert mean[4].isnan()


def test_norms_are_taken_without_a_read_inside_an_operator():
    _, gathered = gathered_gradients([[3, 4], [5], [6]])
    reduce_norms(gathered, 3, torch.device("cpu"))  # the offsets are made once
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        reduce_norms(gathered, 3, torch.device("cpu"))
    names = {event.name for event in trace.events()}
    assert "aten::segment_reduce" in names
    assert "aten::_local_scalar_dense" not in names


@pytest.mark.parametrize("norms", [[3e-6, 4e-6], [3.0, 4.0], [0.3, 0.4]])
def test_clipping_is_that_of_clip_grad_norm(norms):
    parameters = [torch.nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in norms]
    for p, norm in zip(parameters, norms, strict=True):
        p.grad = torch.full_like(p, norm)
    max_norm = 1e-6 if norms[0] < 1e-3 else 1.0
    torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    clip = clipped(torch.tensor(norms, dtype=torch.float64), None, max_norm).item()
    assert [clip * norm for norm in norms] == pytest.approx([p.grad.item() for p in parameters], rel=1e-9)
