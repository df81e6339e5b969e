"""The penalty on an optimizer: as a wrapper around it, or attached to it."""

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, SupportsIndex
from weakref import ref

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradbalance._optimizer.checkpoint import Checkpoint, reduce
from gradbalance._optimizer.choose import scaling_for
from gradbalance._optimizer.hooks import StepHooks, hooks_of
from gradbalance._optimizer.unwrap import check_optimizer, unwrap
from gradbalance._step.engine import Engine
from gradbalance._step.observed import checked_scalar
from gradbalance._step.options import SMOOTHING, USEFUL, ApplyTo, Options
from gradbalance._warn import warn
from gradbalance.balance import Balance
from gradbalance.groups import Groups, Membership
from gradbalance.rules import ConflictAware, Rule

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["PAPER", "ConflictAwarePenalty", "Penalty", "attach"]

#: Settings of the paper (arXiv 2605.28575): ``ConflictAwarePenalty(optimizer, groups, **PAPER)``.
#: Its window, epochs 0 to 25 of 30, depends on the number of steps of an epoch and is left to the
#: caller.
PAPER: dict[str, Any] = {
    "rule": ConflictAware(alpha=1.0, eta=0.5, threshold=1.0, centred=False),
    "smoothing": 0.0,
    "apply_to": "gradient",
    "noise": 1.0,
    "late": False,
}


