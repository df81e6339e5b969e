"""The metrics of the field, each on all utterances except where its name says that zeros are dropped."""

import torchmetrics.functional as M
from torch import Tensor


def metrics(prediction: Tensor, label: Tensor) -> dict[str, float]:
    """MAE, Corr, both Acc-2 and F1, Acc-5 and Acc-7; the Corr of a constant prediction is 0.

    Where all labels are 0 the metrics without zeros are left out.

    Args:
        prediction: [n], any real numbers.
        label: [n], in [-3, 3].
    """
    signed = label != 0
    nonneg, nonzero = (prediction >= 0, label >= 0), (prediction[signed] > 0, label[signed] > 0)
    constant = min(prediction.std(correction=0), label.std(correction=0)) < 1e-6
    values = {
        "mae": M.mean_absolute_error(prediction, label),
        "corr": 0.0 if constant else M.pearson_corrcoef(prediction, label),
        "acc2_nonneg": M.accuracy(*nonneg, task="binary"),
        "f1_nonneg": weighted_f1(*nonneg),
        "acc2_nonzero": M.accuracy(*nonzero, task="binary") if signed.any() else None,
        "f1_nonzero": weighted_f1(*nonzero) if signed.any() else None,
        "acc5": rounded_accuracy(prediction, label, 2),
        "acc7": rounded_accuracy(prediction, label, 3),
    }
    return {name: float(value) for name, value in values.items() if value is not None}


def weighted_f1(prediction: Tensor, label: Tensor) -> Tensor:
    return M.f1_score(
        prediction.long(), label.long(), task="multiclass", num_classes=2, average="weighted"
    )


def rounded_accuracy(prediction: Tensor, label: Tensor, limit: int) -> Tensor:
    """Share of utterances in the right one of 2 * limit + 1 classes after rounding (halves to even, as numpy does)."""
    classes = [x.clamp(-limit, limit).round().long() + limit for x in (prediction, label)]
    return M.accuracy(*classes, task="multiclass", num_classes=2 * limit + 1, average="micro")
