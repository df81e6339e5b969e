"""ConflictAwarePenalty: the penalty as an optimizer around an optimizer."""

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

from torch import Tensor
from torch.optim import Optimizer

from gradbalance._engine.penalty import Penalty, penalty_of
from gradbalance._engine.state import Balance


def _forwarded(name: str) -> Callable[..., Any]:
    @wraps(getattr(Optimizer, name))
    def method(self: "ConflictAwarePenalty", *args: Any, **kwargs: Any) -> Any:
        return getattr(self.optimizer, name)(*args, **kwargs)

    return method


P = ParamSpec("P")


def _with_arguments_of(
    penalty: Callable[P, Any],
) -> Callable[[Callable[..., None]], Callable[Concatenate[Any, P], None]]:
    """The signature of the penalty, so that the options are written once; ``penalty`` tells the type checker alone."""

    def decorate(method: Callable[..., None]) -> Callable[Concatenate[Any, P], None]:
        method.__signature__ = inspect.signature(Penalty.__init__)  # type: ignore[attr-defined]
        return method

    return decorate


F = TypeVar("F", bound=Callable[..., Any])


def _documented_as(source: Callable[..., Any]) -> Callable[[F], F]:
    """The docstring of a method of the penalty for the one that calls it."""

    def decorate(method: F) -> F:
        method.__doc__ = source.__doc__
        return method

    return decorate


def _live(name: str) -> Any:
    return property(
        lambda self: getattr(self.optimizer, name),
        lambda self, value: setattr(self.optimizer, name, value),
        lambda self: delattr(self.optimizer, name),
    )


