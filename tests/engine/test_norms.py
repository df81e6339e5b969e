"""What is read of the gradients, and what is written into them: norms, scaling, clipping, noise."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.profiler import ProfilerActivity, profile

from gradbalance import ConflictAwarePenalty, attach
from gradbalance.rules import ByHand, ConflictAware, Useful, Watch
from tests.engine.models import (
    TwoBranches,
    backward,
    conflict_aware,
    equal,
    fixed_gradients,
    gradients,
    groups_of,
    penalised,
    slow_norm,
    train,
)
from tests.old_torch import needs_torch

each_mode = pytest.mark.parametrize("mode", ["update", "gradient"])
# The norms of a small model are read from its sketch, where there is one.
each_reading = pytest.mark.parametrize(
    "rule", [Watch(), ConflictAware()], ids=["with coherence", "norms alone"]
)
LARGE = 1 << 18  # larger tensors are read in parts on the host


def zeros(*shape, dtype=torch.float32):
    return nn.Parameter(torch.zeros(*shape, dtype=dtype))


def penalty_on(*groups, rule=None, **options):
    """The wrapper around an SGD that does not move the groups, called 0, 1, ..."""
    sgd = torch.optim.SGD([p for group in groups for p in group], lr=0.0)
    named = {str(m): group for m, group in enumerate(groups)}
    return ConflictAwarePenalty(sgd, named, rule or ConflictAware(), **options)


def norms_of(*groups, rule=None, gradient=torch.ones_like):
    for group in groups:
        for p in group:
            p.grad = gradient(p)
    optimizer = penalty_on(*groups, rule=rule)
    optimizer.step()
    return optimizer.balance.norms.tolist()


# Norms.


@each_reading
def test_parameters_without_a_gradient_shift_no_other_group(rule):
    groups = [[zeros(3), zeros(4)], [zeros(5), zeros(2)], [zeros(6)]]
    optimizer = penalty_on(*groups, rule=rule)
    for step in range(3):
        for group in groups:
            for i, p in enumerate(group):
                p.grad = torch.arange(1.0, p.numel() + 1) if (i + step) % 3 else None
        optimizer.step()
        expected = [slow_norm(*(p for p in group if p.grad is not None)) for group in groups]
        assert optimizer.balance.norms.tolist() == pytest.approx(expected, rel=1e-6)


@each_reading
def test_the_norm_of_a_group_spans_its_dtypes(rule):
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64)
    groups = [[zeros(2, dtype=dtype) for dtype in dtypes], [zeros(2)]]
    norms = norms_of(
        *groups,
        rule=rule,
        gradient=lambda p: torch.full_like(p, 3 + 4j if p.is_complex() else 5),
    )
    assert norms == pytest.approx([250**0.5, 50**0.5], rel=1e-6)


@each_reading
@pytest.mark.parametrize("size", [1e19, 1e-25])
def test_a_norm_neither_overflows_nor_vanishes_where_those_of_its_tensors_do_not(rule, size):
    group = [zeros(1) for _ in range(64)]
    norms = norms_of(group, [zeros(1)], rule=rule, gradient=lambda p: torch.full_like(p, size))
    assert norms == pytest.approx([8 * size, size], rel=1e-6)


@each_reading
def test_half_precision_norms_beyond_its_range_are_finite(rule):
    big, small = zeros(100, dtype=torch.float16), zeros(1)
    norms = norms_of([big], [small], rule=rule, gradient=lambda p: torch.full_like(p, 6e4))
    assert norms == pytest.approx([6e5, 6e4], rel=1e-3)


@each_reading
def test_gradients_narrower_than_their_parameters_are_summed_in_float32(rule):
    needs_torch("Tensor.grad_dtype")
    narrow, other = zeros(300, 300), zeros(1)
    narrow.grad_dtype = torch.float16
    narrow.grad = torch.full((300, 300), 300.0, dtype=torch.float16)
    other.grad = torch.ones(1)
    optimizer = penalty_on([narrow], [other], rule=rule)
    optimizer.step()
    exact = math.sqrt(300 * 300) * 300.0
    assert optimizer.balance.norms.tolist() == pytest.approx([exact, 1.0], rel=1e-4)
    assert optimizer.balance.step == 1


@each_reading
@pytest.mark.parametrize(
    "shape", [(1000, LARGE // 100), (3, 2 * LARGE), (1, 6, LARGE), (LARGE + 1,)], ids=str
)
def test_norms_of_large_tensors_keep_their_accuracy(rule, shape):
    large = zeros(*shape)
    generator = torch.Generator().manual_seed(0)
    norms = norms_of(
        [large], [zeros(1)], rule=rule, gradient=lambda p: torch.randn(p.shape, generator=generator)
    )
    assert norms[0] == pytest.approx(large.grad.double().norm().item(), rel=2e-6)


@given(
    shape=st.lists(st.integers(0, 5), min_size=0, max_size=3),
    dtype=st.sampled_from(
        [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]
    ),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    seed=st.integers(0, 99),
    rule=st.sampled_from([ByHand(**{"0": 0.5}), lambda m: [0.5, 1.0]]),
)
def test_norms_and_scaling_hold_for_any_shape_and_dtype(shape, dtype, scale, seed, rule):
    generator = torch.Generator().manual_seed(seed)
    first, second = zeros(7, dtype=dtype), zeros(shape, dtype=dtype)
    optimizer = penalty_on([first], [second], rule=rule, apply_to="gradient")
    for p in (first, second):
        p.grad = (scale * torch.randn(p.shape, generator=generator)).to(dtype)
    before = [p.grad.clone() for p in (first, second)]
    optimizer.step()
    wide = torch.complex128 if dtype.is_complex else torch.float64
    expected = [g.to(wide).abs().square().sum().sqrt().item() for g in before]
    assert optimizer.balance.norms.tolist() == pytest.approx(expected, rel=1e-5)
    for c, p, g in zip(optimizer.coefficients().values(), (first, second), before, strict=True):
        assert torch.equal(p.grad, g if c == 1 else (g.to(wide) * c).to(dtype))


@each_mode
@each_reading
@pytest.mark.parametrize("coalesced", [True, False])
def test_sparse_gradients_count_each_index_once(coalesced, mode, rule):
    embedding, other = nn.Embedding(10, 3, sparse=True), nn.Linear(3, 1)
    sgd = torch.optim.SGD([*embedding.parameters(), *other.parameters()], lr=0.1)
    groups = {"embedding": embedding, "other": other}
    constant = ByHand(embedding=0.5) if isinstance(rule, ConflictAware) else lambda m: [0.5, 1.0]
    optimizer = ConflictAwarePenalty(sgd, groups, constant, apply_to=mode)
    (10 * other(embedding(torch.tensor([1, 1, 2])))).sum().backward()
    if coalesced:
        embedding.weight.grad = embedding.weight.grad.coalesce()
    dense = embedding.weight.grad.to_dense()
    before = embedding.weight.detach().clone()
    optimizer.step()
    assert optimizer.balance.norms[0] == pytest.approx(dense.norm().item(), rel=1e-6)
    torch.testing.assert_close(embedding.weight.detach(), before - 0.1 * 0.5 * dense)


@each_mode
@pytest.mark.parametrize("write", ["data", "numpy"])
def test_gradients_written_past_the_counter_of_torch_count_every_time(model, mode, write):
    optimizer = penalised(model, ByHand(text=0.5), apply_to=mode)
    backward(model)
    for step in range(4):
        for p in model.parameters():
            if write == "data":
                p.grad.data.fill_(1.0 + step)
            else:
                p.grad.numpy()[:] = 1.0 + step
        optimizer.step()
        assert optimizer.balance.step == step + 1
        norms = [(1 + step) * math.sqrt(15), (1 + step) * math.sqrt(18)]
        assert optimizer.balance.norms.tolist() == pytest.approx(norms, rel=1e-6)
        expected = (1.0 + step) * (0.5 if mode == "gradient" else 1.0)
        assert model.text.weight.grad.unique().tolist() == [expected]


@pytest.mark.parametrize("rule", [Useful(), ConflictAware(), ByHand(text=0.5)], ids=repr)
@each_mode
@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["float", "tensor"])
def test_a_late_step_reads_no_number_inside_an_operator_and_adds_few(rule, mode, lr):
    def operators(penalises):
        model = TwoBranches()
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, foreach=True)
        if penalises:
            attach(optimizer, groups_of(model), rule, apply_to=mode, late=True)
        for step in range(3):  # tables are made once
            fixed_gradients(model, step)
            optimizer.step()
        fixed_gradients(model, 3)
        with profile(activities=[ProfilerActivity.CPU]) as trace:
            optimizer.step()
        top = [
            e.name
            for e in trace.events()
            if e.cpu_parent is None or e.cpu_parent.name[:6] != "aten::"
        ]
        return [name for name in top if name.startswith("aten::")], {e.name for e in trace.events()}

    plain, every_plain = operators(False)
    ours, every = operators(True)
    assert len(ours) - len(plain) <= 25
    if not isinstance(lr, torch.Tensor):
        assert "aten::_local_scalar_dense" not in every - every_plain


# Scaling.


def test_gradient_mode_scales_the_gradients_of_each_group_in_place_and_no_others(model):
    optimizer = penalised(model, ByHand(text=0.25), apply_to="gradient")
    backward(model)
    given = {name: gradients(m) for name, m in model.named_children()}
    objects = [p.grad for p in model.parameters()]
    versions = {
        name: [p.grad._version for p in m.parameters()] for name, m in model.named_children()
    }
    optimizer.step()
    assert all(p.grad is g for p, g in zip(model.parameters(), objects, strict=True))
    for name, module in model.named_children():
        factor = 0.25 if name == "text" else 1.0
        assert equal(gradients(module), [factor * g for g in given[name]])
        if name != "text":
            assert [p.grad._version for p in module.parameters()] == versions[name], "not written"


def test_gradients_in_double_precision_are_scaled_in_it():
    p, other = zeros(3, dtype=torch.float64), zeros(3)
    optimizer = penalty_on([p], [other], rule=ByHand(**{"0": 0.1}), apply_to="gradient")
    p.grad, other.grad = torch.ones_like(p), torch.ones_like(other)
    optimizer.step()
    assert p.grad.tolist() == [0.1] * 3


def test_in_gradient_mode_a_second_step_on_the_same_gradients_scales_them_again(model):
    """As a second ``clip_grad_norm_`` would clip again."""
    optimizer = penalised(model, ByHand(text=0.5), apply_to="gradient")
    backward(model)
    given = gradients(model.text)
    for step in range(1, 4):
        optimizer.step()
        assert equal(gradients(model.text), [0.5**step * g for g in given])
        assert optimizer.balance.step == step


@pytest.mark.parametrize("options", [{"apply_to": "gradient"}, {"max_norm": 0.01}, {"noise": 1.0}])
def test_gradients_that_cannot_be_written_are_named(model, options):
    optimizer = penalised(model, ByHand(text=0.5), **options)
    with torch.inference_mode():
        for p in model.parameters():
            p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="Got inference tensors"):
        optimizer.step()


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")
@each_mode
def test_a_gradient_with_a_graph_takes_the_factor_into_it(model, mode):
    optimizer = penalised(model, ByHand(text=0.5), apply_to=mode, max_norm=1e3)
    model(torch.ones(3, 9)).square().mean().backward(create_graph=True)
    given = model.text.weight.grad.sum().item()
    optimizer.step()
    assert model.text.weight.grad.requires_grad
    factor = 0.5 if mode == "gradient" else 1.0
    assert model.text.weight.grad.sum().item() == pytest.approx(factor * given, rel=1e-5)


# Clipping.


@each_mode
@pytest.mark.parametrize("max_norm", [1e-3, 0.5, 1e3])
@pytest.mark.parametrize("size", [1e-6, 1.0])
def test_max_norm_clips_as_clip_grad_norm_does_after_the_penalty(model, mode, max_norm, size):
    by_hand = copy.deepcopy(model)
    optimizer = penalised(model, ByHand(text=0.5), apply_to=mode, max_norm=max_norm * size)
    for m in (model, by_hand):
        fixed_gradients(m)
        for p in m.parameters():
            p.grad *= size
    optimizer.step()
    if mode == "gradient":
        for p in by_hand.text.parameters():
            p.grad *= 0.5
    nn.utils.clip_grad_norm_(by_hand.parameters(), max_norm * size)
    for p, q in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-9 * size)


# Noise.


@each_mode
def test_noise_by_name_falls_on_the_groups_that_are_named_alone(model, mode):
    optimizer = penalised(model, Watch(), apply_to=mode, noise={"audio": 1.0})
    backward(model)
    before = {name: gradients(m) for name, m in model.named_children()}
    optimizer.step()
    for name, module in model.named_children():
        assert equal(gradients(module), before[name]) is (name != "audio")


def test_noise_has_the_spread_of_each_gradient_and_is_repeatable():
    wide, narrow, pair, single = parameters = [zeros(n) for n in (20000, 20000, 2, 1)]

    def noisy(seed):
        generator = torch.Generator().manual_seed(seed)
        optimizer = penalty_on(
            [wide],
            [narrow, pair, single],
            noise=0.5,
            generator=generator,
            apply_to="gradient",
            **conflict_aware(eta=0.5),
        )
        gradient = torch.Generator().manual_seed(1)
        for p, spread in ((wide, 10.0), (narrow, 0.1)):
            p.grad = 3 + spread * torch.randn(20000, generator=gradient)
        pair.grad, single.grad = torch.tensor([1.0, 3.0]), torch.ones(1)
        clean = [p.grad.clone() for p in parameters]
        optimizer.step()
        optimizer.remove()
        c = [0.5, 1.0, 1.0, 1.0]
        return [p.grad - f * g for p, f, g in zip(parameters, c, clean, strict=True)]

    first = noisy(7)
    assert first[0].std().item() == pytest.approx(0.5 * 10.0, rel=0.05)
    assert first[1].std().item() == pytest.approx(0.5 * 0.1, rel=0.05)
    assert (first[2] != 0).all()
    assert first[3].item() == 0.0, "a single entry has no spread"
    assert equal(first, noisy(7))
    assert not torch.equal(first[0], noisy(8)[0])


@each_mode
def test_clipping_leaves_the_noise_in_proportion_to_the_gradient(model, mode):
    def noisy(noise, max_norm):
        other, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
        options = {"noise": noise, "max_norm": max_norm, "generator": generator}
        optimizer = penalised(other, ByHand(text=0.5), apply_to=mode, **options)
        train(other, optimizer, [0])
        return torch.cat([g.flatten() for g in gradients(other)])

    for noise in (0.0, 1.0):
        loose, clipped = noisy(noise, 1e9), noisy(noise, 1e-2)
        clip = 1e-2 / noisy(0.0, 1e9).norm()
        torch.testing.assert_close(clipped, loose * clip, rtol=1e-4, atol=1e-9)
    assert not torch.equal(loose, noisy(0.0, 1e9))


def test_noise_and_clipping_are_told_apart_from_what_was_measured(model):
    """The norms are those of the gradients as backward left them."""
    optimizer = penalised(model, ByHand(text=0.5), apply_to="gradient", noise=1.0, max_norm=1e-3)
    backward(model)
    expected = [slow_norm(model.text), slow_norm(model.audio)]
    optimizer.step()
    assert np.allclose(optimizer.balance.norms, expected, rtol=1e-6)