class Penalty:
    """The penalty on one optimizer, as :func:`attach` returns it. It does not keep the optimizer.

    Args:
        optimizer: The optimizer.
        groups: As for :class:`ConflictAwarePenalty`; or the membership of a copy.
        options: Those of :class:`ConflictAwarePenalty`.

    Example:
        >>> text, audio = torch.nn.Linear(4, 1), torch.nn.Linear(4, 1)
        >>> optimizer = torch.optim.AdamW([*text.parameters(), *audio.parameters()])
        >>> attach(optimizer, {"text": text, "audio": audio}, every=2).names
        ('text', 'audio')
    """

    def __init__(self, optimizer: Optimizer, groups: Groups | Membership, options: Options) -> None:
        reader, stepper = unwrap(optimizer)
        check_optimizer(stepper)
        if penalty_of(stepper) is not None:
            raise ValueError(
                f"`optimizer` must not be wrapped twice. Got {type(stepper).__name__} with a "
                "penalty on it. Call its `remove()` first."
            )
        acts = getattr(options.rule, "acts", True)
        in_gradients = options.apply_to == "gradient"
        if acts and in_gradients and not isinstance(stepper, torch.optim.SGD):
            warn(
                f'`apply_to="gradient"` does nothing lasting under {type(stepper).__name__}, which '
                'cancels a constant factor on the gradient. Use `apply_to="update"`.'
            )
        membership = groups
        if not isinstance(membership, Membership):
            fewest = 2 if acts else 1  # one group alone can be watched
            membership = Membership(reader.param_groups, membership, fewest)
        scaling = None
        if acts and not in_gradients:
            scaling = scaling_for(optimizer, options.apply_to)
        self._options = options
        self._engine = Engine(reader, stepper, membership, scaling, options)
        self._checkpoint = Checkpoint(optimizer, (reader, stepper), self._engine, options.persist)
        # The optimizer holds the penalty by these, and not the other way round: it is freed as soon
        # as it is let go.
        self._reader = ref(reader)
        self._stepper = ref(stepper)
        before = (self._checkpoint.before_step, self._engine.before_step)
        StepHooks(stepper, self, before, self._engine.after_step)
        vars(stepper)["__reduce_ex__"] = self._reduce_optimizer

    @property
    def names(self) -> tuple[str, ...]:
        """The groups, in order."""
        return self._engine.state.names

    @property
    def balance(self) -> Balance:
        """What was measured and decided in the last step."""
        return self._engine.state.balance(self._engine.coefficients)

    def coefficients(self) -> dict[str, float]:
        """The coefficient of each group in the last step, by name."""
        return dict(zip(self.names, self._engine.coefficients, strict=True))

    def observe(self, /, **errors: Tensor | float) -> None:
        """Tell the errors of the groups' own predictions; their mean counts at the next step.

        Lower is better.

        What becomes of them is up to the rule: ``ConflictAware`` compares them, the default rule
        does not. They stay in force until the next call. In distributed training every rank has to
        call it; the errors are averaged over the ranks that name the group.

        Args:
            **errors: For at least two groups a number >= 0, or a tensor with one element, which is
                detached.

        Raises:
            ValueError: If a group is unknown, only one is named, or an error is negative or not a
                scalar. On an accelerator a negative error is not read; the step then does not
                count, as with NaN.
            TypeError: If an error is not a real number.
            RuntimeError: If the penalty was removed.
        """
        self._refuse_if_removed("observe")
        # A checkpoint that a loader has left in the param_groups comes first: it holds errors too.
        self._checkpoint.load_pending()
        self._engine.observed.add(errors)

    def coefficients_for(
        self,
        norms: Mapping[str, Tensor | float],
        errors: Mapping[str, Tensor | float] | None = None,
    ) -> dict[str, float]:
        """The coefficients that the rule gives for norms measured elsewhere; counts as a step.

        For engines that keep no gradient per parameter (DeepSpeed ZeRO, FSDP1): measure the norms
        with the engine's own means between backward and step, and scale the gradients or the
        learning rates by the result, see ``examples/deepspeed_zero.py``. Every rank gets the same
        coefficients if it passes the same norms.

        Args:
            norms: Gradient norm of each group.
            errors: As in :meth:`observe`, or None.

        Raises:
            RuntimeError: If the rule needs the coherence of gradients, which norms do not tell, or
                if the penalty was removed.
            ValueError: If ``norms`` does not name exactly the groups, or a norm is negative or not
                a scalar; for errors as in :meth:`observe`.
            TypeError: If a norm is not a real number.
        """
        self._refuse_if_removed("coefficients_for")
        if getattr(self._options.rule, "needs_coherence", True):
            raise RuntimeError(
                "`coefficients_for` must have a rule that decides by norms and errors. "
                f"Got {self._options.rule!r}, which needs the coherence of the gradients. "
                "Build with `rule=rules.ConflictAware()`, say."
            )
        for name, given in (("norms", norms), ("errors", {} if errors is None else errors)):
            if not isinstance(given, Mapping):
                raise TypeError(
                    f"`{name}` must map groups to numbers. Got {type(given).__name__}. "
                    "Pass a dict with a number for each group."
                )
        if set(norms) != set(self.names):
            raise ValueError(
                f"`norms` must name exactly the groups. Got {', '.join(norms) or 'none'}. "
                f"The groups are: {', '.join(self.names)}."
            )
        values = []
        for name in self.names:
            norm = float(checked_scalar(name, norms[name], "Pass the norm of its gradient."))
            if norm < 0:
                raise ValueError(
                    f"`{name}` must be a norm, >= 0. Got {norm}. Pass the norm of its gradient."
                )
            values.append(norm)
        self._engine.decide_for(values, errors)
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

    def _refuse_if_removed(self, method: str) -> None:
        if self._is_removed():
            raise RuntimeError(_REMOVED.format(method))

    def _is_removed(self) -> bool:
        stepper = self._stepper()
        return stepper is not None and penalty_of(stepper) is not self

    def __repr__(self) -> str:
        """The groups with their trainable sizes, the rule, where it acts, and changed options."""
        reader = self._reader()
        if reader is None:
            return "Penalty(on an optimizer that is gone)"
        if self._is_removed():
            return "Penalty(removed)"
        sizes = []
        for name, size in self._engine.membership.sizes(reader.param_groups).items():
            sizes.append(f"{name}: {size:,}")
        where = "on nothing"
        if not getattr(self._options.rule, "acts", True):
            where = "on nothing"
        elif self._options.apply_to == "gradient":
            where = "on the gradient"
        elif self._engine.scaling is not None:
            where = f"on the update by {self._engine.scaling.name}"
        shown = [f"{{{', '.join(sizes)}}}", f"rule={self._options.rule!r}", where]
        return f"Penalty({', '.join(shown + self._options.changed())})"

    def _reduce_optimizer(self, protocol: SupportsIndex) -> tuple[object, ...]:
        stepper = self._stepper()
        reader = self._reader()
        if stepper is None or reader is None:
            raise ReferenceError("The optimizer must exist to be copied. Got none. Keep it.")
        membership = self._engine.membership
        positions = membership.positions(reader.param_groups)
        groups = (self.names, positions, membership.frozen(reader.param_groups))
        saved = self._engine.save()
        return reduce(stepper, protocol, _put_on_again, (groups, self._options, saved))

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[object, ...]:
        stepper = self._stepper()
        if stepper is None:
            raise RuntimeError(
                "A penalty must be copied with its optimizer. Got one whose optimizer is gone. "
                "Keep the optimizer."
            )
        self._refuse_if_removed("copy")
        return penalty_of, (stepper,)


