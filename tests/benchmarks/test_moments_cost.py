"""The benchmark of the moments: its rivals compute the same, and its report has a place for what a GPU gives."""

import json
import os

import pytest
import torch
from torch.testing import assert_close

from benchmarks import _markdown
from benchmarks.moments import measure, report


def test_the_rivals_compute_what_they_are_compared_with():
    cases = measure.cases((8, 4, 3), "cpu", torch.float32)
    for names in (("naive, masked", "moments, masked"), ("Deep CORAL", "covariance loss")):
        ours, theirs = ([*function(*inputs)] for function, inputs in map(cases.__getitem__, names))
        # Deep CORAL divides by n - 1, and so does torch.cov.
        assert_close(
            ours, [value / (1 if "naive" in names[0] else (31 / 32) ** 2) for value in theirs]
        )
    (variance, mean), found = (
        function(*inputs) for function, inputs in (cases["var_mean"], cases["moments"])
    )
    assert_close([mean, variance], [*found])


def test_the_triton_kernels_are_asked_for_during_the_call_alone(monkeypatch):
    monkeypatch.delenv("GRADBALANCE_TRITON", raising=False)
    assert measure.in_triton(lambda: os.environ["GRADBALANCE_TRITON"])() == "1"
    with pytest.raises(ZeroDivisionError):
        measure.in_triton(lambda: 1 / 0)()
    assert "GRADBALANCE_TRITON" not in os.environ


def test_small_calls_are_timed_more_often(monkeypatch):
    rounds = []

    def interleaved(calls, n, device):
        rounds.append(n)
        return {name: torch.ones(n, dtype=torch.float64) for name in calls}

    monkeypatch.setattr(measure, "interleaved", interleaved)
    monkeypatch.setattr(measure, "peak_memory", lambda call, device: 0)
    monkeypatch.setattr(measure, "runs", lambda function, inputs: (None, None))
    found = measure.measure_size((2, 3), "cpu", torch.float32, 3)
    assert set(rounds) == {3 * measure.MORE_ROUNDS}
    assert found["ratios"]["moments, masked / naive, masked"] == [1.0, 1.0, 1.0]
    assert not any("Triton" in pair for pair in found["ratios"])


def test_the_report_shows_what_the_gpu_gave():
    figures = json.loads(report.JSON.read_text())
    *_, size = figures["sizes"].values()
    for case in size["cases"].values():
        case |= {"launches_forward": 70, "launches_both": 93}
    assert report.report(figures, {}).count(_markdown.NOT_RUN) == 15
    cases = {
        **size["cases"],
        report.TRITON: {**size["cases"]["moments"], "launches_forward": 2, "launches_both": 3},
    }
    ratios = {
        **size["ratios"],
        f"{report.TRITON} / naive, masked": [0.1, 0.25, 0.3],
        f"{report.TRITON} / moments, masked, compiled": [0.5, 0.6, 0.7],
    }
    given = {**size, "cases": cases, "ratios": ratios, "bandwidth / copy": 0.83}
    shown = report.report(
        figures, {"moments": {"sizes": {report.LARGEST: given, "b": {"error": "no"}}}}
    )
    assert _markdown.NOT_RUN not in shown
    assert _markdown.FAILED not in shown
    assert "| 2 / 1 |" in shown
    assert "| 0.83 |" in shown
    assert "| 0.25 | 0.25 to 0.25 |" in shown


def test_kernels_that_fail_on_the_gpu_leave_the_other_figures():
    figures = json.loads(report.JSON.read_text())
    *_, size = figures["sizes"].values()
    given = {**size, "cases": {**size["cases"], report.TRITON: {"error": "no"}}}
    shown = report.report(figures, {"moments": {"sizes": {report.LARGEST: given}}})
    assert shown.count(_markdown.FAILED) == 5
    parts = {"moments": {"sizes": {report.LARGEST: size}}, "triton": {"error": "died"}}
    assert report.report(figures, parts).count(_markdown.FAILED) == 5
