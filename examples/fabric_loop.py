"""The penalty in Fabric: wrap the optimizer before ``setup``; what ``setup`` gives back still has its methods.

Run ``python examples/fabric_loop.py``.
"""

import lightning
import torch
from torch import nn
from torch.nn.functional import mse_loss

from gradbalance import ConflictAwarePenalty


class Regression(nn.Module):
    """A branch for each modality, whose predictions are added up."""

    def __init__(self) -> None:
        super().__init__()
        self.audio, self.visual = nn.Linear(20, 1), nn.Linear(5, 1)

    def forward(self, audio, visual):
        return self.audio(audio) + self.visual(visual)


def main(steps: int = 100) -> dict[str, float]:
    """Train; the coefficients of the last step."""
    torch.manual_seed(0)
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    model = Regression()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    optimizer = ConflictAwarePenalty(optimizer, {"audio": model.audio, "visual": model.visual})
    model, optimizer = fabric.setup(model, optimizer)
    for _ in range(steps):
        audio, visual = torch.randn(16, 20), torch.randn(16, 5)
        target = audio.mean(1, keepdim=True) + visual.mean(1, keepdim=True)
        prediction = model(audio, visual)
        optimizer.zero_grad()
        fabric.backward(mse_loss(prediction, target))
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
    return optimizer.coefficients()


if __name__ == "__main__":
    print(main())