_REMOVED = (
    "`{}` must be called on the penalty of an optimizer. Got one that was removed. "
    "Wrap the optimizer again, or leave the call out."
)


def _put_on_again(
    optimizer: Optimizer,
    groups: tuple[tuple[str, ...], list[list[int | None]], dict[str, list[Tensor]]],
    options: Options,
    saved: dict[str, Any],
) -> None:
    reader, _ = unwrap(optimizer)
    membership = Membership.of_copy(reader.param_groups, *groups)
    with warnings.catch_warnings(action="ignore"):  # the original has warned
        penalty = Penalty(optimizer, membership, options)
    penalty._engine.load(saved)


def penalty_of(optimizer: Optimizer) -> Penalty | None:
    """The penalty attached to an optimizer, or to the one it wraps, if any."""
    hooks = hooks_of(unwrap(optimizer)[1])
    if hooks is not None and isinstance(hooks.owner, Penalty):
        return hooks.owner
    return None


class ConflictAwarePenalty(Optimizer):
    r"""An optimizer that balances groups of parameters, around any optimizer.

    At every step the gradients of the groups are measured, a rule gives each group a coefficient,
    and what the step does to the group is scaled by it. A *group* is the parameters of one branch
    of a model: an encoder, a modality, a tower, a head. The default rule,
    :class:`gradbalance.rules.Useful`, slows the groups whose gradients are of little use; its
    docstring says when that helps and when it does not. The class has the name of the paper's rule,
    :class:`gradbalance.rules.ConflictAware`, which ``PAPER`` sets.

    Parameters of no group are never touched; leave fusion layers and joint heads out. Everything
    that this class does not add is forwarded to the wrapped optimizer, reading, calling and
    writing: schedulers, scalers, checkpoints and frameworks take it for what it wraps. Use this
    object, or the wrapped one, everywhere in the loop, not both in turn.

    On the CPU a step is decided from its own gradients. On an accelerator it is decided from those
    of the step before, so that no step waits for the device; the first step has coefficients of 1,
    or those of a constant rule. A second ``step()`` on the same gradients is a second step: where
    gradients are scaled it scales them again, as a second ``clip_grad_norm_`` would clip again.

    Args:
        optimizer: The optimizer to wrap. Not LBFGS, which evaluates many gradients a step.
        groups: Maps names to modules or iterables of parameters: at least two, disjoint. For
            ``rules.Watch`` one is enough.
        rule: From what was measured to coefficients, see :mod:`gradbalance.rules`; any function
            will do.
        apply_to: ``"update"`` [R]: what the step does to a group is scaled, by the learning rate
            where the step is proportional to it, else by rescaling the finished update; decoupled
            weight decay too. ``"learning_rate"`` or ``"displacement"``: one of these two, without a
            trial of the optimizer. Both scale the step of the innermost optimizer: they are wrong
            inside a wrapper that changes its steps as a whole, one that normalises them for
            example. ``"gradient"`` [P]: the gradient is scaled in place; Adam and
            most others but SGD cancel a constant factor there.
        smoothing: Weight of the past in the running means, in [0, 1). [P] 0.
        every: Measure and call the rule at one of so many steps, and keep the coefficients between.
            Fewer steps tell less from chance: the default rule then acts later.
        window: ``(start, stop)`` in optimizer steps between which the rule acts, ``stop`` None for
            no end; None for always. [P] epochs 0 to 25 of 30.
        late: Whether a step is decided from the gradients of the step before. None: on an
            accelerator. False makes each measured step wait for the device there.
        noise: Standard deviation of Gaussian noise on each grouped gradient tensor inside the
            window, as a multiple of the tensor's own; one for all groups or, by name, for some. [P]
            1, from OGM-GE.
        max_norm: Clip the global norm of all parameters of the optimizer after the penalty; noise
            gets the same factor. None does not clip.
        generator: Source of the noise. On several ranks it is required and must have the same seed.
        process_group: Ranks over which observed errors are averaged; the default process group if
            None.
        persist: Whether ``state_dict`` holds what was measured, inside ``param_groups[0]``, by
            group name.

    Raises:
        TypeError: If ``optimizer`` is not an optimizer, or ``groups``, ``rule`` or an option is of
            the wrong kind. At a step, if the rule does not return real numbers.
        ValueError: If a group is empty, overlaps another or is not in the optimizer; if an option
            is out of range; if the optimizer is LBFGS, or its steps cannot be scaled for some
            parameters alone. At a step, if the rule returns anything but finite coefficients >= 0.
        RuntimeError: At a step, if the optimizer no longer holds the parameters of the groups
            (DeepSpeed ZeRO, FSDP1), or if it is called inside a CUDA graph capture.

    Example:
        >>> import torch
        >>> from gradbalance import rules
        >>> text, audio = torch.nn.Linear(4, 1), torch.nn.Linear(4, 1)
        >>> optimizer = torch.optim.AdamW([*text.parameters(), *audio.parameters()], lr=1e-3)
        >>> groups = {"text": text, "audio": audio}
        >>> optimizer = ConflictAwarePenalty(optimizer, groups, rule=rules.ByHand(text=0.1))
        >>> (10 * text(torch.ones(1, 4)) + audio(torch.ones(1, 4))).sum().backward()
        >>> optimizer.step()
        >>> optimizer.coefficients()
        {'text': 0.1, 'audio': 1.0}

    Reference:
        arXiv 2605.28575 for the idea and for ``rules.ConflictAware``; ``PAPER`` holds the paper's
        settings. We differ [R]: any number of groups, any rule, the update instead of the gradient,
        running means.
    """

    optimizer: Any  # an Optimizer, whose methods may take other arguments than torch's
    penalty: Penalty  # None in a copy that was made after `remove()`

    def __init__(
        self,
        optimizer: Optimizer,
        groups: Groups,
        rule: Rule = USEFUL,
        *,
        apply_to: ApplyTo = "update",
        smoothing: float = SMOOTHING,
        every: int = 1,
        window: tuple[int, int | None] | None = None,
        late: bool | None = None,
        noise: float | Mapping[str, float] = 0.0,
        max_norm: float | None = None,
        generator: torch.Generator | None = None,
        process_group: "ProcessGroup | None" = None,
        persist: bool = True,
    ) -> None:
        options = Options(
            rule=rule,
            apply_to=apply_to,
            smoothing=smoothing,
            every=every,
            window=window,
            late=late,
            noise=noise,
            max_norm=max_norm,
            generator=generator,
            process_group=process_group,
            persist=persist,
        )
        # Optimizer.__init__ is not called: it would set up a second state beside the wrapped one.
        vars(self)["penalty"] = Penalty(optimizer, groups, options)
        vars(self)["optimizer"] = optimizer

    @property
    def balance(self) -> Balance:
        """What was measured and decided in the last step."""
        return self._put_on("balance").balance

    def observe(self, /, **errors: Tensor | float) -> None:
        """Tell the errors of the groups' own predictions; see :meth:`Penalty.observe`."""
        self._put_on("observe").observe(**errors)

    def coefficients(self) -> dict[str, float]:
        """The coefficient of each group in the last step, by name."""
        return self._put_on("coefficients").coefficients()

    def coefficients_for(
        self,
        norms: Mapping[str, Tensor | float],
        errors: Mapping[str, Tensor | float] | None = None,
    ) -> dict[str, float]:
        """The coefficients for norms measured elsewhere; see :meth:`Penalty.coefficients_for`."""
        return self._put_on("coefficients_for").coefficients_for(norms, errors)

    def remove(self) -> None:
        """Take the penalty off: the optimizer steps as if it had never been there."""
        if self.penalty is not None:
            self.penalty.remove()

    def _put_on(self, method: str) -> Penalty:
        if self.penalty is None:
            raise RuntimeError(_REMOVED.format(method))
        return self.penalty

    # Everything below forwards to the wrapped optimizer. Its attributes (`param_groups`, `state`,
    # the `grad_scale` of GradScaler) are read and written there: a copy would go stale.

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """One step of the wrapped optimizer, whose hooks apply the penalty."""
        return self.optimizer.step(*args, **kwargs)

    def zero_grad(self, *args: object, **kwargs: object) -> None:
        """Reset the gradients, see :meth:`torch.optim.Optimizer.zero_grad`."""
        self.optimizer.zero_grad(*args, **kwargs)

    def add_param_group(self, *args: object, **kwargs: object) -> None:
        """Add a param_group, see :meth:`torch.optim.Optimizer.add_param_group`."""
        self.optimizer.add_param_group(*args, **kwargs)

    def state_dict(self, *args: object, **kwargs: object) -> Any:
        """The state of the wrapped optimizer, and of the penalty inside ``param_groups[0]``."""
        return self.optimizer.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: object, **kwargs: object) -> None:
        """Load what :meth:`state_dict` gave, or the ``state_dict`` of a plain optimizer."""
        self.optimizer.load_state_dict(*args, **kwargs)

    def register_step_pre_hook(self, *args: object, **kwargs: object) -> Any:
        """See :meth:`torch.optim.Optimizer.register_step_pre_hook`."""
        return self.optimizer.register_step_pre_hook(*args, **kwargs)

    def register_step_post_hook(self, *args: object, **kwargs: object) -> Any:
        """See :meth:`torch.optim.Optimizer.register_step_post_hook`."""
        return self.optimizer.register_step_post_hook(*args, **kwargs)

    def register_state_dict_pre_hook(self, *args: object, **kwargs: object) -> Any:
        """See :meth:`torch.optim.Optimizer.register_state_dict_pre_hook`."""
        return self.optimizer.register_state_dict_pre_hook(*args, **kwargs)

    def register_state_dict_post_hook(self, *args: object, **kwargs: object) -> Any:
        """See :meth:`torch.optim.Optimizer.register_state_dict_post_hook`."""
        return self.optimizer.register_state_dict_post_hook(*args, **kwargs)

    def register_load_state_dict_pre_hook(self, *args: object, **kwargs: object) -> Any:
        """See :meth:`torch.optim.Optimizer.register_load_state_dict_pre_hook`."""
        return self.optimizer.register_load_state_dict_pre_hook(*args, **kwargs)

    def register_load_state_dict_post_hook(self, *args: object, **kwargs: object) -> Any:
        """See :meth:`torch.optim.Optimizer.register_load_state_dict_post_hook`."""
        return self.optimizer.register_load_state_dict_post_hook(*args, **kwargs)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.optimizer.__setstate__(state)

    def _patch_step_function(self) -> None:
        self.optimizer._patch_step_function()

    def __getattr__(self, name: str) -> Any:
        if name == "optimizer":  # not there yet: to look for it would not end
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # A method that somebody patches (a scheduler, `step`) stays on the object that was patched,
        # and so does all that a subclass sets before there is an optimizer (LightningOptimizer).
        if hasattr(type(self), name) or name in vars(self) or "optimizer" not in vars(self):
            object.__setattr__(self, name, value)
        else:
            setattr(self.optimizer, name, value)

    def __delattr__(self, name: str) -> None:
        if name in vars(self):
            object.__delattr__(self, name)
        else:
            delattr(self.optimizer, name)

    # Frameworks look up the optimizer of a scheduler among those that they were given, some after
    # unwrapping these.
    def __eq__(self, other: object) -> bool:
        return bool(self.optimizer == other)

    def __hash__(self) -> int:
        return hash(self.optimizer)

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[object, ...]:
        return _rewrap, (type(self), self.optimizer)

    def __repr__(self) -> str:
        penalty = self.penalty or "Penalty(removed)"
        return f"{type(self).__name__}({penalty}, {self.optimizer!r})"


