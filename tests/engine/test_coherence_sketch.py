"""Gradient coherence: which entries of the gradients are sketched, and the cosine between successive ones."""

import copy
import math
from base64 import b64decode
from math import isqrt, prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.profiler import ProfilerActivity, profile

from gradbalance import ConflictAwarePenalty, attach
from gradbalance._gradients import coherence
from gradbalance._gradients.coherence import ENTRIES, Sketch, _chosen, _thinned
from gradbalance.rules import ConflictAware, Watch
from tests.engine.models import TwoBranches, backward, gradients, groups_of

CPU = torch.device("cpu")


def groups_with(shapes):
    """A parameter of each shape with the gradient 1, 2, 3, ..."""
    groups = [[nn.Parameter(torch.zeros(shape)) for shape in group] for group in shapes]
    for p in (p for group in groups for p in group):
        p.grad = torch.arange(1.0, p.numel() + 1).view(p.shape)
    return groups


@pytest.fixture
def thinned(monkeypatch):
    """Small gradients are sketched as large ones are."""
    monkeypatch.setattr(coherence, "SMALL", -1)


def taken(sketch):
    """The entries of each group without the zeros after them."""
    return [row[: row.nonzero().max() + 1].tolist() for row in sketch.take()[None]]


def watched(parameters, groups, **options):
    return ConflictAwarePenalty(torch.optim.SGD(parameters, lr=0.0), groups, Watch(), **options)


@pytest.mark.usefixtures("thinned")
def test_small_tensors_are_taken_whole_the_smallest_first():
    groups = groups_with([[(3, 4), (2,)], [(5,)]])
    assert taken(Sketch(groups, CPU)) == [[1, 2, *range(1, 13)], [1, 2, 3, 4, 5]]


def test_entries_of_every_dtype_and_of_complex_numbers_the_real_parts_are_taken_in_float64():
    dtypes = (torch.float16, torch.bfloat16, torch.float64, torch.complex64)
    groups = [[nn.Parameter(torch.zeros(2, dtype=dtype))] for dtype in dtypes]
    for (p,) in groups:
        p.grad = torch.tensor([1.5, -2.0], dtype=p.dtype)
    entries = Sketch(groups, CPU).take()[None]
    assert entries.dtype == torch.float64
    assert entries.tolist() == [[1.5, -2.0, *[0.0] * 6]] * 4


