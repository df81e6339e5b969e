"""The penalty in Lightning: one line in ``callbacks``; clipping, accumulation, logs and resuming stay its own.

Run ``python examples/lightning_module.py``.
"""

import lightning
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from gradbalance.integrations.lightning import BalanceCallback


class Regression(lightning.LightningModule):
    """A branch for each modality, whose predictions are added up."""

    def __init__(self) -> None:
        super().__init__()
        self.audio, self.visual = nn.Linear(20, 1), nn.Linear(5, 1)

    def training_step(self, batch, batch_idx):
        audio, visual, target = batch
        return mse_loss(self.audio(audio) + self.visual(visual), target)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def main(steps: int = 100) -> dict[str, float]:
    """Train; the coefficients of the last step."""
    torch.manual_seed(0)
    audio, visual = torch.randn(1000, 20), torch.randn(1000, 5)
    data = TensorDataset(audio, visual, audio.mean(1, keepdim=True) + visual.mean(1, keepdim=True))
    balance = BalanceCallback({"audio": "audio", "visual": "visual"})
    trainer = lightning.Trainer(
        max_steps=steps,
        callbacks=[balance],
        gradient_clip_val=1.0,
        accumulate_grad_batches=2,
        logger=False,  # whatever stands here gets the balance too
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(Regression(), DataLoader(data, batch_size=16, shuffle=True))
    return balance.penalty.coefficients()


if __name__ == "__main__":
    print(main())
