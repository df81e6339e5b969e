"""The penalty in the Trainer of Hugging Face transformers, as one line in ``callbacks=[...]``."""

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from gradbalance._step.options import ApplyTo, Options
from gradbalance.integrations._attached import Attached, GroupsOrPatterns
from gradbalance.penalty import Penalty
from gradbalance.recorder import Recorder
from gradbalance.rules import Rule

try:
    from transformers import PrinterCallback, ProgressCallback, TrainerCallback
    from transformers.trainer_callback import CallbackHandler
except ImportError as error:
    raise ImportError(
        "`gradbalance.integrations.transformers` must have transformers and accelerate. "
        f"Got: {error}. Run `pip install transformers accelerate`."
    ) from error

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["BalanceCallback"]


class BalanceCallback(TrainerCallback):
    """Balances the groups in the Trainer, and shows what each of them does.

    When the training begins it attaches the penalty to the optimizer that the Trainer has made,
    plain, wrapped by accelerate or sharded by FSDP2. What was measured is in the Trainer's own
    checkpoints, and ``resume_from_checkpoint`` goes on with it. Whenever the Trainer logs a loss,
    norms, coherences, coefficients and so on go where the loss goes, under
    ``gradbalance/<quantity>/<group>``. What is wrong with a group is warned of after 20 steps, and
    at the end :meth:`gradbalance.Recorder.summary` is printed.

    With ``rule=rules.Watch()`` it only looks.

    Args:
        groups: Maps names to modules, to parameters, or to patterns: the name of a module or
            parameter, a glob over the names of parameters, or a list of these, as for
            :func:`gradbalance.groups_by_name`. Take modules or patterns where FSDP2 replaces the
            parameters.
        rule: The rule; this and the following as for :class:`gradbalance.ConflictAwarePenalty`.
        apply_to: What is scaled.
        smoothing: Weight of the past in the running means.
        every: Measure at one of so many steps.
        window: The steps between which the rule acts.
        late: Whether a step is decided from the gradients of the step before.
        noise: Standard deviation of noise on the gradients.
        max_norm: Clips after the penalty, which the Trainer's own ``max_grad_norm`` does before it.
        generator: Source of the noise.
        process_group: Ranks over which observed errors are averaged.
        persist: Whether checkpoints hold what was measured.

    Attributes:
        penalty: What :func:`gradbalance.attach` returned, for ``observe`` in ``compute_loss``, say.
            None before the training.
        recorder: The :class:`gradbalance.Recorder` of the training, None before it.

    Raises:
        TypeError: If ``groups`` is not a mapping, or an option is of the wrong kind.
        ValueError: If an option is out of its range. When the training begins, as for
            ``ConflictAwarePenalty``, and if a pattern matches nothing.

    Example:
        >>> from gradbalance import rules
        >>> towers = {"vision": "*.vision_tower.*", "language": "*.language_model.*"}
        >>> callback = BalanceCallback(towers, rule=rules.Watch())  # Trainer(callbacks=[callback])
        >>> callback.penalty is None
        True
    """

    def __init__(
        self,
        groups: GroupsOrPatterns,
        rule: Rule = Options.rule,
        *,
        apply_to: ApplyTo = "update",
        smoothing: float = Options.smoothing,
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
        self._attached = Attached(groups, options)

    @property
    def penalty(self) -> Penalty | None:
        """The penalty on the optimizer, None before the training."""
        return self._attached.penalty

    @property
    def recorder(self) -> Recorder | None:
        """The record of the training, None before it."""
        return self._attached.recorder

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach the penalty: by now the optimizer is wrapped, sharded and loaded."""
        optimizer = kwargs["optimizer"]
        self._attached.bring(optimizer, state.stateful_callbacks.get(self._attached.key))
        self._attached.attach([optimizer], kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Warn early of what is wrong."""
        if state.is_world_process_zero:
            self._attached.look(state.global_step)
        self._save(state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save with the Trainer."""
        self._save(state, control)

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Log whenever the Trainer logs a training loss."""
        scalars = self._attached.scalars()
        if logs is None or "loss" not in logs or not scalars:
            return
        state.log_history.append({**scalars, "epoch": state.epoch, "step": state.global_step})
        # Not to the console, where two dozen numbers would hide the loss.
        left_out = (type(self), PrinterCallback, ProgressCallback)
        for callback in _callbacks():
            if not isinstance(callback, left_out):
                callback.on_log(args, state, control, logs=dict(scalars), **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Print the summary."""
        if state.is_world_process_zero:
            print(self._attached.table())  # noqa: T201

    def _save(self, state: Any, control: Any) -> None:
        # A sharded checkpoint is loaded into what the live optimizer holds, before any callback is
        # called, and would lose what was measured. The Trainer's own state has it too.
        if control.should_save:
            saved = self._attached.sharded_state()
            if saved is not None:
                state.stateful_callbacks[self._attached.key] = saved


def _callbacks() -> list[TrainerCallback]:
    """The callbacks of the Trainer that is calling, its reporters among them.

    They are looked up on the stack, as the Trainer passes neither them nor itself.
    """
    frame = sys._getframe(1)
    while frame.f_back is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, CallbackHandler):
            return list(owner.callbacks)
        frame = frame.f_back
    return []
