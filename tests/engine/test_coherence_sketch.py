"""Gradient coherence: the cosine between a group's gradient and the last one that it had, on a sketch."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gradbalance import ConflictAwarePenalty
from gradbalance._step import sketch as sketches
from gradbalance._step.gradients import Layout
from gradbalance._step.sketch import ENTRIES, SMALL, Sketch
from gradbalance.rules import Watch
from tests.engine.models import (
    TwoBranches,
    backward,
    fixed_gradients,
    gradients,
    groups_of,
    penalised,
    slow_norm,
    train,
)

CPU = torch.device("cpu")


def watched(groups, smoothing=0.0, **options):
    """Watches groups of parameters whose gradients the tests write; they do not move."""
    members = [p for group in groups.values() for p in group]
    sgd = torch.optim.SGD(members, lr=0.0)
    return ConflictAwarePenalty(sgd, groups, Watch(), smoothing=smoothing, **options)


def zeros(*shape, dtype=torch.float32):
    return nn.Parameter(torch.zeros(*shape, dtype=dtype))


def cosine(one, other):
    one, other = one.flatten().double(), other.flatten().double()
    return torch.cosine_similarity(one, other, dim=0, eps=0.0).item()


def whole(group):
    return torch.cat([p.grad.flatten() for p in group])


# The cosine, where the sketch holds all entries.


@settings(max_examples=50)
@given(data=st.data(), scale=st.sampled_from([1e-25, 1.0, 1e25]))
def test_the_coherence_of_small_groups_is_the_cosine_with_the_last_gradient_that_they_had(
    data, scale
):
    """Against the definition in float64, at scales whose squares float32 does not have."""
    sizes = data.draw(st.lists(st.integers(1, 40), min_size=3, max_size=5))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    groups = {str(m): [zeros(n), zeros(2, n)] for m, n in enumerate(sizes)}
    optimizer = watched(groups)
    last, expected = {}, [math.nan] * len(sizes)
    for _ in range(5):
        absent = data.draw(st.sampled_from([None, *groups]))
        for name, group in groups.items():
            for p in group:
                p.grad = (
                    None if name == absent else scale * torch.randn(p.shape, generator=generator)
                )
        optimizer.step()
        for m, (name, group) in enumerate(groups.items()):
            if name == absent:
                continue
            now = torch.cat([p.grad.flatten() for p in group])
            if name in last:
                expected[m] = cosine(now, last[name])
            last[name] = now
        found = optimizer.balance.coherences.tolist()
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-12, nan_ok=True)


def test_the_coherence_is_the_running_mean_of_the_cosines(model):
    optimizer = penalised(model, Watch(), smoothing=0.5)
    last, means = {}, {}
    for step in range(5):
        backward(model, step)
        for name, module in groups_of(model).items():
            now = torch.cat([g.flatten() for g in gradients(module)])
            if name in last:
                weight = max(0.5, 1 / step)
                value = cosine(now, last[name])
                means[name] = (1 - weight) * means.get(name, 0.0) + weight * value
            last[name] = now
        optimizer.step()
        assert np.isnan(optimizer.balance.coherences).all() == (step == 0)
    assert optimizer.balance.coherences.tolist() == pytest.approx(list(means.values()), rel=1e-5)


@pytest.mark.parametrize("late", [False, True], ids=["direct", "late"])
def test_with_every_the_cosine_is_that_with_the_step_before(model, late):
    optimizer = penalised(model, Watch(), smoothing=0.0, every=3, late=late)
    flat = []
    for step in range(7):
        fixed_gradients(model, step)
        flat.append(torch.cat([g.flatten() for g in gradients(model.text)]))
        optimizer.step()
    optimizer.state_dict()
    assert optimizer.balance.coherences[0] == pytest.approx(cosine(flat[6], flat[5]), rel=1e-5)


def test_the_useful_part_is_the_cosine_times_the_share(model):
    optimizer = penalised(model, Watch(), smoothing=0.0)
    train(model, optimizer, range(4))
    balance = optimizer.balance
    assert balance.useful.tolist() == pytest.approx((balance.coherences * balance.shares).tolist())


@pytest.mark.parametrize("scale", [2.0**-40, 2.0**20])
@pytest.mark.parametrize("clips", [False, True])
def test_neither_scale_nor_clipping_changes_shares_coherences_and_useful_parts(scale, clips):
    def measured(scale, clips):
        model = TwoBranches()
        optimizer = penalised(model, Watch(), lr=0.0, smoothing=0.5)
        for step in range(4):
            backward(model, step)
            for p in model.parameters():
                p.grad *= scale
            if clips:
                nn.utils.clip_grad_norm_(model.parameters(), 1e-2 * scale)
            optimizer.step()
        balance = optimizer.balance
        return [*balance.shares, *balance.coherences, *balance.useful, *balance.useful_errors]

    assert measured(scale, clips) == pytest.approx(measured(1.0, False), rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_does_not_count_leaves_the_last_gradient(model, bad):
    optimizer = penalised(model, Watch(), lr=0.0, smoothing=0.0)
    start = copy.deepcopy(model.state_dict())
    for step in (0, 1, 0):
        backward(model, step)
        if step == 1:
            model.text.bias.grad[0] = bad
        optimizer.step()
        model.load_state_dict(start)  # an infinite gradient spoils a parameter even at lr 0
    assert optimizer.balance.coherences.tolist() == pytest.approx([1.0, 1.0])


def test_of_complex_gradients_the_real_parts_are_compared_and_the_norm_is_whole():
    groups = {name: [zeros(2, dtype=torch.complex64)] for name in ("one", "two")}
    optimizer = watched(groups)
    for imaginary in (1j, -1j):
        for (p,) in groups.values():
            p.grad = torch.tensor([3.0 + 4 * imaginary, 0.0], dtype=p.dtype)
        optimizer.step()
    assert optimizer.balance.coherences.tolist() == pytest.approx([1.0, 1.0])
    assert optimizer.balance.norms.tolist() == pytest.approx([5.0, 5.0])


def test_a_parameter_without_a_gradient_counts_as_zeros():
    groups = {"one": [zeros(3), zeros(2)], "two": [zeros(3)]}
    optimizer = watched(groups)
    for step in range(2):
        for p in (p for group in groups.values() for p in group):
            p.grad = torch.ones_like(p)
        if step == 1:
            groups["one"][1].grad = None
        optimizer.step()
    expected = 3 / math.sqrt(3 * 5)
    assert optimizer.balance.coherences.tolist() == pytest.approx([expected, 1.0])


# The sketch of larger groups.


@pytest.mark.parametrize("late", [False, True], ids=["direct", "late"])
@pytest.mark.parametrize("way", ["a step", "a copy", "a checkpoint"])
def test_in_another_order_of_the_parameters_the_cosine_is_that_with_the_last_gradient(way, late):
    generator = torch.Generator().manual_seed(0)
    groups = {name: [zeros(2, 3), zeros(3), zeros(3, 2)] for name in ("one", "two")}
    penalty = watched(groups, late=late)
    noisy_gradients(groups, generator)
    last = {name: whole(group) for name, group in groups.items()}
    penalty.step()
    penalty.param_groups[0]["params"].reverse()
    if way == "a copy":
        groups, penalty = copy.deepcopy((groups, penalty))
    if way == "a checkpoint":
        state = penalty.state_dict()
        groups = {name: [zeros(*p.shape) for p in group] for name, group in groups.items()}
        penalty = watched(groups, late=late)
        penalty.param_groups[0]["params"].reverse()
        penalty.load_state_dict(state)
    noisy_gradients(groups, generator)
    penalty.step()
    penalty.state_dict()
    expected = [cosine(whole(group), last[name]) for name, group in groups.items()]
    assert penalty.balance.coherences.tolist() == pytest.approx(expected, rel=1e-6)


def noisy_gradients(groups, generator, common=0.0):
    for p in (p for group in groups.values() for p in group):
        p.grad = (common + torch.randn(p.shape, generator=generator)).to(p.dtype)


def test_the_sketch_of_a_large_group_is_close_to_its_gradient():
    generator = torch.Generator().manual_seed(0)
    groups = {name: [zeros(300, 400) for _ in range(12)] for name in ("one", "two")}
    optimizer = watched(groups)
    common = torch.randn(300, 400, generator=generator)
    for _ in range(2):
        noisy_gradients(groups, generator, common)
        optimizer.step()
    assert optimizer.balance.coherences.tolist() == pytest.approx([0.5, 0.5], abs=0.05)


def test_small_tensors_count_in_the_sketch_by_their_size_alone():
    generator = torch.Generator().manual_seed(0)
    biases = [zeros(2000) for _ in range(7)]
    groups = {"one": [zeros(1000, 1000), *biases], "two": [zeros(3)]}
    optimizer = watched(groups)
    for _ in range(2):
        for p in (p for group in groups.values() for p in group):
            p.grad = torch.ones_like(p)
        groups["one"][0].grad = torch.randn(1000, 1000, generator=generator)
        optimizer.step()
    assert optimizer.balance.coherences.tolist() == pytest.approx([0.014, 1.0], abs=0.05)


@pytest.mark.parametrize("late", [False, True], ids=["direct", "late"])
def test_a_large_tensor_without_gradients_takes_no_entries(late):
    """An embedding that a batch does not use, a head of another task."""
    text = nn.ModuleDict({"unused": nn.Embedding(20000, 32), "used": nn.Linear(32, 1)})
    model = nn.ModuleDict({"text": text, "audio": nn.Linear(32, 1)})
    optimizer = penalised(model, Watch(), groups=dict(model), smoothing=0.0, late=late)
    flat = []
    for step in range(4):
        fixed_gradients(model, step)
        text["unused"].weight.grad = None
        flat.append(torch.cat([g.flatten() for g in gradients(text["used"])]))
        optimizer.step()
    optimizer.state_dict()
    assert optimizer.balance.coherences[0] == pytest.approx(cosine(flat[3], flat[2]), rel=1e-5)


def test_a_tensor_that_has_a_gradient_later_is_read_from_then_on():
    groups = {"one": [zeros(200, 200), zeros(8)], "two": [zeros(8)]}
    large, small = groups["one"]
    optimizer = watched(groups)
    generator = torch.Generator().manual_seed(0)
    for step in range(6):
        small.grad, groups["two"][0].grad = torch.ones(8), torch.ones(8)
        large.grad = torch.randn(200, 200, generator=generator) if step > 2 else None
        optimizer.step()
        if step == 2:
            assert optimizer.balance.coherences[0] == pytest.approx(1.0)
    assert abs(optimizer.balance.coherences[0]) < 0.1
    assert optimizer.balance.norms[0] == pytest.approx(slow_norm(large, small), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", [5, 3000], ids=["whole", "sketched"])
def test_a_checkpoint_holds_the_last_entries_exactly_and_no_more_bytes_than_they_need(dtype, size):
    groups = {name: [zeros(size, 11, dtype=dtype)] for name in ("one", "two")}
    twins = copy.deepcopy(groups)
    optimizer, resumed = watched(groups), watched(twins)
    noisy_gradients(groups, torch.Generator().manual_seed(0))
    optimizer.step()
    state = optimizer.state_dict()
    stored = min(2 * size * 11, ENTRIES) * max(dtype.itemsize, 4)  # half precision as float32
    assert len(repr(state)) < 1.4 * stored + 2000
    resumed.load_state_dict(state)
    for other, penalty in ((groups, optimizer), (twins, resumed)):
        noisy_gradients(other, torch.Generator().manual_seed(0), common=1.0)
        penalty.step()
    assert np.isfinite(resumed.balance.coherences).all()
    assert resumed.balance.coherences.tolist() == optimizer.balance.coherences.tolist()


# Which entries those are. There is no public sight of them.


def entries_of(shapes):
    """The sketch of a parameter of each shape with the gradient 1, 2, 3, ..., and its entries by group."""
    groups = [[zeros(shape) for shape in group] for group in shapes]
    parameters = [p for group in groups for p in group]
    for p in parameters:
        p.grad = torch.arange(1.0, p.numel() + 1).view(p.shape)
    group_of = {id(p): m for m, group in enumerate(groups) for p in group}
    layout = Layout([{"params": parameters}], group_of, len(groups), with_rest=False)
    sketch = Sketch(layout.members, CPU)
    sketch.take(layout.gather())
    sketch.keep(np.ones(len(groups)))
    saved = sketch.save([str(m) for m in range(len(groups))])
    rows = [sketches._unpacked(group["entries"]).tolist() for group in saved.values()]
    return groups, sketch, rows


@pytest.fixture
def thinned(monkeypatch):
    """Small gradients are sketched as large ones are."""
    monkeypatch.setattr(sketches, "SMALL", -1)


@pytest.mark.usefixtures("thinned")
def test_small_tensors_are_taken_whole_the_smallest_first():
    _, _, rows = entries_of([[(3, 4), (2,)], [(5,)]])
    assert rows == [[1, 2, *range(1, 13)], [1, 2, 3, 4, 5]]


def test_large_tensors_are_taken_on_a_regular_grid():
    side = math.isqrt(ENTRIES // 2)
    groups, _, rows = entries_of([[(8 * side, 2 * side)], [(8 * side, 8 * side)]])
    assert rows[0] == groups[0][0].grad[::4, ::4].flatten().tolist()
    assert rows[1] == groups[1][0].grad[::8, ::8].flatten().tolist()


@pytest.mark.usefixtures("thinned")
def test_what_a_small_tensor_leaves_of_the_quota_goes_to_the_others():
    quota = ENTRIES // 2
    _, _, rows = entries_of([[(4,), (quota // 2,), (6 * quota,)], [(1,)]])
    assert quota * 12 // 13 // 2 < len(rows[0]) <= quota


@settings(max_examples=30)
@given(
    shapes=st.lists(
        st.lists(st.lists(st.integers(1, 300), max_size=2), min_size=1, max_size=4),
        min_size=2,
        max_size=5,
    )
)
def test_the_sketch_holds_few_entries_and_some_of_each_group_or_all_of_a_small_model(shapes):
    groups, sketch, rows = entries_of(shapes)
    sizes = [sum(p.numel() for p in group) for group in groups]
    lengths = [len(row) for row in rows]
    assert sum(lengths) <= SMALL
    assert sketch.is_whole == (len(sizes) * max(sizes) <= SMALL)
    if sketch.is_whole:
        assert lengths == sizes
    else:
        assert sum(lengths) <= max(ENTRIES, len(shapes))
        assert all(lengths)


@pytest.mark.parametrize(
    ("groups", "tensors", "read"), [(2, 12, 16), (64, 3, 128), (43, 3, 86), (130, 2, 130)], ids=str
)
@pytest.mark.usefixtures("thinned")
def test_a_step_reads_few_tensors_and_at_least_one_of_each_group(groups, tensors, read):
    _, _, rows = entries_of([[(3,)] * tensors] * groups)
    assert sum(map(len, rows)) == 3 * read


@pytest.mark.usefixtures("thinned")
def test_the_tensors_are_spread_over_those_that_are_large_enough_or_are_the_largest():
    enough = ENTRIES // 2 // 8  # of two groups, with eight tensors of each
    small = [(enough // 2 + i,) for i in range(9)]
    large = [(enough + i,) for i in range(16)]
    _, _, rows = entries_of([[*small[:2], *large], small])
    every_second = [min(size, enough) for (size,) in large[::2]]
    assert len(rows[0]) == pytest.approx(sum(every_second), rel=0.6)
    assert len(rows[1]) == sum(size for (size,) in small[1:])


def test_the_sketch_takes_as_many_rows_of_a_matrix_as_columns():
    rows = sketches._grid(torch.zeros(1024, 1024), 1 << 14)
    assert rows.shape == (128, 128)
    assert sketches._grid(torch.zeros(1024, 4), 1 << 10).shape == (512, 2)
