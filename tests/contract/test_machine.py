"""A driver that looks for more: a machine that does to an optimizer what training loops do, in any order.

Gradients are set by hand and depend on a counter alone. A plain optimizer on a twin model sees the same ones, and
its parameters are then put where the coefficients shown say, c times as far; the coefficients themselves are held
against slow floats. Beside the run there may be one that it was copied or resumed from, which must stay equal bit
for bit. More examples: ``MACHINE_EXAMPLES=3000 pytest tests/contract/test_machine.py --hypothesis-seed=1``.
"""

import copy
import io
import os
import pickle
from functools import wraps

import pytest
import torch
from hypothesis import settings, stateful
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition
from torch import nn

from gradbalance import ConflictAwarePenalty, attach
from tests.contract.drivers import (
    FAULTS,
    GROUPS,
    KEY,
    OPTIMIZERS,
    RULES,
    Expected,
    Fault,
    Model,
    Run,
    fixed,
    may_fail,
)

EXAMPLES = int(os.environ.get("MACHINE_EXAMPLES", "0"))
CLOSE = {"rtol": 1e-9, "atol": 1e-12}
EXACT = {"rtol": 0.0, "atol": 0.0}

# Branches that have no gradient at a step; mostly none, as a step needs two groups to count.
absences = st.sampled_from([[], [], [], ["text"], ["audio"], ["visual", "head"], ["text", "audio"]])
zeroings = st.sampled_from([True, False, None])  # set_to_none, or not called
names = st.sampled_from([f"{b}.{p}" for b in (*GROUPS, "head") for p in ("weight", "bias")])
indices = st.integers(0, 5)
adders = st.sampled_from([ConflictAwarePenalty, attach])
options = st.fixed_dictionaries(
    {
        "rule": st.sampled_from(list(RULES)),
        "apply_to": st.sampled_from(["update", "gradient", "displacement"]),
        "late": st.sampled_from([None, True]),
        "every": st.sampled_from([1, 2, 3]),
        "window": st.sampled_from([None, None, None, (1, 6)]),
        "max_norm": st.sampled_from([None, 1.0]),
        "smoothing": st.sampled_from([0.9, 0.0]),
    }
)


def by_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda run: pickle.loads(pickle.dumps(run))}


def assert_same(actual, expected, tolerance):
    """Tensors, None, numbers or dicts of these agree; ``torch.testing`` takes too long for so many."""
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key, value in expected.items():
            assert_same(actual[key], value, tolerance)
    elif isinstance(expected, torch.Tensor):
        assert torch.allclose(actual, expected, **tolerance, equal_nan=True), (actual, expected)
    else:
        assert actual == expected


def rule(**strategies):
    """A rule after which all is compared; as an invariant that would be a line of its own in each report."""

    def decorate(function):
        @wraps(function)
        def acted(self, **drawn):
            function(self, **drawn)
            self.compare()

        return stateful.rule(**strategies)(acted)

    return decorate


# A group that is frozen or gone is warned of, which is tested elsewhere.
pytestmark = pytest.mark.filterwarnings("ignore")


