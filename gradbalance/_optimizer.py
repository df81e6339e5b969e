"""ConflictAwarePenalty: the penalty as an optimizer around an optimizer."""

from collections.abc import Callable
from functools import wraps
from typing import Any, Unpack

from torch import Tensor
from torch.optim import Optimizer

from gradbalance._groups import Groups
from gradbalance._memory import Balance
from gradbalance._penalty import Penalty, penalty_of
from gradbalance._settings import Options, Settings


def _forwarded(name: str) -> Callable[..., Any]:
    @wraps(getattr(Optimizer, name))
    def method(self: "ConflictAwarePenalty", *args: Any, **kwargs: Any) -> Any:
        return getattr(self.optimizer, name)(*args, **kwargs)

    return method


def _live(name: str) -> Any:
    return property(
        lambda self: getattr(self.optimizer, name),
        lambda self, value: setattr(self.optimizer, name, value),
        lambda self: delattr(self.optimizer, name),
    )


class ConflictAwarePenalty(Optimizer):
    r"""An optimizer that balances the groups whose gradients dominate with the others, around any optimizer.

    At every step the gradient norms :math:`n_m` of the groups are compared. A group is in conflict with another if its
    share of their sum exceeds ``threshold`` times the other's and it is ahead of it: its gradients agree from step to
    step less than ``agreement`` times as much as the other's, or, where errors are observed, its error is lower. Its
    update is scaled by :math:`c_m = \lambda \max(c_{\min}, q_m \pi_m)` with the penalty
    :math:`\pi_m = \eta^{\kappa_m}`, :math:`\kappa_m` the fraction of the other groups in conflict, and the modulation
    :math:`q_m = 1 - \tanh(\alpha\,\varphi(r_m))` of its lead in errors (1 without errors). The factor
    :math:`\lambda \geq 1`, common to all, turns the damping of the dominant group into larger steps of the others as
    far as ``max_coefficient`` allows.

    It helps where a strong branch fits the training data, noise included, before a weak one has learned. It does
    nothing where the dominant branch is still learning, and cannot help where the weak one has little to add.
    Parameters of no group are never touched; fusion layers and joint heads belong to none.

    Everything it does not add itself is forwarded to the wrapped optimizer: schedulers, scalers, checkpoints and
    frameworks take it for what it wraps. Use this object, or the wrapped one, everywhere in the loop, not both in turn.

    Args:
        optimizer: The optimizer to wrap. Not LBFGS, which takes many gradients a step.
        groups: Maps names to modules or iterables of parameters: at least two, disjoint.
        alpha: Strength of the modulation by errors, >= 0 [P]. Nothing without errors.
        eta: Factor of a group in conflict with all others, in [0, 1]; 1 never damps. [P] 0.5.
        threshold: How many times another's share is a conflict, >= 1. [P] 1.
        smoothing: Weight of the past in the running means of shares, errors and agreements, in [0, 1). [P] 0.
        agreement: How much less a group's successive gradients must agree (in their cosine, over a small sample of
            their entries) than another's for a conflict without errors, in [0, 1]; None: the norms alone decide. [R]
            A dominant group whose gradients still agree is learning, and damping it costs accuracy.
        centred: Whether the modulation starts at no lead, :math:`\varphi(r) = r - 1` [R]; the paper's
            :math:`\varphi(r) = r` [P] jumps from 1 to 0.24 at equality.
        apply_to: ``"update"`` [R]: the learning rate of a group is scaled for the step, which works with every
            optimizer whose step is proportional to it, and scales decoupled weight decay too. ``"gradient"`` [P]: the
            gradient is scaled in place; Adam and its like cancel a constant factor there.
        norm: ``"l2"`` [P], ``"rms"`` (over the root of the number of entries) or ``"relative"`` (over the norm of the
            parameters) [R].
        min_coefficient: Lowest coefficient before they are raised, in [0, 1].
        max_coefficient: Highest coefficient, >= 1. [R] All rise together, as long as no norm times its coefficient
            exceeds the largest norm. [P] 1: the dominant group is damped. None: 20 on the update of
            ``torch.optim.SGD``, else 1, since a step of Adam and its like is long however small the gradient is.
        window: ``(start, stop)`` in optimizer steps between which the rule acts, ``stop`` None for no end; None for
            always. [P] epochs 0 to 25 of 30.
        noise: Standard deviation of Gaussian noise on each grouped gradient tensor inside the window, as a multiple
            of the tensor's own. [P] 1, from OGM-GE.
        max_norm: Clip the global norm of all parameters of the optimizer after the penalty, out of the norms taken
            anyway; None does not clip.
        generator: Source of the noise. On several ranks it is required and must have the same seed.
        process_group: Ranks over which observed errors are averaged; the default process group if None.
        persist: Whether ``state_dict`` holds the running means, inside ``param_groups[0]``.

    Raises:
        TypeError: If ``optimizer`` is not an optimizer, or ``groups`` or an option is of the wrong kind.
        ValueError: If a group is empty, overlaps another or is not in the optimizer; if an option is out of range; if
            the optimizer is LBFGS, or its step is not proportional to the learning rate in update mode.
        RuntimeError: At a step, if the optimizer no longer holds the groups' parameters (DeepSpeed ZeRO, FSDP1).

    Example:
        >>> import torch
        >>> model = torch.nn.ModuleDict({"text": torch.nn.Linear(4, 1), "audio": torch.nn.Linear(4, 1)})
        >>> adamw = torch.optim.AdamW(model.parameters(), lr=1e-3)
        >>> optimizer = ConflictAwarePenalty(adamw, dict(model.items()), agreement=None)
        >>> (10 * model["text"](torch.ones(1, 4)) + model["audio"](torch.ones(1, 4))).sum().backward()
        >>> optimizer.step()
        >>> optimizer.coefficients()
        {'text': 0.05, 'audio': 1.0}

    Reference:
        arXiv 2605.28575. We differ [R]: any number of groups, errors optional, the agreement of the gradients, running
        shares, a threshold above 1, and the update instead of the gradient; ``PAPER`` holds the paper's settings.
    """

    optimizer: Optimizer
    penalty: Penalty

    def __init__(self, optimizer: Optimizer, groups: Groups, **options: Unpack[Options]) -> None:
        # Optimizer.__init__ is not called: it would set up a second state beside the wrapped optimizer's.
        self.penalty = Penalty(optimizer, groups, Settings(**options))
        self.optimizer = optimizer

    def observe(self, **errors: Tensor | float) -> None:
        """See :meth:`Penalty.observe`."""
        self.penalty.observe(**errors)

    def coefficients(self) -> dict[str, float]:
        """The coefficient of each group in the last step, by name; one host read."""
        return self.penalty.coefficients()

    @property
    def balance(self) -> Balance:
        """What the rule saw and decided in the last step: a copy on the device, without a host read."""
        return self.penalty.balance

    def remove(self) -> None:
        """Take the penalty off: the wrapped optimizer steps as if it had never been there."""
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

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _rewrap, (type(self), self.optimizer)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.penalty!r}, {self.optimizer!r})"


def _rewrap(cls: type[ConflictAwarePenalty], optimizer: Optimizer) -> ConflictAwarePenalty:
    wrapper = cls.__new__(cls)
    wrapper.optimizer, wrapper.penalty = optimizer, penalty_of(optimizer)  # type: ignore[assignment]
    return wrapper
