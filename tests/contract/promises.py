"""What every optimizer keeps when the penalty is on it: one contract, checked on all of them."""

import copy
import inspect
import io
import pickle
import re

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from gradbalance import ConflictAwarePenalty, attach
from tests.optimizers import CLASSES, EVERY, GRADIENT_ONLY, MODES, TORCH, bitsandbytes, each
from tests.oracle import (
    RULE,
    TOLERANCE,
    ByHand,
    Toy,
    assert_same_coefficients,
    assert_same_parameters,
    groups_of,
    loss_of,
    refused,
    train,
)


def wrapped(case, mode, **options):
    """A model and its optimizer, all parameters in one param_group, under the penalty."""
    model = Toy(case.bias)
    return model, ConflictAwarePenalty(
        case.make(model.parameters()), groups_of(model), apply_to=mode, **{**RULE, **options}
    )


def by_hand(case, mode, **options):
    return ByHand(case.make, Toy(case.bias), mode, **options)


def saved(*objects):
    """What a checkpoint gives back: through a file, with builtin types and tensors alone."""
    file = io.BytesIO()
    torch.save([o.state_dict() for o in objects], file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_the_contract_covers_every_class_of_torch_optim():
    classes = {n for n in torch.optim.__all__ if inspect.isclass(getattr(torch.optim, n))}
    assert classes - {"Optimizer", "LBFGS", "SparseAdam"} == {case.name.split("-")[0] for case in TORCH}


@each(EVERY)
def test_training_equals_the_oracle_by_hand(case, mode):
    model, optimizer = wrapped(case, mode)
    twin = by_hand(case, mode)
    observe = not case.averages
    assert_same_coefficients(train(model, optimizer, range(5), observe=observe), twin.train(range(5), observe))
    assert_same_parameters(model, twin.model)


@each(c for c in CLASSES if not c.averages)
def test_conflicts_by_the_agreement_of_gradients_equal_the_oracle_by_hand(case, mode):
    model, optimizer = wrapped(case, mode, agreement=1.0)
    twin = by_hand(case, mode, agreement=1.0)
    seen, expected = train(model, optimizer, range(6), observe=False), twin.train(range(6), observe=False)
    assert seen == [pytest.approx(by_hand, rel=TOLERANCE) for by_hand in expected]
    assert_same_parameters(model, twin.model)


@each(CLASSES)
def test_raised_steps_equal_the_oracle_by_hand(case, mode):
    model, optimizer = wrapped(case, mode, max_coefficient=4.0)
    twin = by_hand(case, mode, max_coefficient=4.0)
    observe = not case.averages
    seen, expected = train(model, optimizer, range(5), observe=observe), twin.train(range(5), observe)
    assert seen == [pytest.approx(by_hand, rel=TOLERANCE) for by_hand in expected]
    assert max(c for coefficients in seen for c in coefficients.values()) > 1.5
    assert_same_parameters(model, twin.model)


@each(CLASSES)
def test_an_attached_penalty_equals_the_oracle_by_hand(case, mode):
    model, twin = Toy(case.bias), by_hand(case, mode)
    optimizer = case.make(model.parameters())
    penalty = attach(optimizer, groups_of(model), apply_to=mode, **RULE)
    observe = not case.averages
    seen = train(model, optimizer, range(4), penalty=penalty, observe=observe)
    assert_same_coefficients(seen, twin.train(range(4), observe))
    assert_same_parameters(model, twin.model)


@each(CLASSES)
def test_a_closure_equals_the_oracle_by_hand(case, mode):
    model, optimizer = wrapped(case, mode)
    twin = by_hand(case, mode)
    observe = not case.averages
    seen = train(model, optimizer, range(4), observe=observe, closure=True)
    assert_same_coefficients(seen, twin.train(range(4), observe))
    assert_same_parameters(model, twin.model)


@each(CLASSES)
def test_the_wrapper_is_an_optimizer_and_param_groups_stay_what_they_were(case, mode):
    model, optimizer = wrapped(case, mode)
    assert isinstance(optimizer, torch.optim.Optimizer)
    param_groups, keys = optimizer.param_groups, set(optimizer.param_groups[0])
    train(model, optimizer, range(2))
    assert optimizer.param_groups is param_groups
    assert len(param_groups) == 1
    assert set(param_groups[0]) == keys
    assert param_groups[0]["lr"] == 0.02
    assert all(p is q for p, q in zip(optimizer.param_groups[0]["params"], model.parameters(), strict=True))


@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize("observe", [True, False])
@each(CLASSES)
def test_a_resumed_run_is_bitwise_the_unbroken_one(case, mode, observe, before):
    model, optimizer = wrapped(case, mode, agreement=1.0)
    train(model, optimizer, range(before), observe=observe)
    weights, state = saved(model, optimizer)
    resumed, other = wrapped(case, mode, agreement=1.0)
    resumed.load_state_dict(weights)
    other.load_state_dict(state)
    steps = range(before, 6)
    assert train(resumed, other, steps, observe=observe) == train(model, optimizer, steps, observe=observe)
    assert_same_parameters(resumed, model, tolerance=0)


@each(CLASSES)
def test_a_checkpoint_loaded_before_the_penalty_is_put_on_resumes_too(case, mode):
    model, optimizer = wrapped(case, mode)
    train(model, optimizer, range(3))
    weights, state = saved(model, optimizer)
    resumed = Toy(case.bias)
    resumed.load_state_dict(weights)
    plain = case.make(resumed.parameters())
    plain.load_state_dict(state)
    other = ConflictAwarePenalty(plain, groups_of(resumed), apply_to=mode, **RULE)
    assert train(resumed, other, range(3, 6)) == train(model, optimizer, range(3, 6))
    assert_same_parameters(resumed, model, tolerance=0)


@each(CLASSES)
def test_checkpoints_go_from_a_plain_optimizer_to_a_wrapped_one_and_back(case, mode):
    model, optimizer = wrapped(case, mode)
    plain_model = Toy(case.bias)
    plain = case.make(plain_model.parameters())
    for step in range(2):
        train(plain_model, plain, [step], penalty=optimizer)
    weights, state = saved(plain_model, plain)
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    optimizer.remove()
    train(model, optimizer, range(2, 4))
    train(plain_model, plain, range(2, 4), penalty=optimizer)
    assert_same_parameters(model, plain_model, tolerance=0)

    model, optimizer = wrapped(case, mode)
    train(model, optimizer, range(2))
    weights, state = saved(model, optimizer)
    plain_model.load_state_dict(weights)
    plain.load_state_dict(state)
    optimizer.remove()
    train(model, optimizer, range(2, 4))
    train(plain_model, plain, range(2, 4), penalty=optimizer)
    assert_same_parameters(plain_model, model, tolerance=0)


def through_pickle(pair):
    return pickle.loads(pickle.dumps(pair))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle])
