"""The penalty in Lightning, as one line in ``Trainer(callbacks=[...])``."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from gradbalance._step.options import ApplyTo, Options
from gradbalance.integrations._attached import Attached, GroupsOrPatterns
from gradbalance.penalty import Penalty
from gradbalance.recorder import Recorder
from gradbalance.rules import Rule

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError(
        "`gradbalance.integrations.lightning` must have lightning. "
        f"Got: {error}. Run `pip install lightning`."
    ) from error

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["BalanceCallback"]


class BalanceCallback(Callback):
    """Balances the groups in Lightning, and shows what each of them does.

    It attaches the penalty to what ``configure_optimizers`` returns; of several optimizers to the
    one that has the groups, for which automatic and manual optimization are alike. What was
    measured is in Lightning's own checkpoints, and ``fit(ckpt_path=...)`` goes on with it. Norms,
    coherences, coefficients and so on go to the loggers of the Trainer with ``log_dict``, under
    ``gradbalance/<quantity>/<group>``. What is wrong with a group is warned of after 20 steps, and
    at the end :meth:`gradbalance.Recorder.summary` is printed.

    With ``rule=rules.Watch()`` it only looks.

    Args:
        groups: Maps names to modules, to parameters, or to patterns over the names in the
            LightningModule: the name of a module or parameter, a glob over the names of parameters,
            or a list of these, as for :func:`gradbalance.groups_by_name`.
        rule: The rule; this and the following as for :class:`gradbalance.ConflictAwarePenalty`.
        apply_to: What is scaled.
        smoothing: Weight of the past in the running means.
        every: Measure at one of so many steps.
        window: The steps between which the rule acts.
        late: Whether a step is decided from the gradients of the step before.
        noise: Standard deviation of noise on the gradients.
        max_norm: Clips after the penalty, which ``Trainer(gradient_clip_val=...)`` does before it.
        generator: Source of the noise.
        process_group: Ranks over which observed errors are averaged.
        persist: Whether checkpoints hold what was measured.

    Attributes:
        penalty: What :func:`gradbalance.attach` returned, for ``observe`` in ``training_step``,
            say. None before the training.
        recorder: The :class:`gradbalance.Recorder` of the training, None before it.

    Raises:
        TypeError: If ``groups`` is not a mapping, or an option is of the wrong kind.
        ValueError: If an option is out of its range. When the training begins, as for
            ``ConflictAwarePenalty``, and if a pattern matches nothing.

    Example:
        >>> from gradbalance import rules
        >>> groups = {"text": "text_encoder", "audio": "audio_encoder"}
        >>> callback = BalanceCallback(groups, rule=rules.Watch())  # Trainer(callbacks=[callback])
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

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach the penalty: the optimizers are made, and their states are loaded next."""
        self._attached.attach(trainer.optimizers, pl_module)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Log, and warn early of what is wrong."""
        # As Lightning's own monitors do: to log dozens of numbers at each step is slow.
        if trainer.loggers and trainer._logger_connector.should_update_logs:
            pl_module.log_dict(self._attached.scalars())
        if trainer.is_global_zero:
            self._attached.look(trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the summary."""
        if trainer.is_global_zero:
            print(self._attached.table())  # noqa: T201
