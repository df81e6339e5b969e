"""The penalty in Lightning: wrap the optimizer in ``configure_optimizers``; clipping, accumulation, resuming stay.

Run ``python examples/lightning_module.py``.
"""

import lightning
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from gradbalance import ConflictAwarePenalty, Recorder


class Regression(lightning.LightningModule):
    """A branch for each modality, whose predictions are added up."""

    def __init__(self) -> None:
        super().__init__()
        self.audio, self.visual = nn.Linear(20, 1), nn.Linear(5, 1)

    def training_step(self, batch, batch_idx):
        audio, visual, target = batch
        return mse_loss(self.audio(audio) + self.visual(visual), target)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return ConflictAwarePenalty(optimizer, {"audio": self.audio, "visual": self.visual})


class RecordBalance(lightning.Callback):
    """Records the balance of every step and prints it as a table at the end."""

    def on_train_start(self, trainer, module):
        self.recorder = Recorder(trainer.optimizers[0])

    def on_train_end(self, trainer, module):
        self.recorder.close()
        if trainer.is_global_zero:
            print(self.recorder.summary())


def main(steps: int = 100) -> dict[str, float]:
    """Train; the coefficients of the last step."""
    torch.manual_seed(0)
    audio, visual = torch.randn(1000, 20), torch.randn(1000, 5)
    data = TensorDataset(audio, visual, audio.mean(1, keepdim=True) + visual.mean(1, keepdim=True))
    module = Regression()
    trainer = lightning.Trainer(
        max_steps=steps,
        callbacks=[RecordBalance()],
        gradient_clip_val=1.0,
        accumulate_grad_batches=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, DataLoader(data, batch_size=16, shuffle=True))
    return module.optimizers().coefficients()


if __name__ == "__main__":
    print(main())