@each(c for c in CLASSES if c.copies)
def test_copies_train_on_under_the_penalty(case, mode, duplicate):
    model, optimizer = wrapped(case, mode)
    train(model, optimizer, range(2))
    twin, copied = duplicate((model, optimizer))
    assert type(copied) is ConflictAwarePenalty
    assert_same_coefficients(train(twin, copied, range(2, 5)), train(model, optimizer, range(2, 5)))
    assert_same_parameters(twin, model, tolerance=0)


@each(c for c in CLASSES if not c.copies)
def test_a_copy_that_could_not_train_without_the_penalty_is_refused_with_it(case, mode, record_property):
    def train_a_copy(model, optimizer):
        model, optimizer = copy.deepcopy((model, optimizer))
        train(model, optimizer, range(1), observe=False, penalty=penalty)

    plain, (model, penalty) = Toy(case.bias), wrapped(case, mode)
    with pytest.raises(AttributeError) as expected:
        train_a_copy(plain, case.make(plain.parameters()))
    with refused(record_property, AttributeError, re.escape(str(expected.value))):
        train_a_copy(model, penalty)


@each(c for c in CLASSES if c.grows)
def test_a_param_group_added_later_joins_its_group(case, mode):
    def unfreeze(model, optimizer):
        optimizer.add_param_group({"params": list(model.text.requires_grad_(True).parameters())})
        if hasattr(optimizer, "train"):  # schedule-free starts every param_group in eval mode
            optimizer.train()

    model, twin = Toy(case.bias), Toy(case.bias)
    for m in (model, twin):
        m.text.requires_grad_(False)
    trainable = [p for p in model.parameters() if p.requires_grad]
    with pytest.warns(UserWarning, match="`text` requires a gradient"):
        optimizer = ConflictAwarePenalty(case.make(trainable), groups_of(model), apply_to=mode, **RULE)
    hand = ByHand(case.make, twin, mode)
    seen, expected = train(model, optimizer, range(2), observe=False), hand.train(range(2), observe=False)
    hand.optimizer.param_groups.pop(0)
    unfreeze(model, optimizer)
    unfreeze(twin, hand.optimizer)
    hand.optimizer.param_groups.insert(0, hand.optimizer.param_groups.pop())
    seen += train(model, optimizer, range(2, 4), observe=False)
    assert_same_coefficients(seen, expected + hand.train(range(2, 4), observe=False))
    assert_same_parameters(model, twin)