def test_large_tensors_are_taken_on_a_regular_grid():
    side = isqrt(ENTRIES // 2)
    groups = groups_with([[(8 * side, 2 * side)], [(8 * side, 8 * side)]])
    expected = [groups[0][0].grad[::4, ::4], groups[1][0].grad[::8, ::8]]
    for row, entries in zip(Sketch(groups, CPU).take()[None], expected, strict=True):
        assert torch.equal(row, entries.flatten().double())


@pytest.mark.usefixtures("thinned")
def test_what_a_small_tensor_leaves_of_the_quota_goes_to_the_others():
    quota = ENTRIES // 2
    groups = groups_with([[(4,), (quota // 2,), (6 * quota,)], [(1,)]])
    alone = prod(_thinned(torch.zeros(6 * quota), quota * 12 // 13).shape)
    length, _ = map(len, taken(Sketch(groups, CPU)))
    assert alone <= length <= quota


@given(
    shapes=st.lists(st.lists(st.lists(st.integers(1, 300), max_size=2), min_size=1, max_size=4), min_size=2, max_size=5)
)
def test_the_sketch_holds_few_entries_and_some_of_each_group_or_all_of_a_small_model(shapes):
    groups = groups_with(shapes)
    sketch = Sketch(groups, CPU)
    entries = sketch.take()[None]
    sizes = [sum(p.numel() for p in group) for group in groups]
    assert sketch.is_whole == (len(sizes) * max(sizes) <= coherence.SMALL)
    if sketch.is_whole:
        assert (entries != 0).sum(1).tolist() == sizes
        assert sketch._pairs.nbytes < 600_000
    else:
        assert (entries != 0).sum() <= max(ENTRIES, len(shapes))
    assert entries.any(1).all()


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25], ids=str)
@given(data=st.data())
def test_lengths_and_cosines_are_those_of_the_entries(scale, data):
    """Against the definition in float64, at scales whose squares float32 does not have."""
    sizes = data.draw(st.lists(st.integers(1, 40), min_size=2, max_size=4))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    groups = [[nn.Parameter(torch.zeros(n))] for n in sizes]
    sketch = Sketch(groups, CPU)
    last = [None] * len(sizes)
    for _ in range(4):
        for (p,) in groups:
            p.grad = scale * torch.randn(p.shape, generator=generator)
        now = [p.grad.double() for (p,) in groups]
        sketch.take()
        lengths, cosines = sketch.compare()
        assert lengths == pytest.approx([float(g.norm()) for g in now], rel=1e-12)
        for cosine, g, before in zip(cosines, now, last, strict=True):
            if before is None:
                assert math.isnan(cosine)
            else:
                assert cosine == pytest.approx(float(g @ before / g.norm() / before.norm()), rel=1e-9, abs=1e-12)
        counts = data.draw(st.booleans())
        sketch.keep(counts)
        last = now if counts else last


def test_the_entries_of_a_checkpoint_are_those_that_were_kept():
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 4), (torch.float64, 8)):
        groups = [[nn.Parameter(torch.zeros(n, dtype=dtype))] for n in (5, 3)]
        one, other = Sketch(groups, CPU), Sketch(groups, CPU)
        for _ in range(2):
            for (p,) in groups:
                p.grad = torch.randn_like(p)
            one.take()
            one.compare()
            one.keep(True)
        packed = one.packed(("a", "b"))
        assert len(b64decode(packed["entries"]["a"])) == 5 * size
        other.unpack(("a", "b"), packed)
        assert other._now == one._now
        assert all(map(torch.equal, other._last(), one._last()))
        other.unpack(("b", "a"), packed)
        assert all(row.isnan().all() for row in other._last()), "of another length they are not known"


@pytest.mark.parametrize(
    ("groups", "tensors", "read"), [(2, 12, 16), (64, 3, 128), (43, 3, 86), (130, 2, 130)], ids=str
)
@pytest.mark.usefixtures("thinned")
def test_a_step_reads_few_tensors_and_at_least_one_of_each_group(groups, tensors, read):
    sketch = Sketch(groups_with([[(3,)] * tensors] * groups), CPU)
    assert len(sketch._picks) == read


def test_the_tensors_are_spread_over_those_that_are_large_enough_or_are_the_largest():
    group = [torch.zeros(n) for n in (1, 5, 8, 7, 6, 2)]
    assert [p.numel() for p in _chosen(group, 2, 6)] == [6, 8]  # of 8, 7, 6 in their order the first and the last
    assert [p.numel() for p in _chosen(group, 2, 9)] == [7, 8]
    assert [p.numel() for p in _chosen(group, 3, 6)] == [6, 7, 8]


def test_the_sketch_takes_as_many_rows_of_a_matrix_as_columns():
    assert _thinned(torch.zeros(1024, 1024), 1 << 14).shape == (128, 128)
    assert _thinned(torch.zeros(1024, 4), 1 << 10).shape == (512, 2)


@pytest.mark.usefixtures("off_host")
def test_a_cosine_is_taken_without_a_read_inside_an_operator():
    sketch = Sketch(groups_with([[(3,)], [(2,)]]), CPU)
    sketch.take()
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        sketch.compare()
    names = {event.name for event in trace.events()}
    assert "aten::linalg_vector_norm" in names
    assert "aten::_local_scalar_dense" not in names


def test_a_missing_gradient_is_taken_as_zero_and_has_no_cosine():
    groups = groups_with([[(3,)], [(2,)]])
    sketch = Sketch(groups, CPU)
    sketch.take()
    sketch.compare()
    sketch.keep(True)
    groups[1][0].grad = None
    assert sketch.take()[None].tolist() == [[1, 2, 3, *[0] * 5], [0] * 8]
    lengths, cosines = sketch.compare()
    assert lengths[1] == 0
    assert cosines[0] == pytest.approx(1)
    assert math.isnan(cosines[1])


def test_the_coherence_is_the_running_cosine_of_successive_gradients_of_small_groups(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    penalty = attach(optimizer, groups_of(model), Watch(), smoothing=0.5)
    last, expected = None, {}
    for step in range(4):
        backward(model, step)
        flat = {name: torch.cat([g.flatten() for g in gradients(getattr(model, name))]) for name in ("text", "audio")}
        for name, g in flat.items():
            if last is not None:
                cosine = torch.cosine_similarity(g, last[name], dim=0).item()
                expected[name] = 0.5 * expected.get(name, cosine) + 0.5 * cosine
        last = flat
        optimizer.step()
        assert penalty.balance.coherences.isnan().all().item() is (step == 0)
    assert penalty.balance.coherences.tolist() == pytest.approx(list(expected.values()), rel=1e-5)


def test_the_sketch_of_a_large_group_is_close_to_its_gradient():
    generator = torch.Generator().manual_seed(0)
    groups = {name: [nn.Parameter(torch.zeros(300, 400)) for _ in range(12)] for name in ("one", "two")}
    parameters = [*groups["one"], *groups["two"]]
    penalty = watched(parameters, groups, smoothing=0.0)
    common = torch.randn(300, 400, generator=generator)
    for _ in range(2):
        for p in parameters:
            p.grad = common + torch.randn(300, 400, generator=generator)
        penalty.step()
    assert penalty.balance.coherences.tolist() == pytest.approx([0.5, 0.5], abs=0.05)


def test_small_tensors_count_in_the_sketch_by_their_size_alone():
    generator = torch.Generator().manual_seed(0)
    biases = [nn.Parameter(torch.zeros(2000)) for _ in range(7)]
    groups = {"one": [nn.Parameter(torch.zeros(1000, 1000)), *biases], "two": [nn.Parameter(torch.zeros(3))]}
    parameters = [*groups["one"], *groups["two"]]
    penalty = watched(parameters, groups, smoothing=0.0)
    for _ in range(2):
        for p in parameters:
            p.grad = torch.ones_like(p)
        parameters[0].grad = torch.randn(1000, 1000, generator=generator)
        penalty.step()
    assert penalty.balance.coherences.tolist() == pytest.approx([0.014, 1.0], abs=0.05)


@pytest.mark.usefixtures("host")
def test_a_step_that_does_not_count_leaves_the_sketch(model):
    penalty = watched(model.parameters(), groups_of(model), smoothing=0.0)
    start = copy.deepcopy(model.state_dict())
    for step, bad in ((0, False), (1, True), (0, False)):
        backward(model, step)
        if bad:
            model.text.bias.grad[0] = math.inf
        penalty.step()
        model.load_state_dict(start)  # an infinite gradient spoils a parameter even at lr 0
    assert penalty.balance.coherences.tolist() == pytest.approx([1.0, 1.0])


def test_a_rule_that_needs_no_coherence_has_no_sketch(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    penalty = attach(optimizer, groups_of(model), ConflictAware())
    for step in range(2):
        backward(model, step)
        optimizer.step()
    assert penalty._engine._meter._sketch is None
    assert penalty.balance.coherences.isnan().all()


def test_the_norm_of_a_gradient_is_nothing_to_its_coherence():
    def coherences(scale):
        model = TwoBranches()
        penalty = watched(model.parameters(), groups_of(model), smoothing=0.0)
        for step in range(2):
            backward(model, step)
            for p in model.parameters():
                p.grad *= scale * (step + 1)
            penalty.step()
        return penalty.balance.coherences

    torch.testing.assert_close(coherences(2.0**-40), coherences(1.0), rtol=1e-6, atol=0)
