"""Log the balance in the Hugging Face Trainer: ``trainer.add_callback(LogBalance(optimizer, trainer.log))``."""

from collections.abc import Callable

from transformers import TrainerCallback

from gradbalance import ConflictAwarePenalty


class LogBalance(TrainerCallback):
    """Logs norm, coherence and coefficient of each branch every so many optimizer steps.

    Args:
        optimizer: The one handed to the Trainer.
        log: Takes a dict: ``trainer.log`` for all that ``report_to`` names, or ``wandb.log``, say.
        every: Optimizer steps between two entries.
    """

    def __init__(
        self, optimizer: ConflictAwarePenalty, log: Callable[[dict], None], every: int = 50
    ) -> None:
        self.optimizer, self.log, self.every = optimizer, log, every

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0:
            balance = self.optimizer.balance
            named = [
                (q, getattr(balance, q).tolist()) for q in ("norms", "coherences", "coefficients")
            ]
            self.log(
                {
                    f"{q}/{name}": v
                    for q, vs in named
                    for name, v in zip(balance.names, vs, strict=True)
                }
            )