@each(CLASSES)
def test_hooks_of_all_kinds_fire_as_often_as_without_the_penalty(case, mode):
    def counted(optimizer, model, penalty):
        calls = []
        handles = [
            optimizer.register_step_pre_hook(lambda *_: calls.append("pre")),
            optimizer.register_step_post_hook(lambda *_: calls.append("post")),
            register_optimizer_step_pre_hook(lambda *_: calls.append("global pre")),
            register_optimizer_step_post_hook(lambda *_: calls.append("global post")),
        ]
        if hasattr(optimizer, "_optimizer_state_dict_pre_hooks"):  # Lookahead has none
            handles += [
                optimizer.register_state_dict_pre_hook(lambda *_: calls.append("saving")),
                optimizer.register_state_dict_post_hook(lambda *_: calls.append("saved")),
                optimizer.register_load_state_dict_pre_hook(lambda *_: calls.append("loading")),
                optimizer.register_load_state_dict_post_hook(lambda *_: calls.append("loaded")),
            ]
        train(model, optimizer, range(1), penalty=penalty)
        optimizer.load_state_dict(optimizer.state_dict())
        for handle in handles:
            handle.remove()
        train(model, optimizer, range(1), penalty=penalty)
        return calls

    model, optimizer = wrapped(case, mode)
    plain = Toy(case.bias)
    assert counted(optimizer, model, optimizer) == counted(case.make(plain.parameters()), plain, optimizer)


@pytest.mark.parametrize("set_to_none", [True, False])
@each(c for c in CLASSES if not c.closure_alone)
def test_both_ways_of_zeroing_gradients_equal_the_oracle_by_hand(case, mode, set_to_none):
    model, optimizer = wrapped(case, mode)
    twin = by_hand(case, mode)
    seen = []
    for step in range(4):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
        assert all((p.grad is None) == set_to_none for p in model.parameters())
        seen.append(optimizer.coefficients())
    assert_same_coefficients(seen, twin.train(range(4), observe=False))
    assert_same_parameters(model, twin.model)


@each(c for c in CLASSES if not c.closure_alone)
def test_a_second_step_without_a_backward_does_not_scale_the_gradient_twice(case, mode):
    model, optimizer = wrapped(case, mode)
    twin = by_hand(case, mode)
    for step in range(2):
        loss_of(model, step).backward()
        loss_of(twin.model, step).backward()
        twin.decide()
        optimizer.step()
        optimizer.step()
        with twin.applied():
            twin.optimizer.step()
            twin.optimizer.step()
        optimizer.zero_grad()
        twin.optimizer.zero_grad()
    assert_same_parameters(model, twin.model)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_a_step_that_raised_leaves_no_trace(base, mode):
    class Fragile(base):
        """Fails when told to, and steps by its base class's step, which has hooks of its own."""

        fails = False

        def step(self, closure=None):
            if self.fails:
                raise MemoryError
            return super().step(closure)

    model, twin = Toy(), ByHand(lambda groups: base(groups, lr=0.02), Toy(), mode)
    optimizer = ConflictAwarePenalty(Fragile(model.parameters(), lr=0.02), groups_of(model), apply_to=mode, **RULE)
    shown = copy.deepcopy(optimizer.state_dict()["param_groups"][0]["lr"])
    seen = []
    for step in range(4):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.fails = optimizer.optimizer.fails = step == 1
        if step == 1:
            with pytest.raises(MemoryError):
                optimizer.step()
        else:
            optimizer.step()
        assert optimizer.param_groups[0]["lr"] == shown
        assert len(optimizer.param_groups) == 1
        seen.append(optimizer.coefficients())
    expected = []
    for step in range(4):
        twin.optimizer.zero_grad()
        loss_of(twin.model, step).backward()
        if step == 1:
            twin.decide()
        else:
            twin.step()
        expected.append(twin.coefficients)
    assert_same_coefficients(seen, expected)
    assert_same_parameters(model, twin.model)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dominance", [1.0, 10.0])
