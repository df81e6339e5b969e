"""Norms and scaling: what is read, what is written."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.profiler import ProfilerActivity, profile

from gradbalance import ConflictAwarePenalty
from gradbalance._gradients.collectives import mean_of, summable
from gradbalance._gradients.layout import CPU_PART, Layout
from gradbalance._gradients.norms import reduce_norms
from gradbalance._gradients.write import clipped, scale_
from tests.engine.models import conflict_aware


def layout_of(groups):
    parameters = [p for group in groups for p in group]
    group_of = [m for m, group in enumerate(groups) for _ in group]
    return Layout([{"params": parameters}], [group_of], len(groups), with_rest=False)


def gathered_gradients(sizes):
    groups = [[torch.nn.Parameter(torch.ones(size)) for size in group] for group in sizes]
    for p in (p for group in groups for p in group):
        p.grad = torch.arange(1.0, p.numel() + 1)
    return groups, layout_of(groups).gather()


def test_a_group_whose_factor_is_one_is_not_written_on_the_host():
    groups, gathered = gathered_gradients([[3, 4], [5], [6]])
    parameters = [p for group in groups for p in group]
    before = [p.grad._version for p in parameters]
    scale_(gathered, torch.tensor([1.0, 0.5, 1.0]))
    assert [p.grad._version - v for p, v in zip(parameters, before, strict=True)] == [0, 0, 1, 0]
    assert groups[1][0].grad.tolist() == [0.5, 1.0, 1.5, 2.0, 2.5]


@pytest.mark.parametrize("factors", [0.5, [0.5, 1.0, 0.25]])
def test_each_group_is_multiplied_by_its_factor_or_all_by_one(host, factors):
    groups, gathered = gathered_gradients([[3, 4], [], [6]])
    factors = torch.tensor(factors, dtype=torch.float64)
    scale_(gathered, factors)
    for group, factor in zip(groups, factors.expand(3).tolist(), strict=True):
        for p in group:
            assert torch.equal(p.grad, factor * torch.arange(1.0, p.numel() + 1))


def test_parameters_without_a_gradient_shift_no_other_group():
    groups, _ = gathered_gradients([[3, 4], [5, 2], [6]])
    groups[0][1].grad = groups[1][0].grad = None
    gathered = layout_of(groups).gather()
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
    norms, *_ = reduce_norms(layout_of(groups).gather(), 2, torch.device("cpu"))
    assert norms.tolist() == pytest.approx([250**0.5, 50**0.5], rel=1e-6)


def test_a_norm_does_not_overflow_where_those_of_its_tensors_do_not():
    group = [torch.nn.Parameter(torch.zeros(1)) for _ in range(64)]
    for p in group:
        p.grad = torch.full_like(p, 1e19)
    norms, *_ = reduce_norms(layout_of([group, []]).gather(), 2, torch.device("cpu"))
    assert norms.tolist() == pytest.approx([8e19, 0.0], rel=1e-6)


@pytest.mark.parametrize(("size", "parts"), [(1, 1), (5, 3)])
def test_tensors_are_taken_in_parts_where_they_are_large_and_on_the_host(host, size, parts):
    p = torch.nn.Parameter(torch.zeros(2 * size, CPU_PART // 4))
    p.grad = torch.ones_like(p)
    gathered = layout_of([[p]]).gather()
    reduce_norms(gathered, 1, torch.device("cpu"))
    assert gathered[0].bucket._counts == [parts if host else 1]


@pytest.mark.parametrize("shape", [(3, 2 * CPU_PART), (1, 16, 2 * CPU_PART)])
def test_long_rows_are_taken_in_parts_too(shape):
    p = torch.nn.Parameter(torch.zeros(shape))
    p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    norms, *_ = reduce_norms(layout_of([[p]]).gather(), 1, torch.device("cpu"))
    assert norms.item() == pytest.approx(p.grad.double().norm().item(), rel=5e-6)


def test_gradients_in_double_precision_are_scaled_in_it(host):
    p = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    p.grad = torch.ones_like(p)
    scale_(layout_of([[p]]).gather(), torch.tensor([0.1], dtype=torch.float64))
    assert p.grad.tolist() == [0.1] * 3


def test_errors_are_averaged_over_the_ranks_that_have_them():
    ranks = [[0.0, 2.0, -1.0, -1.0, math.nan, 0.5], [-1.0, 4.0, -1.0, 0.0, 1.0, -0.5]]
    mean = mean_of(sum(summable(torch.tensor(errors)) for errors in ranks))
    assert mean[[0, 1, 3, 5]].tolist() == [0.0, 3.0, 0.0, 0.5]
    assert mean[2] < 0
    assert mean[4].isnan()


def test_norms_are_taken_without_a_read_inside_an_operator():
    _, gathered = gathered_gradients([[3, 4], [5], [6]])
    reduce_norms(gathered, 3, torch.device("cpu"))  # the table is made once
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        reduce_norms(gathered, 3, torch.device("cpu"))
    names = {event.name for event in trace.events()}
    assert "aten::_foreach_norm" in names
    assert "aten::_local_scalar_dense" not in names


@pytest.mark.parametrize("norms", [[3e-6, 4e-6], [3.0, 4.0], [0.3, 0.4]])
def test_clipping_is_that_of_clip_grad_norm(norms):
    parameters = [torch.nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in norms]
    for p, norm in zip(parameters, norms, strict=True):
        p.grad = torch.full_like(p, norm)
    max_norm = 1e-6 if norms[0] < 1e-3 else 1.0
    torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    clip = clipped(torch.tensor(norms, dtype=torch.float64), None, max_norm)[1].item()
    assert [clip * norm for norm in norms] == pytest.approx([p.grad.item() for p in parameters], rel=1e-9)


@given(
    shape=st.lists(st.integers(0, 5), min_size=0, max_size=3),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    seed=st.integers(0, 99),
)
def test_norms_and_scaling_hold_for_any_shape_and_dtype(shape, dtype, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    first, second = (nn.Parameter(torch.zeros(shape if i else (7,), dtype=dtype)) for i in (0, 1))
    optimizer = ConflictAwarePenalty(
        torch.optim.SGD([first, second], lr=0.0),
        {"first": [first], "second": [second]},
        apply_to="gradient",
        **conflict_aware(eta=0.5),
    )
    for p in (first, second):
        p.grad = (scale * torch.randn(p.shape, generator=generator)).to(dtype)
    before = [p.grad.clone() for p in (first, second)]
    optimizer.step()
    wide = torch.complex128 if dtype.is_complex else torch.float64
    expected = [g.to(wide).abs().square().sum().sqrt().item() for g in before]
    assert optimizer.balance.norms.tolist() == pytest.approx(expected, rel=1e-5)
    for c, p, g in zip(optimizer.coefficients().values(), (first, second), before, strict=True):
        assert torch.equal(p.grad, g if c == 1 else (g.to(wide) * c).to(dtype))


def test_half_precision_norms_beyond_its_range_are_finite():
    big, small = nn.Parameter(torch.zeros(100, dtype=torch.float16)), nn.Parameter(torch.zeros(1))
    optimizer = ConflictAwarePenalty(torch.optim.SGD([big, small], lr=0.0), {"big": [big], "small": [small]})
    big.grad, small.grad = torch.full_like(big, 6e4), torch.ones(1)
    optimizer.step()
    assert optimizer.balance.norms[0].item() == pytest.approx(6e5, rel=1e-3)


def test_norms_of_large_tensors_keep_their_accuracy():
    large, other = nn.Parameter(torch.zeros(1000, CPU_PART // 100)), nn.Parameter(torch.zeros(1))
    optimizer = ConflictAwarePenalty(torch.optim.SGD([large, other], lr=0.0), {"large": [large], "other": [other]})
    large.grad = torch.randn(large.shape, generator=torch.Generator().manual_seed(0))
    other.grad = torch.ones(1)
    optimizer.step()
    assert optimizer.balance.norms[0].item() == pytest.approx(large.grad.double().norm().item(), rel=2e-6)


@pytest.mark.parametrize("coalesced", [True, False])
@pytest.mark.parametrize("mode", ["update", "gradient"])
def test_sparse_gradients_count_each_index_once(coalesced, mode):
    embedding, other = nn.Embedding(10, 3, sparse=True), nn.Linear(3, 1)
    optimizer = ConflictAwarePenalty(
        torch.optim.SGD([*embedding.parameters(), *other.parameters()], lr=0.1),
        {"embedding": embedding, "other": other},
        apply_to=mode,
        **conflict_aware(eta=0.5),
    )
    (10 * other(embedding(torch.tensor([1, 1, 2])))).sum().backward()
    if coalesced:
        embedding.weight.grad = embedding.weight.grad.coalesce()
    dense = embedding.weight.grad.to_dense()
    before = embedding.weight.detach().clone()
    optimizer.step()
    assert optimizer.balance.norms[0].item() == pytest.approx(dense.norm().item(), rel=1e-6)
    c = optimizer.coefficients()["embedding"]
    torch.testing.assert_close(embedding.weight.detach(), before - 0.1 * c * dense)