class Training(RuleBasedStateMachine):
    """``ours`` are runs with a penalty that must be equal bit for bit; ``plain`` is the twin."""

    @initialize(
        kind=st.sampled_from(list(OPTIMIZERS)), by=adders, options=options, together=st.booleans()
    )
    def start(self, kind, by, options, together):
        self.make, self.options = OPTIMIZERS[kind], options
        self.plain, run = (self._fresh(together) for _ in range(2))
        self.ours = [run]
        self.count = self.added = 0
        self.removed = []
        self.recent = set()  # what was done to the param_groups since the last step
        self.is_fresh = False  # copied or resumed, and no step since
        self.saved = self.expected = None
        self._put_on(by)

    def _fresh(self, together):
        model = Model()
        branches = [list(branch.parameters()) for branch in model.children()]
        if together:
            return Run(model, self.make(model.parameters()))
        return Run(model, self.make([{"params": branch} for branch in branches]))

    def _put_on(self, by):
        for run in self.ours:
            run.put_on(by, self.options)
        self.is_copied = False  # a copy knows parameters, not modules
        is_sgd = isinstance(self.plain.optimizer, torch.optim.SGD)
        self.expected = Expected(self.options, scale_free=not is_sgd)

    @property
    def runs(self):
        return [self.plain, *self.ours]

    @property
    def held(self):
        return [name for names in self.plain.structure() for name in names]

    def members(self):
        """The trainable parameters of the twin that the optimizer holds, by group and name."""
        members = {name: {} for name in GROUPS}
        for name in self.held:
            p, group = self.plain.parameters[name], name.split(".")[0]
            if p.requires_grad and group in GROUPS:
                members[group][name] = p
        return members

    def is_whole(self):
        """Whether the optimizer holds all trainable parameters of the groups, each with some."""
        everything = self.plain.parameters.items()
        trainable = {n for n, p in everything if p.requires_grad and n.split(".")[0] in GROUPS}
        return trainable <= set(self.held)

    # Steps

    @rule(times=st.integers(1, 4), absent=absences, zero=st.sampled_from([True, False]))
    def train(self, times, absent, zero):
        for _ in range(times):
            self._step("plain", absent, zero)

    @rule(
        times=st.integers(1, 4),
        way=st.sampled_from(["plain", "closure", "scaler", "again"]),
        absent=absences,
        zero=zeroings,
        rate=st.sampled_from([None, 0.03]),
    )
    def step(self, times, way, absent, zero, rate):
        for _ in range(times):
            self._step(way, absent, zero, rate=rate)

    @rule(absent=absences, zero=zeroings)
    def step_that_the_scaler_skips(self, absent, zero):
        self._step("skipped", absent, zero)

    @rule(zero=zeroings)
    def step_on_nan(self, zero):
        self._step("plain", (), zero, nan=True)

    @rule(
        fault=st.sampled_from(["hook before", "hook after", "closure"]),
        way=st.sampled_from(["plain", "closure"]),
        absent=absences,
        rate=st.sampled_from([None, 0.04]),
    )
    def step_with_an_exception(self, fault, way, absent, rate):
        way = "closure" if fault == "closure" else way
        self._step(way, absent, True, rate=rate, fault=fault)

    @rule(way=st.sampled_from(["plain", "closure"]), rate=st.sampled_from([None, 0.04]))
    def step_with_a_rule_that_raises(self, way, rate):
        self._step(way, (), True, rate=rate, fault="rule")

    @rule(nth=st.integers(0, 4), absent=absences)
    def step_that_fails_within(self, nth, absent):
        self._step("plain", absent, True, nth=nth)

    def _step(self, way, absent, zero, rate=None, nan=False, fault=None, nth=None):
        self.count += 1
        for run in self.runs:
            run.rate = rate
            if zero is not None and way != "again":
                run.optimizer.zero_grad(set_to_none=zero)
            if way not in ("closure", "again"):
                run.backward(self.count, absent, nan)
        before = [copy.deepcopy(run.parameters) for run in self.ours]
        identities = [list(map(id, run.optimizer.param_groups)) for run in self.ours]
        gradients = [self.plain.parameters[name].grad for name in self.held]
        gradients = [g for g in gradients if g is not None]
        if way == "scaler" and not all(g.isfinite().all() for g in gradients):
            way = "skipped"
        if way in ("scaler", "skipped") and not gradients:
            way = "plain"  # GradScaler refuses such a step
        raised, moved = self._step_ours(way, absent, fault, nth)

        # The same by hand on the twin.
        FAULTS.update({fault} - {None})
        try:
            by_hand = self._step_by_hand(way, absent, fault, raised, moved)
        finally:
            FAULTS.clear()
        assert str(raised) == str(by_hand)
        for run, start, groups in zip(self.ours, before, identities, strict=True):
            assert list(map(id, run.optimizer.param_groups)) == groups
            if way == "skipped" or fault in ("hook before", "closure") or str(raised) == "rule":
                for name, p in run.parameters.items():
                    assert_same(p.data, start[name].data, EXACT)
        for run in self.runs:
            run.rate = None
            if raised or way in ("scaler", "skipped"):
                run.model.zero_grad()

    def _step_ours(self, way, absent, fault, nth):
        """Step; the exception, and the names of the parameters that have moved."""
        FAULTS.update({fault} - {None})
        outcomes = []
        try:
            for run in self.ours:
                with run.failing_at(nth) as moved:
                    closure = self._closure_of(run, absent)
                    outcomes.append((run.step(way, closure), moved))
        finally:
            FAULTS.clear()
        raised, moved = outcomes[0]
        for other, others in outcomes:
            assert (str(other), others) == (str(raised), moved)
        return raised, moved

    def _closure_of(self, run, absent):
        def closure():
            run.optimizer.zero_grad()
            run.backward(self.count, absent)
            may_fail("closure")
            return 1.0

        return closure

    def _step_by_hand(self, way, absent, fault, raised, moved):
        """What the step does to the twin; the exception that it should raise."""
        plain = self.plain
        is_fused = plain.optimizer.defaults.get("fused")
        if way == "skipped" and not is_fused:  # not called at all
            return None
        if fault == "hook before":
            return Fault(fault)
        if way == "closure":
            try:
                self._closure_of(plain, absent)()
            except Fault as closure_fault:
                plain.call_hooks()
                return closure_fault
        factors = {}
        if self.expected is not None:
            try:
                expected = self.expected.step(self.members(), is_skipped=way == "skipped")
            except Fault as rule_fault:
                plain.call_hooks()
                return rule_fault
            self.is_fresh = False
            self.recent.clear()
            for run in self.ours:
                shown = run.penalty.coefficients()
                assert shown == pytest.approx(expected, rel=1e-9), f"{shown} != {expected}"
            for group, members in self.members().items():
                factors |= dict.fromkeys(members, shown[group])
        if way == "skipped":
            return plain.step(way, None)
        by_hand = plain.move_by_hand(factors, self.options if self.expected else {}, moved)
        if str(raised) == "step":
            plain.seen.pop()  # it was not reached
            return raised
        return by_hand

    # What lies between steps

    @rule(
        chosen=st.sets(names, min_size=1, max_size=4),
        trains=st.sampled_from([False, False, True]),
        steps=st.sampled_from([True, True, False]),
    )
    def freeze_or_unfreeze(self, chosen, trains, steps):
        if steps:
            self._step("plain", (), True)
            self.compare()
        self.recent.add("frozen")
        for run in self.runs:
            for name in chosen:
                run.parameters[name].requires_grad_(trains)
        if steps:  # on the gradients that are there
            self._step("again", (), None)

    @precondition(lambda self: self.expected is not None)
    @rule(errors=st.dictionaries(st.sampled_from(GROUPS), st.floats(0, 2), min_size=2))
    def observe(self, errors):
        self.expected.observed.append(errors)
        for run in self.ours:
            run.penalty.observe(**errors)

    @rule(i=indices, lr=st.sampled_from([0.01, 0.2, 0.0]), as_tensor=st.booleans())
    def change_a_rate(self, i, lr, as_tensor):
        for run in self.runs:
            groups = run.optimizer.param_groups
            groups[i % len(groups)]["lr"] = torch.tensor(lr).double() if as_tensor else lr

    @precondition(lambda self: self.added < 3)
    @rule(branch=st.sampled_from(["text", "head", "visual"]), lr=st.sampled_from([None, 0.02]))
    def add_a_param_group(self, branch, lr):
        branch = "head" if self.is_copied else branch
        if branch == "head" and "removed" in self.recent:
            return
        self.added += 1
        self.recent.add(branch)
        for run in self.runs:
            shape = (10 + self.added,)
            p = nn.Parameter(fixed(0, f"{branch}.{self.added}", shape))
            getattr(run.model, branch).register_parameter(f"added{self.added}", p)
            run.optimizer.add_param_group({"params": [p]} | ({} if lr is None else {"lr": lr}))

    @precondition(lambda self: "head" not in self.recent)
    @rule(i=indices)
    def remove_a_param_group(self, i):
        structure = self.plain.structure()
        rest = structure[: i % len(structure)] + structure[i % len(structure) + 1 :]
        if len({n.split(".")[0] for ns in rest for n in ns} & set(GROUPS)) >= 2:
            self.recent.add("removed")
            taken = structure[i % len(structure)]
            # A list may forget who has left before the first step.
            if not any(name.startswith("audio") for name in taken):
                self.removed.append(taken)
            for run in self.runs:
                group = run.optimizer.param_groups.pop(i % len(structure))
                for p in group["params"]:
                    run.optimizer.state.pop(p, None)

    @precondition(lambda self: self.removed and not self.is_fresh)
    @rule()
    def put_a_param_group_back(self):
        self.recent.add("put back")
        names = self.removed.pop()
        for run in self.runs:
            parameters = run.parameters
            run.optimizer.add_param_group({"params": [parameters[name] for name in names]})

    @precondition(lambda self: not self.is_fresh)
    @rule(i=indices, j=indices)
    def move_a_param_group(self, i, j):
        self.recent.add("moved")
        for run in self.runs:
            groups = run.optimizer.param_groups
            groups.insert(j % len(groups), groups.pop(i % len(groups)))

    @precondition(lambda self: not self.is_fresh)
    @rule(i=indices, j=indices)
    def move_a_parameter(self, i, j):
        self.recent.add("moved")
        for run in self.runs:
            groups = run.optimizer.param_groups
            source = groups[i % len(groups)]["params"]
            if source:
                groups[j % len(groups)]["params"].append(source.pop(0))

    # Saving, copying, taking off

    @rule()
    def save(self):
        states = [by_file(run.optimizer.state_dict()) for run in self.runs]
        weights = [copy.deepcopy(run.model.state_dict()) for run in (self.plain, self.ours[0])]
        self.expected.settle()
        self.saved = self.plain.structure(), states, weights, copy.deepcopy(self.expected)

    @precondition(lambda self: self.saved and not self.recent)
    @rule()
    def load(self):
        structure, states, weights, expected = copy.deepcopy(self.saved)
        if structure != self.plain.structure():
            return
        self.expected = expected
        for run, i in zip(self.runs, (0, 1, 1), strict=False):
            run.model.load_state_dict(weights[i])
            run.optimizer.load_state_dict(copy.deepcopy(states[i]))

    @rule(damage=st.sampled_from(["rule", "groups", "phase", "param_groups"]))
    def load_what_is_refused(self, damage):
        for run in self.ours:
            state = by_file(run.optimizer.state_dict())
            (saved,) = state["param_groups"][0][KEY]
            if damage == "rule":
                saved["rule"] = "`Another`"
            elif damage == "groups":
                saved["groups"]["speech"] = saved["groups"].pop("text")
            elif damage == "phase":
                del saved["phase"]
            else:
                state["param_groups"].append(state["param_groups"][0])
            with pytest.raises(ValueError, match=r"must|different number"):
                run.optimizer.load_state_dict(state)
        self.expected.settle()

    @rule(way=st.sampled_from(list(COPIES)))
    def go_on_with_a_copy(self, way):
        self.is_copied = True
        self.removed.clear()
        self._go_on_with(self.ours[0].copied(COPIES[way]))

    @precondition(lambda self: self.is_whole())
    @rule(by=adders, load_first=st.booleans())
    def resume_in_a_fresh_pair(self, by, load_first):
        self._go_on_with(self.ours[0].rebuilt(self.make, by, self.options, load_first))

    def _go_on_with(self, run):
        self.expected.settle()
        self.ours = [run, self.ours[0]]
        self.is_fresh = True
        for each in self.runs:
            each.model.zero_grad()

    @precondition(lambda self: self.is_whole())
    @rule(unwrap=st.booleans(), by=adders, steps=st.integers(0, 2))
    def take_off_and_put_on_again(self, unwrap, by, steps):
        self.expected = None
        for run in self.ours:
            run.take_off(unwrap)
            assert not {"step", "__reduce_ex__"} & set(vars(run.inner))
        self.compare()
        for _ in range(steps):
            self._step("plain", (), True)
            self.compare()
        for run in self.ours:
            run.optimizer = run.inner
        self._put_on(by)

    # What holds after each of these

    def compare(self):
        for run in self.ours:
            # What a user sees, outside a step and in its hooks.
            assert run.shown() == self.plain.shown()
            assert run.seen == self.plain.seen
            keys = [KEY in group for group in run.optimizer.param_groups]
            assert sum(keys) <= (self.expected is not None)
            self._compare_with_the_twin(run)
        for other in self.ours[1:]:
            others = other.parameters
            for name, p in self.ours[0].parameters.items():
                assert_same(p.data, others[name].data, EXACT)
            assert_same(other.state(), self.ours[0].state(), EXACT)
        for run in self.runs:
            run.seen.clear()

    def _compare_with_the_twin(self, run):
        twin = self.plain.parameters
        for name, p in run.parameters.items():
            is_grouped = name.split(".")[0] in GROUPS
            tolerance = CLOSE if is_grouped or self.options["max_norm"] else EXACT
            assert_same(p.data, twin[name].data, tolerance)
            assert_same(p.grad, twin[name].grad, CLOSE)
        assert_same(run.state(), self.plain.state(), CLOSE)


Training.TestCase.settings = settings(
    max_examples=EXAMPLES or 50, stateful_step_count=25, derandomize=not EXAMPLES, deadline=None
)
TestTraining = Training.TestCase
