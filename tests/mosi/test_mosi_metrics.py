"""The metrics of the MOSI example, against plain numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from examples.mosi.metrics import metrics

scores = st.floats(-4, 4, width=32)


def f1_by_hand(prediction, label):
    total = 0.0
    for kind in (False, True):
        hits = ((prediction == kind) & (label == kind)).sum()
        positives = (prediction == kind).sum() + (label == kind).sum()
        total += (label == kind).mean() * (2 * hits / positives if positives else 0.0)
    return total


@given(data=st.data(), n=st.integers(3, 30))
def test_the_metrics_are_those_of_the_field(data, n):
    prediction = data.draw(arrays(np.float32, n, elements=scores))
    label = data.draw(
        arrays(np.float32, n, elements=st.sampled_from([-3, -2.5, -1.2, -0.5, 0, 0.4, 1.5, 2, 3]))
    )
    label[:2] = [-1, 1]
    found = metrics(torch.from_numpy(prediction), torch.from_numpy(label))
    signed = label != 0
    expected = {
        "mae": np.abs(prediction - label).mean(),
        "acc2_nonneg": ((prediction >= 0) == (label >= 0)).mean(),
        "f1_nonneg": f1_by_hand(prediction >= 0, label >= 0),
        "acc2_nonzero": ((prediction > 0) == (label > 0))[signed].mean(),
        "f1_nonzero": f1_by_hand(prediction[signed] > 0, label[signed] > 0),
        "acc5": (np.round(prediction.clip(-2, 2)) == np.round(label.clip(-2, 2))).mean(),
        "acc7": (np.round(prediction.clip(-3, 3)) == np.round(label.clip(-3, 3))).mean(),
    }
    if prediction.std() > 1e-3:
        expected["corr"] = np.corrcoef(prediction.astype(float), label)[0, 1]
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-4)


def test_a_constant_prediction_has_no_correlation():
    label = torch.tensor([-1.0, 0.0, 2.0])
    assert metrics(torch.full((3,), 0.7), label)["corr"] == 0.0


@pytest.mark.parametrize("labels", [[0.0, 0.0, 0.0], [0.0]])
def test_a_metric_without_zeros_is_absent_where_all_labels_are_zero(labels):
    found = metrics(torch.linspace(-1, 2, len(labels)), torch.tensor(labels))
    absent = {"acc2_nonzero", "f1_nonzero"}
    assert not absent & found.keys()
    assert all(np.isfinite(value) for value in found.values())
    label = torch.tensor([*labels, 1.0])
    assert absent < metrics(torch.linspace(-1, 2, len(label)), label).keys()
