"""The penalty on an optimizer: what a user holds, and what is checked when it is made."""

import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar
from weakref import ref

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradbalance._engine import groups as grouping
from gradbalance._engine.engine import Engine
from gradbalance._engine.groups import Groups
from gradbalance._engine.options import ApplyTo, check
from gradbalance._engine.state import Balance
from gradbalance._gradients.collectives import average
from gradbalance._gradients.layout import wide
from gradbalance._gradients.meter import Reading
from gradbalance._torch.checkpoint import Checkpoint
from gradbalance._torch.hooks import StepHooks, hooks_of
from gradbalance._torch.trial import way_to_scale
from gradbalance._torch.unwrap import check_optimizer, unwrap
from gradbalance.rules import Coherence, Rule

P = ParamSpec("P")
T = TypeVar("T")


class Penalty:
    """The penalty on one optimizer, as :func:`attach` returns it; the options are those of ConflictAwarePenalty.

    Example:
        >>> text, audio = torch.nn.Linear(4, 1), torch.nn.Linear(4, 1)
        >>> optimizer = torch.optim.AdamW([*text.parameters(), *audio.parameters()])
        >>> Penalty(optimizer, {"text": text, "audio": audio}, lambda m: m.coefficients, every=2).names
        ('text', 'audio')
    """

    def __init__(
        self,
        optimizer: Optimizer,
        groups: Groups,
        rule: Rule = Coherence(),  # noqa: B008  # it has no state
        *,
        apply_to: ApplyTo = "update",
        smoothing: float = 0.98,
        every: int = 1,
        window: tuple[int, int | None] | None = None,
        noise: float | Mapping[str, float] = 0.0,
        max_norm: float | None = None,
        generator: torch.Generator | None = None,
        process_group: Any = None,
        persist: bool = True,
    ) -> None:
        self._options = {k: v for k, v in locals().items() if k not in ("self", "optimizer", "groups")}
        check(self._options)
        reader, stepper = unwrap(optimizer)
        check_optimizer(stepper)
        if penalty_of(stepper) is not None:
            raise ValueError(
                f"`optimizer` must not be wrapped twice. Got {type(stepper).__name__} with a penalty on it. "
                "Call its `remove()` first."
            )
        self.rule = rule
        acts = getattr(rule, "acts", True)
        if acts and apply_to == "gradient" and not isinstance(stepper, torch.optim.SGD):
            warnings.warn(
                f'`apply_to="gradient"` does nothing lasting under {type(stepper).__name__}, which cancels a '
                'constant factor on the gradient. Use `apply_to="update"`.',
                UserWarning,
                stacklevel=3,
            )
        assignment = grouping.assign(reader.param_groups, groups)
        way = way_to_scale(optimizer) if acts and apply_to == "update" else None
        self._engine = Engine(reader, stepper, assignment, way, self._options)
        save = self._engine.save if persist else None
        self._checkpoint = Checkpoint(optimizer, (reader, stepper), save, self._engine.load)
        # The optimizer holds the penalty by these, and not the other way round: it is freed as soon as it is let go.
        self._stepper = ref(stepper)
        StepHooks(stepper, self, self._before_step, self._engine.after_step)
        vars(stepper)["__reduce_ex__"] = self._reduce

    @property
    def names(self) -> tuple[str, ...]:
        """The groups, in order."""
        return self._engine.state.names

    @property
    def balance(self) -> Balance:
        """What was measured and decided in the last step: a copy on the device, without a host read."""
        shown = self._engine.state.balance
        return Balance._make(part.clone() if isinstance(part, Tensor) else part for part in shown)

    def coefficients(self) -> dict[str, float]:
        """The coefficient of each group in the last step, by name; one host read."""
        state = self._engine.state
        return dict(zip(self.names, state.tensor(state.coefficients).tolist(), strict=True))

    def observe(self, **errors: Tensor | float) -> None:
        """Tell the errors of the groups' own predictions, lower is better; their mean counts at the next step.

        What becomes of them is up to the rule: ``ConflictAware`` compares them, ``Coherence`` does not. They stay in
        force until the next call. In distributed training every rank has to call it; the errors are averaged over the
        ranks that name the group.

        Args:
            **errors: For at least two groups a number >= 0, or a tensor with one element, which is detached.

        Raises:
            ValueError: If a group is unknown, only one is named, or an error is negative or not a scalar. On an
                accelerator a negative error is not read; it makes the step not count, as NaN does.
            TypeError: If an error is not a real number.
        """
        self._engine.observed.add(errors)

    @torch.no_grad()
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
            RuntimeError: If the rule needs the coherence of gradients, which norms do not tell.
            ValueError: If ``norms`` does not name exactly the groups; for errors as in :meth:`observe`.
        """
        if getattr(self.rule, "needs_coherence", True):
            raise RuntimeError(
                f"`coefficients_for` must have a rule that decides by norms and errors. Got {self.rule!r}, which needs "
                "the coherence of the gradients. Build with `rule=rules.ConflictAware()`, say."
            )
        if set(norms) != set(self.names):
            raise ValueError(
                f"`norms` must name exactly the groups. Got {', '.join(norms) or 'none'}. "
                f"The groups are: {', '.join(self.names)}."
            )
        if errors is not None:
            self.observe(**errors)
        home = self._engine.state.home
        values = torch.stack([torch.as_tensor(norms[name], dtype=wide(home)).to(home) for name in self.names])
        observed = average(self._engine.observed.take(home), self._options["process_group"])
        self._engine.ask(Reading(values, None, observed))
        return self.coefficients()

    def remove(self) -> None:
        """Take the penalty off: the optimizer steps as if it had never been there."""
        stepper = self._stepper()
        hooks = None if stepper is None else hooks_of(stepper)
        if stepper is not None and hooks is not None and hooks.owner is self:
            self._engine.after_step()
            self._checkpoint.remove()
            hooks.remove(stepper)
            vars(stepper).pop("__reduce_ex__", None)

    def __repr__(self) -> str:
        """The groups with their trainable sizes, the rule, where it acts, and the options that are not the defaults."""
        if self._stepper() is None:
            return "Penalty(on an optimizer that is gone)"
        groups = ", ".join(
            f"{name}: {sum(p.numel() for p in own if p.requires_grad):,}"
            for name, own in self._engine.parameters().items()
        )
        way = self._engine.way
        where = "on nothing" if way is None else f"on the update by {way.name}"
        shown = [f"{{{groups}}}", f"rule={self.rule!r}", "on the gradient" if self._engine.into_gradients else where]
        for name, parameter in inspect.signature(Penalty).parameters.items():
            if name in self._options.keys() - {"rule", "apply_to"} and self._options[name] != parameter.default:
                shown.append(f"{name}={self._options[name]!r}")
        return f"Penalty({', '.join(shown)})"

    def _before_step(self) -> None:
        self._checkpoint.take_in()
        self._engine.before_step()

    def _reduce(self, protocol: Any) -> tuple[Any, ...]:
        """Copies and pickles of the optimizer put the penalty on again: `Optimizer.__getstate__` drops hooks."""
        parts: Any = object.__reduce_ex__(self._stepper(), max(2, int(protocol)))
        return _rebuild, (*parts[:3], self._engine.parameters(), self._options, self._engine.save())

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return penalty_of, (self._stepper(),)


def _with_arguments_of(source: Callable[P, Any]) -> Callable[[Callable[..., T]], Callable[P, T]]:
    """The signature of ``source``, so that the options are written once."""

    def decorate(function: Callable[..., T]) -> Callable[P, T]:
        function.__signature__ = inspect.signature(source)  # type: ignore[attr-defined]
        return function

    return decorate


@_with_arguments_of(Penalty)
def attach(*args: Any, **options: Any) -> Penalty:
    """Put the penalty on an optimizer, which stays the object that you step.

    The mechanism of :class:`ConflictAwarePenalty` for code that has to keep its optimizer object, with the same
    arguments.

    Returns:
        The handle: ``observe``, ``coefficients``, ``balance``, ``remove``. It does not keep the optimizer.

    Raises:
        TypeError, ValueError, RuntimeError: As in :class:`ConflictAwarePenalty`.

    Example:
        >>> from gradbalance import rules
        >>> text, audio = torch.nn.Linear(4, 1), torch.nn.Linear(4, 1)
        >>> optimizer = torch.optim.AdamW([*text.parameters(), *audio.parameters()])
        >>> penalty = attach(optimizer, {"text": text, "audio": audio}, rule=rules.ByHand(text=0.5))
        >>> (text(torch.ones(1, 4)) + audio(torch.ones(1, 4))).sum().backward()
        >>> optimizer.step()
        >>> penalty.coefficients()
        {'text': 0.5, 'audio': 1.0}
    """
    return Penalty(*args, **options)


def penalty_of(optimizer: Optimizer) -> Penalty | None:
    """The penalty attached to an optimizer, or to the one it wraps, if any."""
    hooks = hooks_of(unwrap(optimizer)[1])
    return None if hooks is None else hooks.owner


def _rebuild(
    make: Callable[..., Any],
    args: tuple[Any, ...],
    state: dict[str, Any],
    groups: Groups,
    options: dict[str, Any],
    kept: dict[str, Any],
) -> Any:
    optimizer = make(*args)
    optimizer.__setstate__(state)
    with warnings.catch_warnings(action="ignore"):  # of a frozen group the original has warned
        penalty = Penalty(optimizer, groups, **options)
    penalty._engine.load(kept)
    return optimizer
