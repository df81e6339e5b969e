"""What the machine of test_machine.py drives: a training run, and by hand the coefficients it should have."""

import copy
import math
import zlib
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from gradbalance import ConflictAwarePenalty
from gradbalance.rules import Measured, Useful
from tests.reference import Mean

GROUPS = ("text", "audio", "visual")
KEY = "gradbalance"
MARK = "_step_supports_amp_scaling"
FAULTS: set[str] = set()  # where an exception is raised, while it is in here


class Fault(Exception):
    """The user's own exception."""


def may_fail(where):
    if where in FAULTS:
        raise Fault(where)


class Varying:
    """A rule with a memory, whose answer tells apart steps, shares, coherences and numbers of calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, measured):
        may_fail("rule")
        self.calls += 1
        known = 0 if measured.coherences is None else measured.coherences + 0.3 * measured.useful
        time = 0.2 * (measured.step % 3) + 0.05 * (self.calls % 4)
        return np.nan_to_num(0.3 + time + measured.shares + 0.2 * np.nan_to_num(known), nan=1.0)

    def state_dict(self):
        return {"calls": self.calls}

    def load_state_dict(self, state):
        self.calls = state["calls"]


class Shares(Varying):
    needs_coherence = False


class ByUse(Useful):
    def __call__(self, measured):
        may_fail("rule")
        return super().__call__(measured)


RULES = {"varying": Varying, "shares": Shares, "useful": ByUse}

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1),
    "fused AdamW": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1, fused=True),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
}


class Model(nn.Module):
    """Three branches, and a head that belongs to no group; no two branches have equally many entries."""

    def __init__(self):
        super().__init__()
        for n, name in enumerate((*GROUPS, "head"), start=2):
            branch = nn.Linear(n, 1, dtype=torch.float64)
            for label, p in branch.named_parameters():
                p.data = fixed(0, f"{name}.{label}", p.shape)
            self.add_module(name, branch)


def fixed(count, name, shape):
    """Numbers that depend on a counter and a name alone; those of audio are ten times as large."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{count} {name}".encode()))
    scale = 10 if count and name.startswith("audio") else 1
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def plainly(value):
    return value.tolist() if isinstance(value, torch.Tensor) else value


