"""The penalty on an optimizer in a plain loop: what is scaled, by how much, and what is left alone."""

import copy
import gc
import pickle
import weakref

import pytest
import torch

from gradbalance import ConflictAwarePenalty, attach
from gradbalance.rules import ByHand, ConflictAware
from tests.engine.models import (
    PLAIN,
    TwoBranches,
    backward,
    conflict_aware,
    equal,
    groups_of,
    parameters,
    penalised,
    slow_norm,
    train,
)
from tests.reference import Reference, SlowConflictAware


@pytest.mark.parametrize("mode", ["update", "gradient", "learning_rate", "displacement"])
@pytest.mark.parametrize("observed", [False, True])
def test_a_run_equals_plain_sgd_with_coefficients_by_hand(model, mode, observed):
    other, rule = copy.deepcopy(model), ConflictAware(eta=0.3, threshold=1.2)
    optimizer = penalised(model, rule, apply_to=mode, smoothing=0.5)
    plain = torch.optim.SGD(other.parameters(), lr=0.05)
    slow = Reference(SlowConflictAware(rule), smoothing=0.5)
    for step in range(10):
        errors = [0.5 + 0.1 * step, 1.0] if observed else None
        backward(model, step)
        if observed:
            optimizer.observe(text=errors[0] - 0.1, audio=torch.tensor(1.25))
            optimizer.observe(text=errors[0] + 0.1, audio=0.75)
        optimizer.step()
        backward(other, step)
        expected = slow.step([slow_norm(other.text), slow_norm(other.audio)], errors)
        assert list(optimizer.coefficients().values()) == pytest.approx(expected, rel=1e-6)
        for module, c in zip((other.text, other.audio), expected, strict=True):
            for p in module.parameters():
                p.grad *= c
        plain.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["update", "gradient", "displacement"])
@pytest.mark.parametrize("layout", ["one per module", "interleaved"])
def test_any_layout_of_param_groups_gives_the_same_run(model, mode, layout):
    def run(model, parameters):
        inner = torch.optim.SGD(parameters, lr=0.01, momentum=0.9)
        optimizer = ConflictAwarePenalty(inner, groups_of(model), apply_to=mode, **PLAIN)
        train(model, optimizer, range(5))

    other = copy.deepcopy(model)
    layouts = {
        "one per module": [{"params": m.parameters()} for m in other.children()],
        "interleaved": [{"params": list(other.parameters())[i::2]} for i in (0, 1)],
    }
    run(model, list(model.parameters()))
    run(other, layouts[layout])
    assert equal(parameters(model), parameters(other))


def test_weight_decay_that_is_decoupled_is_scaled_in_update_mode(model):
    optimizer = ConflictAwarePenalty(
        torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5, eps=1e30),
        groups_of(model),
        **conflict_aware(eta=0.5),
    )  # an eps this large leaves nothing of the step but the decay
    before = {name: m.weight.detach().clone() for name, m in model.named_children()}
    backward(model)
    optimizer.step()
    for name, c in optimizer.coefficients().items():
        torch.testing.assert_close(
            getattr(model, name).weight.detach(), before[name] * (1 - c * 0.1 * 0.5)
        )


