"""What every optimizer keeps when the penalty is on it: one contract, checked on all of them."""

import copy
import io
import pickle

import pytest
import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from gradbalance import ConflictAwarePenalty, attach, rules
from tests.contract.optimizers import MODES, cancels
from tests.contract.oracle import (
    TOLERANCE,
    ByHand,
    Toy,
    assert_same_coefficients,
    assert_same_parameters,
    groups_of,
    loss_of,
    put_on,
    train,
)
from tests.contract.own_rules import RULES


def wrapped(case, mode, rule="conflicts", **options):
    """A model and its optimizer, all parameters in one param_group, under the penalty."""
    model = Toy(case.bias)
    return model, put_on(case.make(model.parameters()), model, mode, rule, **options)


def by_hand(case, mode, rule="conflicts", **options):
    return ByHand(case.make, Toy(case.bias), mode, rule, case.by_rate, **options)


def saved(*objects):
    """What a checkpoint gives back: through a file, with builtin types and tensors alone."""
    file = io.BytesIO()
    torch.save([o.state_dict() for o in objects], file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def through_pickle(objects):
    return pickle.loads(pickle.dumps(objects))


class Holder:
    """As trainers do: an object that holds a model, its optimizer and the handle of the penalty."""

    def __init__(self, case, mode):
        self.model = Toy(case.bias)
        self.optimizer = case.make(self.model.parameters())
        self.penalty = put_on(self.optimizer, self.model, mode, "own", attach)

    def train(self, steps):
        return train(self.model, self.optimizer, steps, penalty=self.penalty, observe=False)


def of(which=lambda case: True, *, everywhere=False, modes=MODES):
    """Run a promise on those representatives of a class of tests that ``which`` lets through.

    Args:
        which: Whether the promise applies to a case.
        everywhere: Whether it is run on every case, variants among them, and not on representatives alone.
        modes: Where the coefficient goes.
    """

    def mark(promise):
        promise.cases = which, everywhere, modes
        return promise

    return mark


@cancels
class Contract:
    """The promises; a class of tests names the optimizers.

    Attributes:
        cases: The optimizers, variants of their options among them.
        representatives: Names and modes of those on which most promises are tested; None for all but variants.
    """

    cases = ()
    representatives = None

    def pytest_generate_tests(self, metafunc):
        which, everywhere, modes = getattr(metafunc.function, "cases", (None, None, None))
        if which is None:
            return
        pairs = [
            (case, mode)
            for case in filter(which, self.cases)
            for mode in case.modes
            if mode in modes
        ]
        if not everywhere:
            pairs = [(case, mode) for case, mode in pairs if self.represents(case, mode)]
        metafunc.parametrize(
            ("case", "mode"), pairs, ids=[f"{case}-{mode}" for case, mode in pairs]
        )

    def represents(self, case, mode):
        if self.representatives is None:
            return not case.variant
        return (case.name, mode) in self.representatives

    @of(everywhere=True)
    def test_training_equals_the_oracle_by_hand(self, case, mode):
        model, optimizer = wrapped(case, mode)
        twin = by_hand(case, mode)
        observe = not case.averages
        assert_same_coefficients(
            train(model, optimizer, range(5), observe=observe), twin.train(range(5), observe)
        )
        assert_same_parameters(model, twin.model)

    @of(lambda case: not case.averages)
    @pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "conflicts"])
    def test_rules_of_coherence_and_of_ones_own_equal_the_oracle_by_hand(self, case, mode, rule):
        model, optimizer = wrapped(case, mode, rule)
        twin = by_hand(case, mode, rule)
        seen, expected = (
            train(model, optimizer, range(5), observe=False),
            twin.train(range(5), observe=False),
        )
        assert_same_coefficients(seen, expected)
        assert (max(c for coefficients in seen for c in coefficients.values()) > 1.5) == (
            rule == "coherence"
        )
        assert_same_parameters(model, twin.model)

    @of()
    def test_an_attached_penalty_equals_the_oracle_by_hand(self, case, mode):
        model, twin = Toy(case.bias), by_hand(case, mode)
        optimizer = case.make(model.parameters())
        penalty = put_on(optimizer, model, mode, by=attach)
        observe = not case.averages
        seen = train(model, optimizer, range(4), penalty=penalty, observe=observe)
        assert_same_coefficients(seen, twin.train(range(4), observe))
        assert_same_parameters(model, twin.model)

    @of()
    def test_a_closure_equals_the_oracle_by_hand(self, case, mode):
        model, optimizer = wrapped(case, mode)
        twin = by_hand(case, mode)
        observe = not case.averages
        seen = train(model, optimizer, range(4), observe=observe, closure=True)
        assert_same_coefficients(seen, twin.train(range(4), observe))
        assert_same_parameters(model, twin.model)

    @of(lambda case: not case.averages)
    @pytest.mark.parametrize("rule", ["conflicts", "own"])
    def test_coefficients_are_kept_between_the_steps_that_are_measured(self, case, mode, rule):
        options = {"every": 2, "window": (1, 5)}
        model, optimizer = wrapped(case, mode, rule, **options)
        twin = by_hand(case, mode, rule, **options)
        seen, expected = train(model, optimizer, range(7)), twin.train(range(7))
        assert_same_coefficients(seen, expected)
        assert seen[2] == seen[3] != seen[4]
        assert set(seen[0].values()) == set(seen[5].values()) == {1.0}
        assert_same_parameters(model, twin.model)

    @of(lambda case: not case.averages)
    @pytest.mark.parametrize("options", [{}, {"every": 2, "window": (1, 5)}], ids=["", "every-2"])
    @pytest.mark.parametrize("rule", RULES)
    def test_a_late_decision_is_that_of_the_step_before(self, case, mode, rule, options):
        model, optimizer = wrapped(case, mode, rule, late=True, **options)
        twin = by_hand(case, mode, rule, late=True, **options)
        seen, expected = train(model, optimizer, range(7)), twin.train(range(7))
        assert set(seen[0].values()) == {1.0}
        assert_same_coefficients(seen, expected)
        assert_same_parameters(model, twin.model)

    @of()
    @pytest.mark.parametrize("place", [0, 1])
    def test_an_empty_param_group_changes_nothing(self, case, mode, place):
        model, twin = Toy(case.bias), by_hand(case, mode)
        param_groups = [{"params": list(model.parameters())}]
        param_groups.insert(place, {"params": []})
        optimizer = put_on(case.make(param_groups), model, mode)
        observe = not case.averages
        assert_same_coefficients(
            train(model, optimizer, range(4), observe=observe), twin.train(range(4), observe)
        )
        assert_same_parameters(model, twin.model)

    @of()
    def test_the_wrapper_is_an_optimizer_and_param_groups_stay_what_they_were(self, case, mode):
        model = Toy(case.bias)
        plain = case.make(model.parameters())
        optimizer = put_on(plain, model, mode)
        assert isinstance(optimizer, torch.optim.Optimizer)
        param_groups = optimizer.param_groups
        train(model, optimizer, range(2))
        assert optimizer.param_groups is param_groups
        assert param_groups[0]["lr"] == 0.02
        assert all(
            p is q
            for p, q in zip(optimizer.param_groups[0]["params"], model.parameters(), strict=True)
        )

    @of()
    @pytest.mark.parametrize(
        "options", [{}, {"every": 2}, {"late": True}], ids=["", "every-2", "late"]
    )
    @pytest.mark.parametrize(
        ("rule", "before"), [("conflicts", 0), ("conflicts", 3), ("coherence", 3), ("own", 3)]
    )
    def test_a_resumed_run_is_bitwise_the_unbroken_one(self, case, mode, rule, before, options):
        observe = rule == "conflicts"
        model, optimizer = wrapped(case, mode, rule, **options)
        train(model, optimizer, range(before), observe=observe)
        weights, state = saved(model, optimizer)
        resumed, other = wrapped(case, mode, rule, **options)
        resumed.load_state_dict(weights)
        other.load_state_dict(state)
        steps = range(before, 6)
        assert train(resumed, other, steps, observe=observe) == train(
            model, optimizer, steps, observe=observe
        )
        assert_same_parameters(resumed, model, tolerance=0)

    @of()
    def test_a_checkpoint_loaded_before_the_penalty_is_put_on_resumes_too(self, case, mode):
        model, optimizer = wrapped(case, mode, "own")
        train(model, optimizer, range(3))
        weights, state = saved(model, optimizer)
        resumed = Toy(case.bias)
        resumed.load_state_dict(weights)
        plain = case.make(resumed.parameters())
        plain.load_state_dict(state)
        other = put_on(plain, resumed, mode, "own")
        assert train(resumed, other, range(3, 6)) == train(model, optimizer, range(3, 6))
        assert_same_parameters(resumed, model, tolerance=0)

    @of()
    def test_checkpoints_go_from_a_plain_optimizer_to_a_wrapped_one_and_back(self, case, mode):
        model, optimizer = wrapped(case, mode)
        plain_model = Toy(case.bias)
        plain = case.make(plain_model.parameters())
        train(plain_model, plain, range(2), penalty=optimizer)
        weights, state = saved(plain_model, plain)
        model.load_state_dict(weights)
        optimizer.load_state_dict(state)
        optimizer.remove()
        train(model, optimizer, range(2, 4), observe=False)
        train(plain_model, plain, range(2, 4), penalty=optimizer, observe=False)
        assert_same_parameters(model, plain_model, tolerance=0)

        model, optimizer = wrapped(case, mode)
        train(model, optimizer, range(2))
        weights, state = saved(model, optimizer)
        plain_model.load_state_dict(weights)
        plain.load_state_dict(state)
        optimizer.remove()
        train(model, optimizer, range(2, 4), observe=False)
        train(plain_model, plain, range(2, 4), penalty=optimizer, observe=False)
        assert_same_parameters(plain_model, model, tolerance=0)

    @of(lambda case: case.copies)
    @pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle])
    def test_copies_train_on_under_the_penalty(self, case, mode, duplicate):
        model, optimizer = wrapped(case, mode)
        train(model, optimizer, range(2))
        twin, copied = duplicate((model, optimizer))
        assert type(copied) is ConflictAwarePenalty
        assert_same_coefficients(
            train(twin, copied, range(2, 5)), train(model, optimizer, range(2, 5))
        )
        assert_same_parameters(twin, model, tolerance=0)

    @of(lambda case: case.copies)
    @pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle])
    def test_copies_of_what_holds_an_optimizer_and_its_handle_train_on(self, case, mode, duplicate):
        holder = Holder(case, mode)
        holder.train(range(2))
        copied = duplicate(holder)
        assert copied.penalty is not holder.penalty
        copied_first = copied.train(range(2, 5))  # each has a rule with a memory of its own
        assert_same_coefficients(copied_first, holder.train(range(2, 5)))
        assert_same_parameters(copied.model, holder.model, tolerance=0)

    @of(lambda case: case.grows)
    def test_a_param_group_added_later_joins_its_group(self, case, mode):
        def unfreeze(model, optimizer):
            optimizer.add_param_group(
                {"params": list(model.text.requires_grad_(True).parameters())}
            )
            if hasattr(optimizer, "train"):  # schedule-free starts every param_group in eval mode
                optimizer.train()

        model, twin = Toy(case.bias), Toy(case.bias)
        for m in (model, twin):
            m.text.requires_grad_(False)
        trainable = [p for p in model.parameters() if p.requires_grad]
        with pytest.warns(UserWarning, match="`text` requires a gradient"):
            optimizer = put_on(case.make(trainable), model, mode)
        hand = ByHand(case.make, twin, mode, by_rate=case.by_rate)
        seen, expected = (
            train(model, optimizer, range(2), observe=False),
            hand.train(range(2), observe=False),
        )
        hand.optimizer.param_groups.pop(0)
        unfreeze(model, optimizer)
        unfreeze(twin, hand.optimizer)
        hand.optimizer.param_groups.insert(0, hand.optimizer.param_groups.pop())
        seen += train(model, optimizer, range(2, 4), observe=False)
        assert_same_coefficients(seen, expected + hand.train(range(2, 4), observe=False))
        assert_same_parameters(model, twin)

    @of()
    def test_hooks_of_all_kinds_fire_as_often_as_without_the_penalty(self, case, mode):
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
        assert counted(optimizer, model, optimizer) == counted(
            case.make(plain.parameters()), plain, optimizer
        )

    @of(lambda case: not case.closure_alone)
    @pytest.mark.parametrize("set_to_none", [True, False])
    def test_both_ways_of_zeroing_gradients_equal_the_oracle_by_hand(self, case, mode, set_to_none):
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

    @of(lambda case: not (case.closure_alone or case.averages))
    def test_a_second_step_on_the_same_gradients_is_a_second_step(self, case, mode):
        model, optimizer = wrapped(case, mode)
        twin = by_hand(case, mode)
        seen, expected = [], []
        for step in range(2):
            loss_of(model, step).backward()
            loss_of(twin.model, step).backward()
            for _ in range(2):
                optimizer.step()
                twin.step()
                seen.append(optimizer.coefficients())
                expected.append(twin.coefficients)
            optimizer.zero_grad()
            twin.optimizer.zero_grad()
        assert optimizer.balance.step == 4
        assert_same_coefficients(seen, expected)
        assert_same_parameters(model, twin.model)

    @of(everywhere=True, modes=("update",))
    def test_a_constant_coefficient_scales_the_distance_travelled_and_no_other(self, case, mode):
        def distances(damped):
            model = Toy(case.bias)
            optimizer = case.make(model.parameters())
            if damped:
                optimizer = ConflictAwarePenalty(
                    optimizer, groups_of(model), rules.ByHand(audio=0.5)
                )
                assert f"update by {'learning rate' if case.by_rate else 'displacement'}" in repr(
                    optimizer
                )
            optimizer.param_groups[0]["lr"] = 1e-4
            if "weight_decay" in optimizer.param_groups[0]:
                optimizer.param_groups[0]["weight_decay"] = 0.0
            start = [p.detach().clone() for p in model.parameters()]

            def gradients():
                for name, module in model.named_children():
                    for p in module.parameters():
                        p.grad = torch.full_like(p, 4.0 if name == "audio" else 1.0)

            for _ in range(30):
                gradients()
                optimizer.step(gradients) if case.closure_alone else optimizer.step()
            return {
                n: (p - p0).norm().item()
                for (n, p), p0 in zip(model.named_parameters(), start, strict=True)
            }

        plain, damped = distances(damped=False), distances(damped=True)
        for name in plain:
            assert damped[name] == pytest.approx(
                (0.5 if "audio" in name else 1.0) * plain[name], rel=0.02
            )

    @of()
    def test_a_hook_may_set_the_learning_rate_before_or_after_the_step(self, case, mode):
        """A warm-up in a pre-hook and a decay in a post-hook, each registered before and after wrapping."""

        def warm(optimizer, args, kwargs):
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * 1.1

        def decay(optimizer, args, kwargs):
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * 0.7

        def hooked(optimizer):
            optimizer.register_step_pre_hook(warm)
            optimizer.register_step_post_hook(decay)
            return optimizer

        rates = []
        for when in ("before", "after"):
            model, twin = Toy(case.bias), by_hand(case, mode)
            optimizer = case.make(model.parameters())
            if when == "before":
                hooked(optimizer)
            penalty = put_on(optimizer, model, mode, by=attach)
            if when == "after":
                hooked(optimizer)
            observe = not case.averages
            seen = train(model, optimizer, range(4), penalty=penalty, observe=observe)
            rates.append(optimizer.param_groups[0]["lr"])
            expected = []
            for step in range(4):
                for group in twin.optimizer.param_groups:
                    group["lr"] = group["lr"] * 1.1
                expected += twin.train([step], observe)
                for group in twin.optimizer.param_groups:
                    group["lr"] = group["lr"] * 0.7
            assert_same_coefficients(seen, expected)
            assert_same_parameters(model, twin.model)
        assert rates == [pytest.approx(0.02 * 0.77**4, rel=TOLERANCE)] * 2
