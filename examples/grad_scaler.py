"""The penalty with mixed precision and loss scaling: one optimizer object in ``unscale_`` and ``step``, no more.

Run ``python examples/grad_scaler.py``.
"""

import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.nn.utils import clip_grad_norm_

from gradbalance import ConflictAwarePenalty


def main(steps: int = 100) -> dict[str, float]:
    """Train; the coefficients of the last step."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = nn.ModuleDict({"audio": nn.Linear(20, 1), "visual": nn.Linear(5, 1)}).to(device)
    optimizer = ConflictAwarePenalty(
        torch.optim.AdamW(model.parameters(), lr=1e-2), dict(model.items())
    )
    scaler = torch.amp.GradScaler(device)
    for _ in range(steps):
        audio, visual = torch.randn(16, 20, device=device), torch.randn(16, 5, device=device)
        target = audio.mean(1, keepdim=True) + visual.mean(1, keepdim=True)
        optimizer.zero_grad()
        with torch.autocast(device, dtype=torch.float16):
            prediction = model["audio"](audio) + model["visual"](visual)
        scaler.scale(mse_loss(prediction.float(), target)).backward()
        # The wrapper here too: GradScaler would unscale a second time for `step(optimizer)` if this were the inner one.
        scaler.unscale_(optimizer)
        clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)  # a step skipped for an infinity does not count
        scaler.update()
    return optimizer.coefficients()


if __name__ == "__main__":
    print(main())