@pytest.mark.parametrize("first", ["text", "audio"])
@pytest.mark.parametrize("lr", [0.5, torch.tensor(0.5)], ids=["float", "tensor"])
def test_what_the_step_writes_into_its_param_group_stays_as_without_the_penalty(model, lr, first):
    class Counting(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                group["count"], group["used"] = group.get("count", 0) + 1, float(group["lr"])
                group["in place"] += 1
            return super().step(closure)

    groups = dict(sorted(groups_of(model).items(), key=lambda item: item[0] != first))
    inner = Counting([{"params": list(model.parameters()), "in place": torch.zeros(())}], lr=lr)
    optimizer = ConflictAwarePenalty(inner, groups, apply_to="learning_rate", **PLAIN)
    for step in range(3):
        backward(model, step)
        optimizer.step()
    assert min(optimizer.coefficients().values()) < 1
    assert optimizer.param_groups[0]["count"] == 3
    assert optimizer.param_groups[0]["used"] == 0.5
    assert optimizer.param_groups[0]["in place"] == 3
    assert optimizer.balance.step == 3, "a step that calls that of its base class is one step"


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
    optimizer = ConflictAwarePenalty(inner, groups, **conflict_aware(eta=0.5))
    backward(model)
    optimizer.step()
    assert sorted(inner.shown) == [0.25, 0.5]
    assert inner.param_groups[0]["used"] == 0.5


def test_a_step_in_which_no_group_is_damped_sees_the_param_groups_themselves(model):
    inner = Showing(model.parameters(), lr=0.5)
    optimizer = ConflictAwarePenalty(inner, groups_of(model), window=(1, 2), **PLAIN)
    shown = []
    for step in range(3):
        backward(model, step)
        optimizer.step()
        shown.append(len(inner.shown))
    assert shown == [1, 2, 1]


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
    optimizer = ConflictAwarePenalty(
        torch.optim.SGD(model.parameters(), lr=lr), groups_of(model), **PLAIN
    )
    twin = ConflictAwarePenalty(
        torch.optim.SGD(other.parameters(), lr=0.1), groups_of(other), **PLAIN
    )
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
    optimizer = ConflictAwarePenalty(inner, groups_of(model), **PLAIN)
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


@pytest.mark.parametrize("by", [ConflictAwarePenalty, attach])
def test_a_penalty_that_was_removed_refuses_what_would_do_nothing(model, by):
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    penalty = by(inner, groups_of(model), ConflictAware())
    penalty.remove()
    penalty.remove()
    assert "Penalty(removed)" in repr(penalty)
    for call in (
        lambda: penalty.observe(text=1.0, audio=2.0),
        lambda: penalty.coefficients_for({"text": 1.0, "audio": 2.0}),
    ):
        with pytest.raises(RuntimeError, match=r"must be .* Got one that was removed\. Wrap the"):
            call()
    assert penalty.coefficients() == {"text": 1.0, "audio": 1.0}, "of the last step"


@pytest.mark.parametrize("way", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_a_copy_made_after_the_penalty_was_removed_steps_plainly_and_says_so(model, way):
    plain = copy.deepcopy(model)
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = ConflictAwarePenalty(inner, groups_of(model), ByHand(text=0.5))
    optimizer.remove()
    twin, other = way((model, optimizer))
    reference = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    for step in range(2):
        backward(twin, step)
        other.step()
        backward(plain, step)
        reference.step()
    assert equal(parameters(twin), parameters(plain))
    assert "Penalty(removed)" in repr(other)
    other.remove()
    other.load_state_dict(reference.state_dict())
    for call in (
        lambda: other.observe(text=1.0, audio=2.0),
        lambda: other.coefficients(),
        lambda: other.balance,
        lambda: way(optimizer.penalty),
    ):
        with pytest.raises(RuntimeError, match=r"must be .* Got one that was removed\. Wrap the"):
            call()
    ConflictAwarePenalty(other.optimizer, groups_of(twin))


def test_a_handle_without_its_optimizer_is_not_copied(model):
    penalty = attach(torch.optim.SGD(model.parameters(), lr=0.1), groups_of(model))
    with pytest.raises(RuntimeError, match=r"must be copied with its optimizer\. Got one whose"):
        copy.deepcopy(penalty)


@pytest.fixture
def uncollected():
    """References alone free what they count."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize(
    "kind", [torch.optim.AdamW, torch.optim.Adafactor], ids=["rate", "displacement"]
)
@pytest.mark.parametrize("put_on", [ConflictAwarePenalty, attach])
@pytest.mark.parametrize(
    "case", ["alone", "with a schedule", "with a schedule from before", "a copy"]
)
@pytest.mark.usefixtures("uncollected")
def test_an_optimizer_that_is_let_go_is_freed_at_once_with_what_it_trained(kind, put_on, case):
    def trained():
        model = TwoBranches()
        optimizer = inner = kind(model.parameters(), lr=0.1)
        schedule = (
            torch.optim.lr_scheduler.StepLR(inner, 1)
            if case == "with a schedule from before"
            else None
        )
        penalty = put_on(inner, groups_of(model))
        if put_on is ConflictAwarePenalty:
            optimizer = penalty
        if case == "a copy":
            model, optimizer = copy.deepcopy((model, optimizer))
        if case == "with a schedule":
            schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        for step in range(3):
            backward(model, step)
            optimizer.step()
            if schedule is not None:
                schedule.step()
        return weakref.ref(optimizer), weakref.ref(model.text.weight)

    trained()  # what is set up in python at a first step may hold it
    optimizer, weight = trained()
    assert optimizer() is None
    assert weight() is None


def test_a_handle_outlives_its_optimizer(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    penalty = attach(optimizer, groups_of(model), ByHand(text=0.5))
    backward(model)
    optimizer.step()
    step = optimizer.step
    del optimizer
    assert penalty.coefficients() == {"text": 0.5, "audio": 1.0}
    assert "gone" in repr(penalty)
    with pytest.raises(ReferenceError, match="Keep the optimizer"):
        step()
    penalty.remove()


def test_a_handle_that_was_removed_leaves_the_next_penalty_alone(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first = attach(optimizer, groups_of(model))
    first.remove()
    second = attach(optimizer, groups_of(model), ByHand(text=0.5))
    first.remove()
    backward(model)
    twin = copy.deepcopy(optimizer)
    twin.step()
    optimizer.step()
    assert second.coefficients() == {"text": 0.5, "audio": 1.0}
    with pytest.raises(ValueError, match="must not be wrapped twice"):
        attach(twin, groups_of(model))


def test_the_wrapper_is_equal_to_what_it_wraps_and_to_no_other(model):
    inner, other = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, copy.deepcopy(model)))
    optimizer = ConflictAwarePenalty(inner, groups_of(model))
    assert inner in [optimizer]
    assert optimizer in {inner}
    assert other != optimizer
    assert copy.deepcopy(optimizer) != optimizer


def test_coefficients_for_applies_the_rule_to_norms_from_elsewhere(model):
    optimizer = penalised(model, **conflict_aware(eta=0.5))
    norms = {"audio": 1.0, "text": torch.tensor(2.0)}
    assert optimizer.coefficients_for(norms) == {"text": 0.5, "audio": 1.0}
    ahead = optimizer.penalty.coefficients_for(norms, {"text": 2.0, "audio": 1.0})
    assert ahead["text"] == 1.0
    assert optimizer.balance.step == 2
    assert optimizer.balance.norms.tolist() == [2.0, 1.0]
    spoiled = {"audio": 1.0, "text": float("nan")}
    assert optimizer.coefficients_for(spoiled) == {"text": 1.0, "audio": 1.0}
    assert optimizer.balance.step == 2


def test_the_representation_names_groups_sizes_and_changed_settings(model):
    optimizer = penalised(model, ConflictAware(), every=2)
    assert "text: 15, audio: 18" in repr(optimizer)
    assert "rule=ConflictAware(" in repr(optimizer)
    assert "on the update by learning rate" in repr(optimizer)
    assert "every=2" in repr(optimizer)
    assert "smoothing" not in repr(optimizer)
    assert "SGD" in repr(optimizer)


@pytest.mark.parametrize("back", ["base", "wrapper", None])
def test_the_innermost_of_optimizers_around_optimizers_is_hooked(model, back):
    class Around(torch.optim.Optimizer):
        def __init__(self, optimizer):
            self.optimizer = optimizer
            self.param_groups = optimizer.param_groups

        def step(self, closure=None):
            return self.optimizer.step(closure)

    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    outer = Around(Around(inner))
    if back is not None:  # some tell that nothing is inside, some know their wrapper
        setattr(inner, back, inner if back == "base" else outer.optimizer)
    penalty = attach(outer, groups_of(model))
    backward(model)
    inner.step()
    assert penalty.balance.step == 1
