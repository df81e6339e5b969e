"""Which entries of the gradients the sketch takes."""

from math import prod

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from gradbalance._sketch import Sketch, _chosen, _thinned

CPU = torch.device("cpu")


def groups_of(shapes):
    """A parameter of each shape with the gradient 1, 2, 3, ..."""
    groups = [[nn.Parameter(torch.zeros(shape)) for shape in group] for group in shapes]
    for p in (p for group in groups for p in group):
        p.grad = torch.arange(1.0, p.numel() + 1).view(p.shape)
    return groups


def test_small_tensors_are_taken_whole_group_after_group():
    groups = groups_of([[(3, 4), (2,)], [(5,)]])
    taken = Sketch(groups, CPU).take()[None]
    assert taken.tolist() == [1, 2, *range(1, 13), *range(1, 6)]  # of a group the smallest first


def test_entries_of_every_dtype_and_of_complex_numbers_the_real_parts_are_taken_in_float32():
    dtypes = (torch.float16, torch.bfloat16, torch.float64, torch.complex64)
    groups = [[nn.Parameter(torch.zeros(2, dtype=dtype))] for dtype in dtypes]
    for (p,) in groups:
        p.grad = torch.tensor([1.5, -2.0], dtype=p.dtype)
    taken = Sketch(groups, CPU).take()[None]
    assert taken.dtype == torch.float32
    assert taken.tolist() == [1.5, -2.0] * 4


def test_large_tensors_are_taken_on_a_regular_grid():
    groups = groups_of([[(1024, 256)], [(1024, 1024)]])
    expected = [groups[0][0].grad[::4, ::4].flatten(), groups[1][0].grad[::8, ::8].flatten()]
    assert torch.equal(Sketch(groups, CPU).take()[None], torch.cat(expected))


def test_what_a_small_tensor_leaves_of_the_quota_goes_to_the_others():
    sketch = Sketch(groups_of([[(4,), (8000,), (100000,)], [(1,)]]), CPU)
    shares = [prod(_thinned(p, 1 << 14)[0]) for p in groups_of([[(100000,)]])[0]]
    assert sketch.size - 1 <= 1 << 14
    assert sketch.size - 1 >= shares[0]


@pytest.mark.parametrize(
    ("groups", "tensors", "read"), [(2, 12, 16), (64, 3, 128), (43, 3, 86), (130, 2, 130)], ids=str
)
def test_a_step_reads_few_tensors_and_at_least_one_of_each_group(groups, tensors, read):
    sketch = Sketch(groups_of([[(3,)] * tensors] * groups), CPU)
    assert sum(map(len, sketch._picks.values())) == read


def test_the_tensors_are_spread_over_those_that_are_large_enough_or_are_the_largest():
    group = [torch.zeros(n) for n in (1, 5, 8, 7, 6, 2)]
    assert [p.numel() for p in _chosen(group, 2, 6)] == [6, 8]  # of 8, 7, 6 in their order the first and the last
    assert [p.numel() for p in _chosen(group, 2, 9)] == [7, 8]
    assert [p.numel() for p in _chosen(group, 3, 6)] == [6, 7, 8]


def test_a_cosine_is_taken_without_a_read_inside_an_operator():
    sketch = Sketch(groups_of([[(3,)], [(2,)]]), CPU)
    taken = sketch.take()[None]
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        sketch.cosines(taken, taken)
    names = {event.name for event in trace.events()}
    assert "aten::segment_reduce" in names
    assert "aten::_local_scalar_dense" not in names


def test_a_missing_gradient_is_taken_as_zero_and_has_no_cosine():
    groups = groups_of([[(3,)], [(2,)]])
    sketch = Sketch(groups, CPU)
    before = sketch.take()[None]
    groups[1][0].grad = None
    now = sketch.take()[None]
    assert now.tolist() == [1, 2, 3, 0, 0]
    cosines = sketch.cosines(before, now)
    assert cosines[0] == pytest.approx(1)
    assert cosines[1].isnan()