def _rewrap(cls: type[ConflictAwarePenalty], optimizer: Optimizer) -> ConflictAwarePenalty:
    wrapper = cls.__new__(cls)
    vars(wrapper)["penalty"] = penalty_of(optimizer)
    vars(wrapper)["optimizer"] = optimizer
    return wrapper


def attach(
    optimizer: Optimizer,
    groups: Groups,
    rule: Rule = USEFUL,
    *,
    apply_to: ApplyTo = "update",
    smoothing: float = SMOOTHING,
    every: int = 1,
    window: tuple[int, int | None] | None = None,
    late: bool | None = None,
    noise: float | Mapping[str, float] = 0.0,
    max_norm: float | None = None,
    generator: torch.Generator | None = None,
    process_group: "ProcessGroup | None" = None,
    persist: bool = True,
) -> Penalty:
    """Put the penalty on an optimizer, which stays the object that you step.

    The mechanism of :class:`ConflictAwarePenalty`, which documents the arguments, for code that has
    to keep its optimizer object.

    Returns:
        The handle: ``observe``, ``coefficients``, ``balance``, ``remove``. It does not keep the
        optimizer.

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
    options = Options(
        rule=rule,
        apply_to=apply_to,
        smoothing=smoothing,
        every=every,
        window=window,
        late=late,
        noise=noise,
        max_norm=max_norm,
        generator=generator,
        process_group=process_group,
        persist=persist,
    )
    return Penalty(optimizer, groups, options)