@dataclass(eq=False)
class Run:
    """A model, its optimizer as the loop holds it, and the penalty, if there is one on it."""

    model: Model
    optimizer: Any
    penalty: Any = None
    rate: float | None = None  # that a hook sets before each step
    seen: list = field(default_factory=list)  # by the hooks: the learning rates

    def __post_init__(self):
        self.optimizer.register_step_pre_hook(self._before)
        self.optimizer.register_step_post_hook(self._after)

    def _before(self, *_):
        may_fail("hook before")
        for group in self.optimizer.param_groups if self.rate else ():
            group["lr"] = self.rate
        self.seen.append(self.shown())

    def _after(self, *_):
        self.seen.append(self.shown())
        may_fail("hook after")

    def call_hooks(self):
        """Those of a step that goes no further."""
        self._before()

    @property
    def inner(self):
        return getattr(self.optimizer, "optimizer", self.optimizer)

    @property
    def parameters(self):
        return dict(self.model.named_parameters())

    def structure(self):
        """The names of the parameters in each param_group."""
        names = {id(p): name for name, p in self.parameters.items()}
        return [[names[id(p)] for p in group["params"]] for group in self.optimizer.param_groups]

    def shown(self):
        """The param_groups as a user sees them, without the key of ours."""
        shown = []
        for names, group in zip(self.structure(), self.optimizer.param_groups, strict=True):
            settings = {k: plainly(v) for k, v in group.items() if k not in ("params", KEY)}
            shown.append(settings | {"params": names})
        return shown

    def state(self):
        """What the optimizer keeps of each parameter, by name."""
        of = self.optimizer.state
        return {name: dict(of[p]) for name, p in self.parameters.items() if p in of}

    def put_on(self, by, options):
        groups = {name: getattr(self.model, name) for name in GROUPS}
        groups["audio"] = list(self.model.audio.parameters())
        rule = RULES[options["rule"]]()
        self.penalty = by(self.inner, groups, **(options | {"rule": rule}))
        if by is ConflictAwarePenalty:
            self.optimizer = self.penalty

    def take_off(self, unwrap):
        self.penalty.remove()
        self.penalty = None
        if unwrap:
            self.optimizer = self.inner

    def copied(self, way):
        """A copy, with what torch itself does not copy: hooks, and a mark of fused optimizers."""
        run = Run(*way((self.model, self.optimizer, self.penalty)))
        if hasattr(self.inner, MARK):
            setattr(run.inner, MARK, True)
        return run

    def rebuilt(self, make, by, options, load_first):
        """A fresh pair that loads what this one has saved."""
        model = copy.deepcopy(self.model)
        parameters = dict(model.named_parameters())
        structure = [{"params": [parameters[n] for n in names]} for names in self.structure()]
        run = Run(model, make(structure))
        saved = copy.deepcopy(self.optimizer.state_dict())
        if load_first:
            run.optimizer.load_state_dict(saved)
        run.put_on(by, options)
        if not load_first:
            run.optimizer.load_state_dict(saved)
        return run

    def backward(self, count, absent=(), nan=False):
        """Add a gradient that does not depend on the parameters to those of all branches but these."""
        for name, p in self.parameters.items():
            if p.requires_grad and name.split(".")[0] not in absent:
                gradient = fixed(count, name, p.shape)
                if nan and name == "visual.bias":
                    gradient[0] = math.nan
                p.grad = gradient if p.grad is None else p.grad + gradient

    def step(self, way, closure):
        """One step as the loop takes it; the exception that it raises, if any."""
        try:
            if way in ("scaler", "skipped"):
                scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
                scaler.scale(torch.ones(()))
                held = [p for group in self.optimizer.param_groups for p in group["params"]]
                for p in held:
                    if p.grad is not None:
                        p.grad = p.grad * (math.inf if way == "skipped" else 8.0)
                scaler.step(self.optimizer)
                scaler.update()
            elif way == "closure":
                assert self.optimizer.step(closure) == 1.0
            else:
                self.optimizer.step()
        except Fault as fault:
            return fault
        return None

    @contextmanager
    def failing_at(self, nth):
        """The optimizer raises at its n-th param_group; yields the names of those that it has moved."""
        names = {id(p): name for name, p in self.parameters.items()}
        init_group = self.inner._init_group
        groups, moved = [], set()

        def counting(group, *args, **kwargs):
            if len(groups) == nth:
                raise Fault("step")
            groups.append(group)
            moved.update(names[id(p)] for p in group["params"])
            return init_group(group, *args, **kwargs)

        self.inner._init_group = counting
        try:
            yield moved
        finally:
            del self.inner._init_group

    def move_by_hand(self, factors, options, moved):
        """The plain step, of which each group takes its factor.

        Args:
            factors: Of each parameter that a group moves, by name.
            options: Of the penalty, empty without one.
            moved: The names of those that move at all.
        """
        parameters = self.parameters
        held = [name for names in self.structure() for name in names]
        with_gradient = [name for name in held if parameters[name].grad is not None]
        apply_to, max_norm = options.get("apply_to"), options.get("max_norm")
        if apply_to == "gradient":
            for name in with_gradient:
                parameters[name].grad *= factors.get(name, 1.0)
        trained = [parameters[name] for name in with_gradient if parameters[name].requires_grad]
        if max_norm and trained:
            total = math.hypot(*(p.grad.norm().item() for p in trained))
            clip = min(1.0, max_norm / (total + 1e-6))
            for p in trained if math.isfinite(total) else ():
                p.grad *= clip
        before = {name: p.detach().clone() for name, p in parameters.items()}
        gradients = {name: p.grad for name, p in parameters.items()}
        for name in set(parameters) - moved:
            parameters[name].grad = None
        fault = self.step("plain", None)
        for name, p in parameters.items():
            p.grad = gradients[name]
            c = factors.get(name, 1.0)
            if c != 1 and apply_to != "gradient":
                p.data = before[name] + c * (p.data - before[name])
        return fault