class ConflictAwarePenalty(Optimizer):
    r"""An optimizer that balances groups of parameters, around any optimizer: two lines, and the loop stays as it is.

    At every step the gradients of the groups are measured, a rule gives each group a coefficient, and what the step
    does to the group is scaled by it. The default rule, :class:`gradbalance.rules.Coherence`, compares how much the
    gradients of a group agree from step to step; its docstring says when that helps and when it does not.

    Parameters of no group are never touched; fusion layers and joint heads belong to none. Everything it does not add
    itself is forwarded to the wrapped optimizer: schedulers, scalers, checkpoints and frameworks take it for what it
    wraps. Use this object, or the wrapped one, everywhere in the loop, not both in turn.

    Args:
        optimizer: The optimizer to wrap. Not LBFGS, which takes many gradients a step.
        groups: Maps names to modules or iterables of parameters: at least two, disjoint.
        rule: From what was measured to coefficients, see :mod:`gradbalance.rules`; any function will do.
        apply_to: ``"update"`` [R]: what the step does to a group is scaled, by the learning rate where the step is
            proportional to it, else after the fact; decoupled weight decay too. ``"gradient"`` [P]: the gradient is
            scaled in place; Adam and most others but SGD cancel a constant factor there.
        smoothing: Weight of the past in the running means, in [0, 1). [P] 0.
        every: Measure and ask the rule at one step of so many, and keep the coefficients between.
        window: ``(start, stop)`` in optimizer steps between which the rule acts, ``stop`` None for no end; None for
            always. [P] epochs 0 to 25 of 30.
        noise: Standard deviation of Gaussian noise on each grouped gradient tensor inside the window, as a multiple
            of the tensor's own; one for all groups or, by name, for some. [P] 1, from OGM-GE.
        max_norm: Clip the global norm of all parameters of the optimizer after the penalty, out of the norms taken
            anyway; noise gets the same factor. None does not clip.
        generator: Source of the noise. On several ranks it is required and must have the same seed.
        process_group: Ranks over which observed errors are averaged; the default process group if None.
        persist: Whether ``state_dict`` holds what was measured, inside ``param_groups[0]``, by group name.

    Raises:
        TypeError: If ``optimizer`` is not an optimizer, or ``groups``, ``rule`` or an option is of the wrong kind.
        ValueError: If a group is empty, overlaps another or is not in the optimizer; if an option is out of range; if
            the optimizer is LBFGS, or its steps cannot be scaled for some parameters alone. At a step, if the rule
            gives something else than finite coefficients >= 0.
        RuntimeError: At a step, if the optimizer no longer holds the groups' parameters (DeepSpeed ZeRO, FSDP1).

    Example:
        >>> import torch
        >>> from gradbalance import rules
        >>> model = torch.nn.ModuleDict({"text": torch.nn.Linear(4, 1), "audio": torch.nn.Linear(4, 1)})
        >>> adamw = torch.optim.AdamW(model.parameters(), lr=1e-3)
        >>> optimizer = ConflictAwarePenalty(adamw, dict(model.items()), rule=rules.ByHand(text=0.1))
        >>> (10 * model["text"](torch.ones(1, 4)) + model["audio"](torch.ones(1, 4))).sum().backward()
        >>> optimizer.step()
        >>> optimizer.coefficients()
        {'text': 0.1, 'audio': 1.0}

    Reference:
        arXiv 2605.28575 for the idea and for ``rules.ConflictAware``; ``PAPER`` holds the paper's settings. We differ
        [R]: any number of groups, any rule, the update instead of the gradient, running means.
    """

    optimizer: Optimizer
    penalty: Penalty

    @_with_arguments_of(Penalty)
    def __init__(self, optimizer: Optimizer, *args: Any, **options: Any) -> None:
        # Optimizer.__init__ is not called: it would set up a second state beside the wrapped optimizer's.
        self.penalty = Penalty(optimizer, *args, **options)
        self.optimizer = optimizer

    @property
    def balance(self) -> Balance:
        """What was measured and decided in the last step: a copy on the device, without a host read."""
        return self.penalty.balance

    @_documented_as(Penalty.observe)
    def observe(self, **errors: Tensor | float) -> None:
        self.penalty.observe(**errors)

    @_documented_as(Penalty.coefficients)
    def coefficients(self) -> dict[str, float]:
        return self.penalty.coefficients()

    @_documented_as(Penalty.coefficients_for)
    def coefficients_for(
        self, norms: Mapping[str, Tensor | float], errors: Mapping[str, Tensor | float] | None = None
    ) -> dict[str, float]:
        return self.penalty.coefficients_for(norms, errors)

    @_documented_as(Penalty.remove)
    def remove(self) -> None:
        self.penalty.remove()

    # Everything below forwards to the wrapped optimizer.

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """One step of the wrapped optimizer, whose hooks apply the penalty."""
        return self.optimizer.step(*args, **kwargs)

    add_param_group = _forwarded("add_param_group")
    load_state_dict = _forwarded("load_state_dict")
    register_load_state_dict_post_hook = _forwarded("register_load_state_dict_post_hook")
    register_load_state_dict_pre_hook = _forwarded("register_load_state_dict_pre_hook")
    register_state_dict_post_hook = _forwarded("register_state_dict_post_hook")
    register_state_dict_pre_hook = _forwarded("register_state_dict_pre_hook")
    register_step_post_hook = _forwarded("register_step_post_hook")
    register_step_pre_hook = _forwarded("register_step_pre_hook")
    state_dict = _forwarded("state_dict")
    zero_grad = _forwarded("zero_grad")

    # Read live: `load_state_dict` of the wrapped optimizer replaces the lists, and a copy would go stale.
    param_groups = _live("param_groups")
    state = _live("state")
    defaults = _live("defaults")
    # GradScaler sets these before a fused step and deletes them after it.
    grad_scale = _live("grad_scale")
    found_inf = _live("found_inf")

    def __getattr__(self, name: str) -> Any:
        if name == "optimizer":  # not there yet: asking it would not end
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    # Frameworks look up the optimizer of a scheduler among those that they were given, some after unwrapping these.
    def __eq__(self, other: object) -> bool:
        return self.optimizer == other

    def __hash__(self) -> int:
        return hash(self.optimizer)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _rewrap, (type(self), self.optimizer)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.penalty!r}, {self.optimizer!r})"


def _rewrap(cls: type[ConflictAwarePenalty], optimizer: Optimizer) -> ConflictAwarePenalty:
    wrapper = cls.__new__(cls)
    wrapper.optimizer, wrapper.penalty = optimizer, penalty_of(optimizer)  # type: ignore[assignment]
    return wrapper