def test_a_step_that_calls_the_step_of_its_base_class_counts_once(mode, dominance):
    class Derived(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    model = Toy()
    threshold = 1e6 / dominance**6  # at 1e6 no group is ever in conflict, and nothing is scaled
    optimizer = ConflictAwarePenalty(
        Derived(model.parameters(), lr=0.02), groups_of(model), apply_to=mode, **{**RULE, "threshold": threshold}
    )
    train(model, optimizer, range(3), observe=False)
    assert optimizer.balance.step.item() == 3


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("named", [True, False])
def test_lbfgs_is_refused(mode, named, record_property):
    model = Toy()
    parameters = list(model.named_parameters()) if named else list(model.parameters())
    with refused(record_property, ValueError, "LBFGS, which evaluates the closure many times"):
        ConflictAwarePenalty(torch.optim.LBFGS(parameters), groups_of(model), apply_to=mode, **RULE)


@pytest.mark.parametrize("cls", GRADIENT_ONLY)
def test_a_step_not_proportional_to_the_learning_rate_is_refused_in_update_mode(cls, record_property):
    model = Toy()
    with refused(record_property, ValueError, 'Use `apply_to="gradient"`'):
        ConflictAwarePenalty(cls(model.parameters()), groups_of(model))


@pytest.mark.parametrize("where", ["pid2config", "index2config", "module_weight_config_triple"])
def test_settings_of_bitsandbytes_beside_the_param_groups_are_refused_in_update_mode(
    where, monkeypatch, record_property
):
    manager = object.__new__(bitsandbytes.optim.GlobalOptimManager)
    manager.initialize()
    monkeypatch.setattr(bitsandbytes.optim.GlobalOptimManager, "_instance", manager)
    model = Toy()
    if where == "pid2config":
        manager.override_config(model.text.weight, "lr", 1.0)
    elif where == "index2config":
        manager.index2config[0, 0] = {"lr": 1.0}  # which `register_parameters` gets out of the former
    else:
        manager.register_module_override(model.text, "weight", {"lr": 1.0})
    optimizer = bitsandbytes.optim.AdamW(model.parameters(), lr=0.02)
    penalty = attach(optimizer, groups_of(model), **RULE)
    loss_of(model, 0).backward()
    with refused(record_property, RuntimeError, "`param_groups`. Got overrides"):
        optimizer.step()
    penalty.remove()
    attach(optimizer, groups_of(model), apply_to="gradient", **RULE)
    optimizer.step()


@each(CLASSES, modes=("update",))
def test_a_constant_coefficient_scales_the_distance_travelled(case, mode):
    def distance(damped):
        model = Toy(case.bias)
        optimizer = case.make(model.parameters())
        if damped:
            optimizer = ConflictAwarePenalty(optimizer, groups_of(model), **{**RULE, "eta": 0.5})
        optimizer.param_groups[0]["lr"] = 1e-4  # Adafactor takes it relative to the size of the parameter
        if "weight_decay" in optimizer.param_groups[0]:
            optimizer.param_groups[0]["weight_decay"] = 0.0
        start = model.audio.weight.detach().clone()

        def gradients():
            for name, module in groups_of(model).items():
                for p in module.parameters():
                    p.grad = torch.full_like(p, 4.0 if name == "audio" else 1.0)

        for _ in range(30):
            gradients()
            optimizer.step(gradients) if hasattr(optimizer, "first_step") else optimizer.step()
        return (model.audio.weight - start).norm().item()

    assert distance(damped=True) == pytest.approx(0.5 * distance(damped=False), rel=0.02)
