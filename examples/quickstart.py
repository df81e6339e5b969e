"""An image branch beside a sensor of noise: train with AdamW alone, then balanced.

Run ``python examples/quickstart.py``: it prints two tables and saves quickstart.png, in half a minute.
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gradbalance import ConflictAwarePenalty, Recorder, rules

TRAIN, NOISE, SENSOR = 600, 0.3, 256  # images for training; noise on them; features of the sensor


def make_data() -> tuple[dict[str, Tensor], Tensor]:
    """Handwritten digits, and beside each image the noise of a sensor that measures nothing."""
    images, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
    images = images.float() / 16 - 0.3
    order = torch.randperm(len(labels))
    image = images + NOISE * torch.randn_like(images)
    return {"image": image[order], "sensor": torch.randn(len(labels), SENSOR)}, labels[order]


class Model(nn.Module):
    """A branch for each input, and a layer over both."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        self.sensor = nn.Sequential(nn.Linear(SENSOR, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        self.head = nn.Linear(128, 10)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.head(torch.cat([self.image(inputs["image"]), self.sensor(inputs["sensor"])], 1))


def train(title: str, rule: rules.Rule, epochs: int = 60) -> tuple[Recorder, list[float]]:
    """Train, then print what each branch did; with the accuracy on new samples after each epoch."""
    torch.manual_seed(0)
    inputs, labels = make_data()
    unseen = {name: x[TRAIN:] for name, x in inputs.items()}
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer = ConflictAwarePenalty(
        optimizer, {"image": model.image, "sensor": model.sensor}, rule=rule
    )
    accuracies = []
    with Recorder(optimizer) as recorder:
        for _ in range(epochs):
            for batch in torch.randperm(TRAIN).split(32):
                optimizer.zero_grad()
                cross_entropy(
                    model({name: x[batch] for name, x in inputs.items()}), labels[batch]
                ).backward()
                optimizer.step()
            is_right = model(unseen).argmax(1) == labels[TRAIN:]
            accuracies.append(is_right.float().mean().item())
    print(f"{title}: accuracy {accuracies[-1]:.3f}\n{recorder.summary()}\n")
    return recorder, accuracies


if __name__ == "__main__":
    _, alone = train("AdamW alone, only watched", rules.Watch())
    recorder, balanced = train("Balanced", rules.Useful())
    recorder.plot("quickstart.png", accuracy={"AdamW alone": alone, "balanced": balanced})
