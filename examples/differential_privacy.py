"""The penalty with Opacus: it sees gradients only after Opacus has clipped and noised them, so privacy is as without.

Errors passed to ``observe`` would come from raw samples, outside the privacy budget: leave them out.

Run ``python examples/differential_privacy.py``.
"""

import torch
from opacus import PrivacyEngine
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

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
    audio, visual = torch.randn(16 * steps, 20), torch.randn(16 * steps, 5)
    data = TensorDataset(audio, visual, audio.mean(1, keepdim=True) + visual.mean(1, keepdim=True))
    model = Regression()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    penalty = ConflictAwarePenalty(optimizer, {"audio": model.audio, "visual": model.visual})
    engine = PrivacyEngine()
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=penalty,
        data_loader=DataLoader(data, batch_size=16),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    for audio, visual, target in loader:
        optimizer.zero_grad()
        mse_loss(model(audio, visual), target).backward()
        optimizer.step()
    print(f"epsilon {engine.get_epsilon(delta=1e-5):.2f}")
    return penalty.coefficients()


if __name__ == "__main__":
    print(main())
