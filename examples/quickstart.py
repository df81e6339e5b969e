"""Two modalities, one of which starves the other: train plainly, then balanced.

Run ``python examples/quickstart.py``: it prints two tables and saves quickstart.png, in half a minute.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from gradbalance import ConflictAwarePenalty, Recorder

SIZES = {"text": 300, "audio": 10}


def make_data(n: int) -> tuple[dict[str, Tensor], Tensor]:
    """Labels, and a loud text that is soon learned by heart beside a quiet audio that says more about them."""
    labels = torch.randint(2, (n,)).float()
    signs = 2 * labels[:, None] - 1
    text = torch.randn(n, SIZES["text"])
    text[:, :10] += 0.3 * signs
    audio = 0.15 * (torch.randn(n, SIZES["audio"]) + 0.6 * signs)
    return {"text": text, "audio": audio}, labels


class Model(nn.ModuleDict):
    """A branch for each modality, whose logits are added up."""

    def __init__(self) -> None:
        super().__init__(
            {name: nn.Sequential(nn.Linear(d, 32), nn.ReLU(), nn.Linear(32, 1)) for name, d in SIZES.items()}
        )

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return torch.stack([branch(inputs[name])[:, 0] for name, branch in self.items()]).sum(0)


def train(title: str = "Balanced", steps: int = 1000, **options: float) -> Recorder:
    """Train, then print the accuracy on new samples and the balance."""
    torch.manual_seed(0)
    inputs, labels = make_data(400)
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = ConflictAwarePenalty(optimizer, {"text": model["text"], "audio": model["audio"]}, **options)
    with Recorder(optimizer) as recorder:
        for _ in range(steps):
            batch = torch.randint(len(labels), (32,))
            logits = model({name: x[batch] for name, x in inputs.items()})
            optimizer.zero_grad()
            binary_cross_entropy_with_logits(logits, labels[batch]).backward()
            optimizer.step()
    inputs, labels = make_data(4000)
    accuracy = ((model(inputs) > 0) == labels.bool()).float().mean()
    print(f"{title}: accuracy {accuracy:.3f}\n{recorder.summary()}\n")
    return recorder


if __name__ == "__main__":
    train("Plain, only watched", eta=1)
    train().plot("quickstart.png")
