"""The penalty on an optimizer: hooks around its step that take norms, ask the rule, and scale."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields
from operator import attrgetter
from types import MethodType
from typing import Any, Unpack

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradbalance import _groups, _norms
from gradbalance._buckets import gather, wide
from gradbalance._checkpoint import Checkpoint
from gradbalance._groups import Groups
from gradbalance._hooks import StepHooks, owner_of
from gradbalance._memory import Balance, Memory
from gradbalance._observed import Observed
from gradbalance._plan import Fingerprint, Plan, make_plan
from gradbalance._rates import LearningRates
from gradbalance._scaling import write_
from gradbalance._settings import Options, Settings
from gradbalance._wrapped import check_optimizer, settle, unwrap


class Penalty:
    """The penalty on one optimizer; made by :func:`attach`."""

    def __init__(self, optimizer: Optimizer, groups: Groups, settings: Settings) -> None:
        # The reader lists all parameters, the stepper is hooked. They differ under ZeroRedundancyOptimizer alone,
        # whose inner optimizer steps this rank's share of the parameters.
        self._reader, self._stepper = unwrap(optimizer)
        check_optimizer(self._stepper, settings)
        if penalty_of(self._stepper) is not None:
            raise ValueError(
                f"`optimizer` must not be wrapped twice. Got {type(self._stepper).__name__} with a penalty on it. "
                "Call its `remove()` first."
            )
        self.settings = settle(settings, self._stepper)
        self._assignment = _groups.assign(self._reader.param_groups, groups)
        self._plan: Plan | None = None
        self._rates = LearningRates(self._stepper)
        self._observed = Observed(self._assignment.names)
        self._applied: Fingerprint | None = None  # of the gradients that were dealt with
        self._in_step = False
        self._listeners: list[Callable[[Balance], None]] = []
        self._memory = Memory(self._assignment.names)
        self._checkpoint = Checkpoint(optimizer, self._memory, self._rates, settings.persist)
        self._hooks = StepHooks(self._stepper, self, self._apply, self._after_step)
        vars(self._stepper)["__reduce_ex__"] = MethodType(self._reduce, self._stepper)

    @property
    def names(self) -> tuple[str, ...]:
        """The groups, in order."""
        return self._assignment.names

    @property
    def balance(self) -> Balance:
        """What the rule saw and decided in the last step: a copy on the device, without a host read."""
        return self._memory.balance

    def coefficients(self) -> dict[str, float]:
        """The coefficient of each group in the last step, by name; one host read."""
        return dict(zip(self.names, self._memory.coefficients.tolist(), strict=True))

    def observe(self, **errors: Tensor | float) -> None:
        """Tell the errors of the groups' own predictions, lower is better; their mean counts at the next step.

        Without errors the norms alone decide. With them only the groups named take part: the paper names audio and
        visual and leaves text out. They stay in force until the next call. In distributed training every rank has to
        call it; the errors are averaged over the ranks that name the group.

        Args:
            **errors: For at least two groups a number >= 0, or a tensor with one element, which is detached.

        Raises:
            ValueError: If a group is unknown, only one is named, or an error is negative or not a scalar. On an
                accelerator a negative error is not read; it makes the step not count, as NaN does.
            TypeError: If an error is not a real number.
        """
        self._observed.add(errors)

    def coefficients_for(
        self, norms: Mapping[str, Tensor | float], errors: Mapping[str, Tensor | float] | None = None
    ) -> dict[str, float]:
        """The coefficients that the rule gives for norms measured elsewhere; counts as a step.

        For engines that keep no gradient per parameter (DeepSpeed ZeRO, FSDP1): measure the norms with the engine's
        own means between backward and step, and scale the gradients or the learning rates by the result: see
        ``examples/deepspeed_zero.py``. The same on every rank if the norms are.

        Args:
            norms: Gradient norm of each group.
            errors: As in :meth:`observe`, or None.

        Raises:
            ValueError: If ``norms`` does not name exactly the groups; for errors as in :meth:`observe`.
        """
        if set(norms) != set(self.names):
            raise ValueError(
                f"`norms` must name exactly the groups. Got {', '.join(norms) or 'none'}. "
                f"The groups are: {', '.join(self.names)}."
            )
        if errors is not None:
            self.observe(**errors)
        home = self._memory.home
        values = torch.stack([torch.as_tensor(norms[name], dtype=wide(home)).to(home) for name in self.names])
        self._decide(values, _norms.average(self._take_errors(), self.settings.process_group))
        return self.coefficients()

    def remove(self) -> None:
        """Take the penalty off: the optimizer steps as if it had never been there."""
        self._rates.restore()
        self._checkpoint.remove()
        self._hooks.remove()
        vars(self._stepper).pop("__reduce_ex__", None)

    def __repr__(self) -> str:
        """The groups with their sizes, the mode, and the settings that differ from the defaults."""
        sizes = [0] * len(self.names)
        for m, p in self._assignment.members.values():
            sizes[m] += p.numel()
        groups = ", ".join(f"{name}: {size:,}" for name, size in zip(self.names, sizes, strict=True))
        options = {f.name: getattr(self.settings, f.name) for f in fields(Settings)}
        shown = {f.name for f in fields(Settings) if options[f.name] != f.default} | {"apply_to"}
        return f"Penalty({{{groups}}}, {', '.join(f'{k}={v!r}' for k, v in options.items() if k in shown)})"

    # Around the step.

    @torch.no_grad()
    def _apply(self) -> None:
        """Take the norms, ask the rule, scale gradients or learning rates."""
        update = self.settings.apply_to == "update"
        if self._applied is not None and (self._in_step or not update) and self._applied.matches():
            return  # a step nested in a step, or a second one without a new backward: it must not compound
        self._rates.restore()
        self._checkpoint.take_in()
        plan = self._current_plan()
        gathered = gather(plan.buckets, attrgetter("grad"))
        if _norms.world_size(None) > 1 and not any(g.read for g in gathered):
            warnings.warn(
                "The optimizer must hold parameters that get gradients. Got none with a gradient on this rank. Build "
                "it after wrapping or sharding the model: FSDP1 replaces the parameters.",
                UserWarning,
                stacklevel=2,
            )
        observed = self._take_errors()
        sketches = None if plan.sketch is None or self._memory.has_errors else plan.sketch.take()
        norms, observed, sketch = _norms.reduce_norms(
            gathered, plan.rows, plan.home, observed, sketches, self.settings.process_group
        )
        scale, found_inf = (getattr(self._stepper, name, None) for name in ("grad_scale", "found_inf"))
        if scale is not None:  # GradScaler leaves it to fused optimizers to unscale
            norms = norms / scale.to(norms)
        due = self._decide(self._ruled_norms(norms, found_inf, plan), observed, sketch)

        coefficients = None if self.settings.is_passive else self._memory.coefficients
        write_(gathered, len(self.names), norms, None if update else coefficients, due, self.settings)
        if update and coefficients is not None:
            self._rates.scale(coefficients)
        self._applied, self._in_step = Fingerprint(plan), True

    def _current_plan(self) -> Plan:
        """The plan, made anew when the optimizer's parameters changed."""
        param_groups = self._reader.param_groups
        if self._plan is None or not self._plan.fits(param_groups):
            self._assignment = _groups.reassign(self._assignment, param_groups)
            self._plan = make_plan(self._assignment, param_groups, self.settings)
            self._rates.divide(self._plan.group_of)
            self._memory.to(self._plan.home)
        return self._plan

    def _ruled_norms(self, norms: Tensor, found_inf: Tensor | None, plan: Plan) -> Tensor:
        """The norms that the rule compares, NaN where GradScaler will skip the step."""
        norms = norms[: len(self.names)]
        if self.settings.norm == "rms":
            norms = norms / plan.sizes.sqrt()
        elif self.settings.norm == "relative":
            weights, *_ = _norms.reduce_norms(gather(plan.buckets, lambda p: p), plan.rows, plan.home)
            norms = norms / weights[: len(self.names)]
        return norms if found_inf is None else torch.where(found_inf.to(norms) > 0, torch.nan, norms)

    def _take_errors(self) -> Tensor | None:
        errors = self._observed.take(self._memory.home)
        self._memory.has_errors |= errors is not None  # from the first ones on they decide, not the agreement
        return errors

    def _decide(self, norms: Tensor, observed: Tensor | None, sketch: Tensor | None = None) -> Tensor:
        sketcher = None if self._plan is None else self._plan.sketch
        due = self._memory.decide(norms, observed, self.settings, sketcher, sketch)
        for listener in self._listeners:
            listener(self.balance)
        return due

    def _after_step(self) -> None:
        self._rates.restore()
        if self._in_step and self._plan is not None and self.settings.apply_to == "gradient":
            self._applied = Fingerprint(self._plan)  # again, as some steps write into the gradients
        self._in_step = False

    def _reduce(self, optimizer: Optimizer, protocol: Any) -> tuple[Any, ...]:
        """Copies and pickles put the penalty on again: `Optimizer.__getstate__` drops hooks."""
        groups: dict[str, list[Tensor]] = {name: [] for name in self.names}
        for m, p in self._assignment.members.values():
            groups[self.names[m]].append(p)
        parts: Any = object.__reduce_ex__(optimizer, max(2, int(protocol)))
        return _rebuild, (*parts[:3], groups, self.settings, self._memory.numbers())


