"""Linear probes: how well the frozen output of each encoder alone predicts the label."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from examples.mosi.data import Dataset
from examples.mosi.metrics import metrics
from examples.mosi.model import Adapter, Model, pool
from examples.mosi.train import predict

ALPHAS = 10.0 ** np.arange(-1, 6)


def diagnostics(model: Model, dataset: Dataset, names: list[str]) -> dict[str, Any]:
    """The probes and, for a model whose latents are noisy, the MAE at their mean, where it was not trained."""
    found: dict[str, Any] = {"probes": probes(model, dataset, names)}
    if model.noisy and isinstance(model.text, Adapter):
        model.noisy = False
        index = dataset.corpus.split["test"]
        found["mae_at_mean"] = metrics(
            predict(model, dataset, "test", names), dataset.corpus.labels[index]
        )["mae"]
        model.noisy = True
    return found


def probes(model: Model, dataset: Dataset, names: list[str]) -> dict[str, dict[str, float]]:
    """Test MAE and Corr of a ridge on each encoder's mean-pooled output; its penalty is chosen on validation."""
    outputs = {
        part: pooled(model, dataset, index, names) for part, index in dataset.corpus.split.items()
    }
    y = {
        part: dataset.corpus.labels[index].double().numpy()
        for part, index in dataset.corpus.split.items()
    }
    results = {}
    for name in outputs["train"]:
        x = {part: values[name] for part, values in outputs.items()}
        predictions = [
            ridge(x["train"], y["train"], alpha, x["valid"], x["test"]) for alpha in ALPHAS
        ]
        _, test = min(predictions, key=lambda both: np.abs(both[0] - y["valid"]).mean())
        results[name] = {
            "mae": float(np.abs(test - y["test"]).mean()),
            "corr": correlation(test, y["test"]),
        }
    return results


@torch.inference_mode()
def pooled(
    model: Model, dataset: Dataset, index: Tensor, names: list[str]
) -> dict[str, np.ndarray]:
    """The mean-pooled output of each encoder for the utterances `index`, in their order, [n, width].

    A text encoder that is trained is left out: it would cost as much as half an epoch.
    """
    device = next(model.parameters()).device
    model.eval()
    chunks = dataset.tokens.lengths[index].argsort(stable=True).split(64)
    parts = []
    for chunk in chunks:
        batch = dataset.batch(index[chunk], names).to(device)
        part = {
            name: pool(latent.z, batch.masks[name]) for name, latent in model.encode(batch).items()
        }
        if isinstance(model.text, Adapter):
            part["text"] = pool(model.text(batch.text, batch.mask), batch.mask)
        parts.append(part)
    order = torch.cat(chunks).argsort()
    return {
        name: torch.cat([part[name] for part in parts])[order].double().cpu().numpy()
        for name in parts[0]
    }


def ridge(x: np.ndarray, y: np.ndarray, alpha: float, *others: np.ndarray) -> list[np.ndarray]:
    """Predictions for `others` by the ridge of y on the standardised columns of x, with an unpenalised constant."""
    mean, std = x.mean(0), x.std(0)
    scale = np.where(std > 1e-9, std, np.inf)
    z = (x - mean) / scale
    weights = np.linalg.solve(z.T @ z + alpha * np.eye(z.shape[1]), z.T @ (y - y.mean()))
    return [(other - mean) / scale @ weights + y.mean() for other in others]


def correlation(prediction: np.ndarray, label: np.ndarray) -> float:
    """Pearson's; 0 for a constant prediction."""
    return float(np.corrcoef(prediction, label)[0, 1]) if prediction.std() > 1e-9 else 0.0
