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

    def __init__(self, optimizer: ConflictAwarePenalty, log: Callable, every: int = 50) -> None:
        self.optimizer, self.log, self.every = optimizer, log, every

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0:
            balance, row = self.optimizer.balance, {}
            for m, name in enumerate(balance.names):
                for quantity in ("norms", "coherences", "coefficients"):
                    row[f"{quantity}/{name}"] = float(getattr(balance, quantity)[m])
            self.log(row)