class Expected:
    """The coefficients of SPEC 1.1 to 1.3 in slow floats; one of these follows one penalty."""

    def __init__(self, options, scale_free):
        self.options, self.scale_free = options, scale_free
        self.rule = RULES[options["rule"]]()
        self.smoothing = options["smoothing"] ** options["every"]
        self.means = {name: self._unknown() for name in GROUPS}
        self.last = {}  # gradient of each group by name of the parameter, when it was last compared
        self.decided = dict.fromkeys(GROUPS, 1.0)
        self.steps = self.counted = 0
        self.reading = None

    def _unknown(self):
        return {key: Mean(self.smoothing) for key in ("shares", "coherences", "useful")}

    def step(self, members, is_skipped=False):
        """The coefficients of a step.

        Args:
            members: Of each group, by name, the trainable parameters that the optimizer holds.
            is_skipped: Whether a fused optimizer is told to skip the step.
        """
        self.settle()
        for name, own in members.items():
            if not own:
                self.means[name] = self._unknown()
            if list(own) != list(self.last.get(name, {})):  # they are compared entry by entry
                self.last.pop(name, None)
        every = self.options["every"]
        start, stop = self.options["window"] or (0, None)
        is_inside = start <= self.counted and (stop is None or self.counted < stop)
        active = [n for n in GROUPS if any(p.grad is not None for p in members[n].values())]
        reading = {
            "vectors": {n: {p: entries(q) for p, q in own.items()} for n, own in members.items()},
            "active": active,
            "is_skipped": is_skipped,
            "is_measured": self.steps % every == 0,
            # The step before it too: coherence is that of successive gradients.
            "is_compared": any((self.steps + ahead) % every == 0 for ahead in (0, 1)),
        }
        if self.options["late"]:
            self.reading = reading
        else:
            active = self._decide(**reading)
        self.steps += 1
        return {n: self.decided[n] if n in active and is_inside else 1.0 for n in GROUPS}

    def settle(self):
        reading, self.reading = self.reading, None
        if reading:
            self._decide(**reading)

    def _decide(self, vectors, active, is_skipped, is_measured, is_compared):
        """Take a step into the means, if it counts; the groups on which its decision acts."""
        norms = {n: math.hypot(*(x for v in own.values() for x in v)) for n, own in vectors.items()}
        if is_measured:
            active = [name for name in GROUPS if norms[name] > 0]
        is_finite = all(map(math.isfinite, norms.values())) or not is_measured
        if is_skipped or not is_finite or len(active) < 2:
            return []
        if is_measured:
            self._learn(vectors, norms)
        for name in GROUPS if is_compared else ():
            if 0 < norms[name] < math.inf:
                self.last[name] = vectors[name]
        self.counted += 1
        return active

    def _learn(self, vectors, norms):
        before = copy.deepcopy(self.means)
        total = math.fsum(norms.values())
        for name in GROUPS:
            means = self.means[name]
            if norms[name] > 0:
                means["shares"].values.append(norms[name] / total)
                cosine = self._cosine(vectors[name], self.last.get(name))
                if cosine is not None and self._needs_coherence:
                    means["coherences"].values.append(cosine)
                    means["useful"].values.append(cosine * norms[name] / total)
        try:
            answer = self.rule(self._measured(norms))
        except Fault:
            self.means = before
            raise
        self.decided = dict(zip(GROUPS, map(float, answer), strict=True))

    @property
    def _needs_coherence(self):
        return getattr(self.rule, "needs_coherence", True)

    def _cosine(self, now, last):
        if last is None:
            return None
        pairs = [pair for name in now for pair in zip(now[name], last[name], strict=True)]
        lengths = math.hypot(*(x for x, _ in pairs)) * math.hypot(*(y for _, y in pairs))
        return math.fsum(x * y for x, y in pairs) / lengths

    def _measured(self, norms):
        nothing = np.full(len(GROUPS), math.nan)

        def mean(key):
            means = [self.means[name][key].mean() for name in GROUPS]
            return np.array([math.nan if value is None else value for value in means])

        return Measured(
            names=GROUPS,
            norms=np.array(list(norms.values())),
            shares=mean("shares"),
            coherences=mean("coherences") if self._needs_coherence else None,
            coherence_errors=nothing,
            useful=mean("useful") if self._needs_coherence else None,
            useful_errors=nothing,
            errors=None,
            active=np.array([norm > 0 for norm in norms.values()]),
            scale_free=self.scale_free,
            coefficients=nothing,
            step=self.counted,
        )


def entries(p):
    return [0.0] * p.numel() if p.grad is None else p.grad.flatten().tolist()
