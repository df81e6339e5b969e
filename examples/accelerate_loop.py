"""The penalty in Accelerate: wrap the optimizer before ``prepare``; it acts on whole steps, not on micro-batches.

Run ``python examples/accelerate_loop.py`` or ``accelerate launch examples/accelerate_loop.py``.
"""

import tempfile

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from gradbalance import ConflictAwarePenalty, rules


class Regression(nn.Module):
    """A branch for each modality."""

    def __init__(self) -> None:
        super().__init__()
        self.audio, self.visual = nn.Linear(20, 1), nn.Linear(5, 1)

    def forward(self, audio, visual):
        return self.audio(audio), self.visual(visual)


def main(steps: int = 100) -> dict[str, float]:
    """Train, save, load; the coefficients of the last step."""
    accelerator = Accelerator(gradient_accumulation_steps=2)
    torch.manual_seed(0)
    model = Regression()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    groups = {"audio": model.audio, "visual": model.visual}
    penalty = ConflictAwarePenalty(
        optimizer, groups, rules.ConflictAware()
    )  # the rule that compares errors
    audio, visual = torch.randn(32 * steps, 20), torch.randn(32 * steps, 5)
    data = TensorDataset(audio, visual, audio.mean(1, keepdim=True) + visual.mean(1, keepdim=True))
    model, optimizer, loader = accelerator.prepare(model, penalty, DataLoader(data, batch_size=16))
    for audio, visual, target in loader:
        with accelerator.accumulate(model):
            heard, seen = model(audio, visual)
            accelerator.backward(mse_loss(heard + seen, target))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            penalty.observe(
                audio=mse_loss(heard, target), visual=mse_loss(seen, target)
            )  # averaged until the step
            optimizer.step()
            optimizer.zero_grad()
    with tempfile.TemporaryDirectory() as folder:
        accelerator.save_state(folder)
        accelerator.load_state(folder)
    return penalty.coefficients()


if __name__ == "__main__":
    print(main())
