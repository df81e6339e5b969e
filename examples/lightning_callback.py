"""Log the balance to the logger of Lightning's Trainer, TensorBoard or W&B: ``Trainer(callbacks=[LogBalance()])``."""

import lightning


class LogBalance(lightning.Callback):
    """Logs norm, coherence and coefficient of each branch every so many optimizer steps.

    Args:
        every: Optimizer steps between two entries.
        index: Which of the Trainer's optimizers is the balanced one.
    """

    def __init__(self, every: int = 50, index: int = 0) -> None:
        self.every, self.index = every, index

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step % self.every == 0:
            balance, row = trainer.optimizers[self.index].balance, {}
            for m, name in enumerate(balance.names):
                for quantity in ("norms", "coherences", "coefficients"):
                    row[f"{quantity}/{name}"] = float(getattr(balance, quantity)[m])
            for logger in trainer.loggers:
                logger.log_metrics(row, step=trainer.global_step)