def attach(optimizer: Optimizer, groups: Groups, **options: Unpack[Options]) -> Penalty:
    """Put the conflict-aware penalty on an optimizer, which stays the object that you step.

    The mechanism of :class:`ConflictAwarePenalty` for code that has to keep its optimizer object.

    Args:
        optimizer: The optimizer; of a wrapped one the innermost is hooked.
        groups: As in :class:`ConflictAwarePenalty`.
        **options: As in :class:`ConflictAwarePenalty`.

    Returns:
        The handle: ``observe``, ``coefficients``, ``balance``, ``remove``.

    Raises:
        TypeError, ValueError, RuntimeError: As in :class:`ConflictAwarePenalty`.

    Example:
        >>> text, audio = torch.nn.Linear(4, 1), torch.nn.Linear(4, 1)
        >>> optimizer = torch.optim.SGD([*text.parameters(), *audio.parameters()], lr=0.1)
        >>> penalty = attach(optimizer, {"text": text, "audio": audio}, eta=0.5, agreement=None)
        >>> (10 * text(torch.ones(1, 4)) + audio(torch.ones(1, 4))).sum().backward()
        >>> optimizer.step()
        >>> penalty.coefficients()
        {'text': 1.0, 'audio': 2.0}
    """
    return Penalty(optimizer, groups, Settings(**options))


def penalty_of(optimizer: Optimizer) -> Penalty | None:
    """The penalty attached to an optimizer, or to the one it wraps, if any."""
    penalty: Penalty | None = owner_of(unwrap(optimizer)[1])
    return penalty


def _rebuild(
    make: Callable[..., Any],
    args: tuple[Any, ...],
    state: dict[str, Any],
    groups: Groups,
    settings: Settings,
    numbers: dict[str, Any],
) -> Any:
    optimizer = make(*args)
    optimizer.__setstate__(state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a frozen group the original has warned
        penalty = Penalty(optimizer, groups, settings)
    penalty._memory.restore(numbers)
    return optimizer
