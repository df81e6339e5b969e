"""The penalty on an optimizer in a plain loop: what is scaled, by how much, and what is left alone."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gradbalance import PAPER, ConflictAwarePenalty, _observed, attach
from gradbalance._buckets import CPU_PART
from gradbalance._memory import KEYS, Memory
from gradbalance._settings import Settings
from gradbalance._sketch import ENTRIES, _thinned
from tests.reference import ReferenceRule

PLAIN_RULE = {"threshold": 1.0, "smoothing": 0.0, "agreement": None, "max_coefficient": 1.0}


class TwoBranches(nn.Module):
    """Two encoders of unequal strength and a head that belongs to no group."""

    def __init__(self):
        super().__init__()
        self.text, self.audio, self.head = nn.Linear(4, 3), nn.Linear(5, 3), nn.Linear(3, 1)

    def forward(self, batch):
        return self.head(torch.tanh(self.text(batch[:, :4]) * 3) + torch.tanh(self.audio(batch[:, 4:])))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return TwoBranches()


def groups_of(model):
    return {"text": model.text, "audio": model.audio}


def backward(model, step=0):
    model.zero_grad()
    batch = torch.randn(16, 9, generator=torch.Generator().manual_seed(step))
    loss = (model(batch) - 1).square().mean()
    loss.backward()
    return loss


def gradients(module):
    return [p.grad.clone() for p in module.parameters()]


def slow_norm(module):
    return math.sqrt(sum(float((p.grad.double() ** 2).sum()) for p in module.parameters()))


def test_gradient_mode_scales_the_gradients_of_each_group_in_place(model):
    optimizer = ConflictAwarePenalty(
        torch.optim.SGD(model.parameters(), lr=0.1), groups_of(model), eta=0.25, apply_to="gradient", **PLAIN_RULE
    )
    backward(model)
    before = {name: gradients(m) for name, m in model.named_children()}
    optimizer.step()
    c = optimizer.coefficients()
    assert sorted(c.values()) == [0.25, 1.0]
    for name, module in model.named_children():
        factor = c.get(name, 1.0)
        assert all(torch.equal(p.grad, factor * g) for p, g in zip(module.parameters(), before[name], strict=True))


@pytest.mark.parametrize(
    ("make", "mode", "raised"),
    [
        (torch.optim.SGD, "update", 2.0),
        (torch.optim.SGD, "gradient", 1.0),
        (torch.optim.AdamW, "update", 1.0),
        (torch.optim.AdamW, "gradient", 1.0),
    ],
)
def test_by_default_learning_rates_rise_where_steps_are_as_long_as_gradients(model, make, mode, raised):
    optimizer = make(model.parameters(), lr=0.1)
    penalty = attach(optimizer, groups_of(model), eta=0.5, agreement=None, apply_to=mode)
    backward(model)
    for p in model.text.parameters():
        p.grad *= 100
    optimizer.step()
    assert max(penalty.coefficients().values()) == raised
    assert penalty.settings.max_coefficient == (20 if raised > 1 else 1)
    penalty.remove()
    explicit = attach(optimizer, groups_of(model), max_coefficient=7.0, apply_to=mode)
    assert explicit.settings.max_coefficient == 7.0


@pytest.mark.parametrize("mode", ["update", "gradient"])
@pytest.mark.parametrize("observed", [False, True])
def test_a_run_equals_plain_sgd_with_coefficients_by_hand(model, mode, observed):
    other, options = (
        copy.deepcopy(model),
        {"eta": 0.3, "threshold": 1.2, "smoothing": 0.5, "agreement": None, "max_coefficient": 1.0},
    )
    optimizer = ConflictAwarePenalty(
        torch.optim.SGD(model.parameters(), lr=0.05), groups_of(model), apply_to=mode, **options
    )
    plain, rule = torch.optim.SGD(other.parameters(), lr=0.05), ReferenceRule(Settings(**options))
    for step in range(10):
        errors = [0.5 + 0.1 * step, 1.0] if observed else None
        backward(model, step)
        if observed:
            optimizer.observe(text=errors[0] - 0.1, audio=torch.tensor(1.25))
            optimizer.observe(text=errors[0] + 0.1, audio=0.75)
        optimizer.step()
        backward(other, step)
        expected = rule.step([slow_norm(other.text), slow_norm(other.audio)], errors)
        assert list(optimizer.coefficients().values()) == pytest.approx(expected, rel=1e-6)
        for module, c in zip((other.text, other.audio), expected, strict=True):
            for p in module.parameters():
                p.grad *= c
        plain.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["update", "gradient"])
@pytest.mark.parametrize("layout", ["one param_group", "one per module", "interleaved"])
def test_any_layout_of_param_groups_gives_the_same_run(model, mode, layout):
    def run(model, parameters):
        optimizer = ConflictAwarePenalty(
            torch.optim.AdamW(parameters, lr=0.01), groups_of(model), apply_to=mode, **PLAIN_RULE
        )
        for step in range(5):
            backward(model, step)
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    other = copy.deepcopy(model)
    parameters = {
        "one param_group": list(other.parameters()),
        "one per module": [{"params": m.parameters()} for m in other.children()],
        "interleaved": [{"params": list(other.parameters())[i::2]} for i in (0, 1)],
    }[layout]
    assert all(map(torch.equal, run(model, list(model.parameters())), run(other, parameters)))


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")
def test_the_balance_holds_no_graph_of_the_gradients(model):
    optimizer = ConflictAwarePenalty(torch.optim.SGD(model.parameters(), lr=0.1), groups_of(model), max_norm=1.0)
    for step in range(2):
        model.zero_grad()
        batch = torch.randn(16, 9, generator=torch.Generator().manual_seed(step))
        model(batch).square().mean().backward(create_graph=True)
        optimizer.step()
    assert model.text.weight.grad.requires_grad
    assert not any(part.requires_grad for part in optimizer.balance[:-1])


def test_weight_decay_that_is_decoupled_is_scaled_in_update_mode(model):
    optimizer = ConflictAwarePenalty(
        torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5, eps=1e30),
        groups_of(model),
        eta=0.5,
        **PLAIN_RULE,
    )  # an eps this large leaves nothing of the step but the decay
    before = {name: m.weight.detach().clone() for name, m in model.named_children()}
    backward(model)
    optimizer.step()
    for name, c in optimizer.coefficients().items():
        torch.testing.assert_close(getattr(model, name).weight.detach(), before[name] * (1 - c * 0.1 * 0.5))


@pytest.mark.parametrize("mode", ["update", "gradient"])
@pytest.mark.parametrize("norm", ["l2", "rms", "relative"])
def test_every_norm_is_the_one_of_its_definition(model, mode, norm):
    penalty = attach(torch.optim.SGD(model.parameters(), lr=0.1), groups_of(model), norm=norm, apply_to=mode)
    backward(model)
    expected = []
    for module in (model.text, model.audio):
        divisor = {
            "l2": 1.0,
            "rms": math.sqrt(sum(p.numel() for p in module.parameters())),
            "relative": math.sqrt(sum(float(p.detach().double().square().sum()) for p in module.parameters())),
        }[norm]
        expected.append(slow_norm(module) / divisor)
    penalty._stepper.step()
    assert penalty.balance.norms.tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("mode", ["update", "gradient"])
@pytest.mark.parametrize("max_norm", [1e-3, 1e3])
def test_max_norm_clips_as_clip_grad_norm_does_after_the_penalty(model, mode, max_norm):
    clipped, by_hand = model, copy.deepcopy(model)
    options = {"eta": 0.5, "apply_to": mode, **PLAIN_RULE}
    optimizer = attach(torch.optim.SGD(clipped.parameters(), lr=0.1), groups_of(clipped), max_norm=max_norm, **options)
    backward(clipped)
    optimizer._stepper.step()
    backward(by_hand)
    if mode == "gradient":
        for name, c in optimizer.coefficients().items():
            for p in getattr(by_hand, name).parameters():
                p.grad *= c
    nn.utils.clip_grad_norm_(by_hand.parameters(), max_norm)
    for p, q in zip(clipped.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("mode", ["update", "gradient"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_freezes_the_penalty_and_spreads_nowhere(model, mode, bad, noise):
    optimizer = ConflictAwarePenalty(
        torch.optim.SGD(model.parameters(), lr=0.1),
        groups_of(model),
        apply_to=mode,
        noise=noise,
        max_norm=1.0,
        **PLAIN_RULE,
    )
    backward(model)
    optimizer.step()
    state = optimizer.state_dict()["param_groups"][0]
    backward(model, 1)
    model.text.bias.grad[0] = bad
    before = gradients(model)
    optimizer.step()
    assert set(optimizer.coefficients().values()) == {1.0}
    assert optimizer.state_dict()["param_groups"][0] == state
    for p, g in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("mode", ["update", "gradient"])
def test_watching_writes_nothing(model, mode):
    other = copy.deepcopy(model)
    plain = torch.optim.AdamW(other.parameters(), lr=0.01)
    optimizer = ConflictAwarePenalty(
        torch.optim.AdamW(model.parameters(), lr=0.01), groups_of(model), eta=1, alpha=0, apply_to=mode, threshold=1.0
    )
    for step in range(10):
        backward(model, step)
        versions = [p.grad._version for p in model.parameters()]
        optimizer.step()
        assert [p.grad._version for p in model.parameters()] == versions
        backward(other, step)
        plain.step()
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    assert optimizer.balance.step == 10
    assert optimizer.balance.norms.gt(0).all()


@pytest.mark.parametrize("mode", ["update", "gradient"])
def test_outside_the_window_the_run_is_bitwise_the_plain_one(model, mode):
    other = copy.deepcopy(model)
    optimizer = ConflictAwarePenalty(
        torch.optim.SGD(model.parameters(), lr=0.01),
        groups_of(model),
        apply_to=mode,
        window=(2, 4),
        noise=1.0,
        **PLAIN_RULE,
    )
    plain = torch.optim.SGD(other.parameters(), lr=0.01)
    for step in range(6):
        equal = all(map(torch.equal, model.parameters(), other.parameters()))
        assert equal is (step <= 2)
        assert (min(optimizer.coefficients().values()) < 1) is (step in (3, 4))
        backward(model, step)
        optimizer.step()
        backward(other, step)
        plain.step()


def test_parameters_of_no_group_are_bitwise_those_of_the_plain_optimizer(model):
    other = copy.deepcopy(model)
    optimizer = ConflictAwarePenalty(torch.optim.Adam(model.parameters(), lr=0.1), groups_of(model), **PLAIN_RULE)
    backward(model)
    optimizer.step()
    assert min(optimizer.coefficients().values()) < 1
    backward(other)
    torch.optim.Adam(other.parameters(), lr=0.1).step()
    assert all(map(torch.equal, model.head.parameters(), other.head.parameters()))


def test_noise_has_the_spread_of_each_gradient_and_is_repeatable():
    wide, narrow, pair, single = parameters = [nn.Parameter(torch.zeros(n)) for n in (20000, 20000, 2, 1)]

    def noisy(seed):
        optimizer = ConflictAwarePenalty(
            torch.optim.SGD(parameters, lr=0.0),
            {"wide": [wide], "narrow": [narrow, pair, single]},
            noise=0.5,
            generator=torch.Generator().manual_seed(seed),
            apply_to="gradient",
            eta=0.5,
            **PLAIN_RULE,
        )
        generator = torch.Generator().manual_seed(1)
        for p, spread in ((wide, 10.0), (narrow, 0.1)):
            p.grad = 3 + spread * torch.randn(20000, generator=generator)
        pair.grad, single.grad = torch.tensor([1.0, 3.0]), torch.ones(1)
        clean = [p.grad.clone() for p in parameters]
        optimizer.step()
        c = [0.5, 1.0, 1.0, 1.0]
        return [p.grad - f * g for p, f, g in zip(parameters, c, clean, strict=True)]

    first = noisy(7)
    assert first[0].std().item() == pytest.approx(0.5 * 10.0, rel=0.05)
    assert first[1].std().item() == pytest.approx(0.5 * 0.1, rel=0.05)
    assert (first[2] != 0).all()
    assert first[3].item() == 0.0
    assert all(map(torch.equal, first, noisy(7)))
    assert not torch.equal(first[0], noisy(8)[0])


def test_the_settings_of_the_paper_run(model):
    optimizer = ConflictAwarePenalty(torch.optim.AdamW(model.parameters(), lr=1e-3), groups_of(model), **PAPER)
    backward(model)
    optimizer.observe(text=0.5, audio=1.0)
    optimizer.step()
    assert optimizer.coefficients()["text"] <= 1 - math.tanh(1)
    assert optimizer.coefficients()["audio"] == 1


def test_a_second_step_on_the_same_gradients_does_not_compound(model):
    optimizer = ConflictAwarePenalty(
        torch.optim.SGD(model.parameters(), lr=0.1), groups_of(model), apply_to="gradient", **PLAIN_RULE
    )
    backward(model)
    optimizer.step()
    before = gradients(model)
    optimizer.step()
    assert all(map(torch.equal, gradients(model), before))
    backward(model)
    optimizer.step()
    assert optimizer.balance.step == 2


def test_gradients_that_the_step_itself_wrote_are_not_taken_for_new_ones(model):
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    inner.register_step_post_hook(lambda optimizer, *_: [p.grad.mul_(0.5) for p in model.parameters()])
    optimizer = ConflictAwarePenalty(inner, groups_of(model), apply_to="gradient", **PLAIN_RULE)
    backward(model)
    optimizer.step()
    before = gradients(model)
    optimizer.step()
    assert all(g.equal(0.5 * old) for g, old in zip(gradients(model), before, strict=True))
    assert optimizer.balance.step == 1


def test_a_step_that_failed_before_the_penalty_acted_is_made_good(model):
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = ConflictAwarePenalty(inner, groups_of(model), apply_to="gradient", eta=0.5, **PLAIN_RULE)
    backward(model)
    optimizer.step()
    backward(model, 1)
    before, parameters = gradients(model), inner.param_groups[0]["params"]
    inner.param_groups[0]["params"] = parameters[:1]
    with pytest.raises(RuntimeError, match="Got other parameters"):
        optimizer.step()
    assert all(map(torch.equal, gradients(model), before))
    inner.param_groups[0]["params"] = parameters
    optimizer.step()
    assert optimizer.coefficients()["text"] == 0.5
    assert all(g.equal(0.5 * old) for g, old in zip(gradients(model.text), before, strict=False))


def test_learning_rates_are_restored_after_a_step_that_raised(model):
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = ConflictAwarePenalty(inner, groups_of(model), eta=0.1, **PLAIN_RULE)
    seen = []

    def fail(*_):
        seen.extend(group["lr"] for group in inner.param_groups)
        raise MemoryError

    handle = inner.register_step_pre_hook(fail)
    param_groups = inner.param_groups
    backward(model)
    with pytest.raises(MemoryError):
        optimizer.step()
    assert sorted(seen) == pytest.approx([0.01, 0.1, 0.1])
    assert inner.param_groups is param_groups
    assert [group["lr"] for group in param_groups] == [0.1]
    handle.remove()
    optimizer.step()


@pytest.mark.parametrize("first", ["text", "audio"])
@pytest.mark.parametrize("lr", [0.5, torch.tensor(0.5)], ids=["float", "tensor"])
def test_what_the_step_writes_into_its_param_group_stays_as_without_the_penalty(model, lr, first):
    class Counting(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                group["count"], group["used"] = group.get("count", 0) + 1, float(group["lr"])
            return super().step(closure)

    groups = dict(sorted(groups_of(model).items(), key=lambda item: item[0] != first))
    optimizer = ConflictAwarePenalty(Counting(model.parameters(), lr=lr), groups, **PLAIN_RULE)
    for step in range(3):
        backward(model, step)
        optimizer.step()
    assert min(optimizer.coefficients().values()) < 1
    assert optimizer.param_groups[0]["count"] == 3
    assert optimizer.param_groups[0]["used"] == 0.5
    assert optimizer.balance.step == 3


class Showing(torch.optim.SGD):
    """Writes into its param_groups, as schedule-free optimizers do, what depends on their learning rates."""

    def step(self, closure=None):
        self.shown = [group["lr"] for group in self.param_groups]
        for group in self.param_groups:
            group["used"] = group["lr"]
        return super().step(closure)


@pytest.mark.parametrize("order", [("text", "audio"), ("audio", "text")])
def test_what_the_step_of_the_least_damped_group_writes_stays_where_all_are_in_groups(model, order):
    groups = {name: groups_of(model)[name] for name in order}
    inner = Showing([p for group in groups.values() for p in group.parameters()], lr=0.5)
    optimizer = ConflictAwarePenalty(inner, groups, eta=0.5, **PLAIN_RULE)
    backward(model)
    optimizer.step()
    assert sorted(inner.shown) == [0.25, 0.5]
    assert inner.param_groups[0]["used"] == 0.5


def test_a_step_in_which_no_group_is_damped_sees_the_param_groups_themselves(model):
    inner = Showing(model.parameters(), lr=0.5)
    optimizer = ConflictAwarePenalty(inner, groups_of(model), window=(1, 2), **PLAIN_RULE)
    shown = []
    for step in range(3):
        backward(model, step)
        optimizer.step()
        shown.append(len(inner.shown))
    assert shown == [1, 3, 1]


@pytest.mark.parametrize("by_name", [False, True])
def test_a_step_gets_all_that_it_is_given_beside_the_closure(model, by_name):
    class Repeating(torch.optim.SGD):
        def step(self, closure=None, times=1, lr=0.1):
            self.given = times, lr
            return super().step(closure)

    inner = Repeating(model.parameters(), lr=0.1)
    penalty = attach(inner, groups_of(model))
    if by_name:
        inner.step(closure=lambda: backward(model), times=2, lr=0.2)
    else:
        inner.step(lambda: backward(model), 2, 0.2)
    assert inner.given == (2, 0.2)
    assert penalty.balance.step == 1


def test_a_learning_rate_tensor_is_scaled_without_being_replaced(model):
    lr = torch.tensor(0.1)
    other = copy.deepcopy(model)
    optimizer = ConflictAwarePenalty(torch.optim.SGD(model.parameters(), lr=lr), groups_of(model), **PLAIN_RULE)
    twin = ConflictAwarePenalty(torch.optim.SGD(other.parameters(), lr=0.1), groups_of(other), **PLAIN_RULE)
    backward(model)
    optimizer.step()
    backward(other)
    twin.step()
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr == 0.1
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_remove_gives_the_optimizer_back(model):
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(inner, 1)
    attributes = set(vars(inner))
    optimizer = ConflictAwarePenalty(inner, groups_of(model), **PLAIN_RULE)
    optimizer.remove()
    assert set(vars(inner)) == attributes
    assert not any("gradbalance" in key for key in inner.state_dict()["param_groups"][0])
    backward(model)
    optimizer.step()
    scheduler.step()
    assert set(optimizer.coefficients().values()) == {1.0}
    ConflictAwarePenalty(inner, groups_of(model))


def test_remove_leaves_a_schedule_built_since_in_place(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    penalty = attach(optimizer, groups_of(model))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    step = optimizer.step
    penalty.remove()
    assert optimizer.step == step
    backward(model)
    optimizer.step()
    scheduler.step()  # would warn if the step it counts were gone
    assert set(penalty.coefficients().values()) == {1.0}


def test_members_unfrozen_later_join_their_group(model):
    model.audio.bias.requires_grad_(False)
    optimizer = ConflictAwarePenalty(
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1), groups_of(model)
    )
    backward(model)
    optimizer.step()
    model.audio.bias.requires_grad_(True)
    optimizer.add_param_group({"params": [model.audio.bias]})
    backward(model)
    optimizer.step()
    assert optimizer.balance.norms[1].item() == pytest.approx(slow_norm(model.audio), rel=1e-6)


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
        eta=0.5,
        **PLAIN_RULE,
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
        eta=0.5,
        **PLAIN_RULE,
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


def test_coefficients_for_applies_the_rule_to_norms_from_elsewhere(model):
    penalty = attach(torch.optim.SGD(model.parameters(), lr=0.1), groups_of(model), eta=0.5, **PLAIN_RULE)
    assert penalty.coefficients_for({"audio": 1.0, "text": torch.tensor(2.0)}) == {"text": 0.5, "audio": 1.0}
    assert penalty.coefficients_for({"audio": 1.0, "text": 2.0}, {"text": 2.0, "audio": 1.0})["text"] == 1.0
    assert penalty.balance.step == 2
    with pytest.raises(ValueError, match="`norms` must name exactly the groups"):
        penalty.coefficients_for({"text": 1.0})


def test_errors_count_with_their_mean_since_the_last_step(model):
    penalty = attach(torch.optim.SGD(model.parameters(), lr=0.1), groups_of(model), smoothing=0.0)
    penalty.observe(text=1.0, audio=3.0)
    penalty.observe(text=2.0, audio=5.0)
    backward(model)
    penalty._stepper.step()
    assert penalty.balance.errors.tolist() == [1.5, 4.0]
    penalty.observe(text=0.0, audio=0.5)
    backward(model)
    penalty._stepper.step()
    assert penalty.balance.errors.tolist() == [0.0, 0.5]


def test_a_negative_error_that_is_not_read_makes_the_step_not_count(model, monkeypatch):
    monkeypatch.setattr(_observed, "on_host", lambda device: False)
    penalty = attach(torch.optim.SGD(model.parameters(), lr=0.1), groups_of(model), smoothing=0.5)
    for error, steps in ((0.0, 1), (-0.5, 1), (0.5, 2)):
        penalty.observe(text=torch.tensor(error), audio=1.0)
        backward(model)
        penalty._stepper.step()
        assert penalty.balance.step == steps
    assert penalty.balance.errors.tolist() == [0.25, 1.0]


def test_the_representation_names_groups_sizes_and_changed_settings(model):
    optimizer = ConflictAwarePenalty(torch.optim.SGD(model.parameters(), lr=0.1), groups_of(model), eta=0.5)
    assert "text: 15, audio: 18" in repr(optimizer)
    assert "eta=0.5" in repr(optimizer)
    assert "threshold" not in repr(optimizer)
    assert "SGD" in repr(optimizer)


def test_the_agreement_is_the_cosine_of_successive_gradients_of_small_groups(model):
    penalty = attach(torch.optim.SGD(model.parameters(), lr=0.1), groups_of(model), smoothing=0.5)
    last, expected = None, {}
    for step in range(4):
        backward(model, step)
        flat = {name: torch.cat([g.flatten() for g in gradients(getattr(model, name))]) for name in ("text", "audio")}
        for name, g in flat.items():
            if last is not None:
                cosine = torch.cosine_similarity(g, last[name], dim=0).item()
                expected[name] = 0.5 * expected.get(name, cosine) + 0.5 * cosine
        last = flat
        penalty._stepper.step()
        assert penalty.balance.agreements.isnan().all().item() is (step == 0)
    assert penalty.balance.agreements.tolist() == pytest.approx(list(expected.values()), rel=1e-5)


def test_the_sketch_of_a_large_group_is_small_and_close_to_its_gradient():
    generator = torch.Generator().manual_seed(0)
    groups = {name: [nn.Parameter(torch.zeros(300, 400)) for _ in range(12)] for name in ("one", "two")}
    parameters = [*groups["one"], *groups["two"]]
    penalty = attach(torch.optim.SGD(parameters, lr=0.0), groups, smoothing=0.0)
    common = torch.randn(300, 400, generator=generator)
    for _ in range(2):
        for p in parameters:
            p.grad = common + torch.randn(300, 400, generator=generator)
        penalty._stepper.step()
    assert penalty.balance.agreements.tolist() == pytest.approx([0.5, 0.5], abs=0.03)
    assert len(penalty._memory._sketch) <= ENTRIES


def test_small_tensors_count_in_the_sketch_by_their_size_alone():
    generator = torch.Generator().manual_seed(0)
    biases = [nn.Parameter(torch.zeros(2000)) for _ in range(7)]
    groups = {"one": [nn.Parameter(torch.zeros(1000, 1000)), *biases], "two": [nn.Parameter(torch.zeros(3))]}
    parameters = [*groups["one"], *groups["two"]]
    penalty = attach(torch.optim.SGD(parameters, lr=0.0), groups, smoothing=0.0)
    for _ in range(2):
        for p in parameters:
            p.grad = torch.ones_like(p)
        parameters[0].grad = torch.randn(1000, 1000, generator=generator)
        penalty._stepper.step()
    assert penalty.balance.agreements.tolist() == pytest.approx([0.014, 1.0], abs=0.03)


def test_the_sketch_takes_as_many_rows_of_a_matrix_as_columns():
    assert _thinned(torch.zeros(1024, 1024), 1 << 14)[0] == [128, 128]
    assert _thinned(torch.zeros(1024, 4), 1 << 10)[0] == [512, 2]


def test_a_step_that_does_not_count_leaves_the_sketch(model):
    penalty = attach(torch.optim.SGD(model.parameters(), lr=0.0), groups_of(model), smoothing=0.0)
    start = copy.deepcopy(model.state_dict())
    for step, bad in ((0, False), (1, True), (0, False)):
        backward(model, step)
        if bad:
            model.text.bias.grad[0] = math.inf
        penalty._stepper.step()
        model.load_state_dict(start)  # an infinite gradient spoils a parameter even at lr 0
    assert penalty.balance.agreements.tolist() == pytest.approx([1.0, 1.0])


def test_the_innermost_of_optimizers_around_optimizers_is_hooked(model):
    class Around(torch.optim.Optimizer):
        def __init__(self, optimizer):
            self.optimizer = optimizer

    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    inner.base = inner  # as some tell that nothing is inside
    penalty = attach(Around(Around(inner)), groups_of(model))
    backward(model)
    inner.step()
    assert penalty.balance.step == 1


def test_the_memory_goes_to_the_device_of_the_parameters():
    memory = Memory(("text", "audio"))
    memory.restore(dict(zip(KEYS, (3.0, [0.75, 0.25], [1.0, 2.0], [0.5, 0.1], [1.0]), strict=True)))
    coefficients = memory.coefficients
    memory.to(torch.device("cpu"))
    assert memory.coefficients is coefficients
    memory.to(torch.device("meta"))
    assert {t.device.type for t in memory.balance[:-1]} == {"meta"}
    assert memory.has_errors


@pytest.mark.parametrize("errors", [None, {"text": 0.0, "audio": 0.0}])
def test_a_checkpoint_brings_back_what_decides(model, errors):
    def build(model):
        inner = torch.optim.SGD([{"params": part.parameters()} for part in model.children()], lr=0.1)
        return ConflictAwarePenalty(inner, groups_of(model), eta=0.5, threshold=1.0, agreement=1.0)

    def train(model, optimizer, steps):
        for step in steps:
            backward(model, step)
            optimizer.step()

    optimizer = build(model)
    train(model, optimizer, range(2))
    if errors is not None:
        optimizer.observe(**errors)
    train(model, optimizer, range(2, 4))
    resumed = copy.deepcopy(model)
    other = build(resumed)
    other.load_state_dict(optimizer.state_dict())
    train(model, optimizer, range(4, 6))
    train(resumed, other, range(4, 6))
    for now, expected in zip(other.balance[:-1], optimizer.balance[:-1], strict=True):
        torch.testing.assert_close(now, expected, rtol=0, atol=0, equal_nan=True)
    assert optimizer.balance.agreements.isfinite().all()
    assert optimizer.balance.step == 6
