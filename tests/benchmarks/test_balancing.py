"""The grid of the benchmark of balancing goes on where it stopped, and its report pairs the seeds."""

import json
import math

import numpy as np
import pytest
import torch

from benchmarks._statistics import interval
from benchmarks.balancing import cells, grid, report, rivals, runs, testbeds
from benchmarks.balancing.model import score
from benchmarks.balancing.runs import Results, Run
from tests.benchmarks.tiny import TINY


@pytest.fixture(autouse=True)
def tiny_testbed(monkeypatch):
    monkeypatch.setitem(testbeds.TESTBEDS, "tiny", TINY)


@pytest.fixture
def pretend(monkeypatch):
    """Trainings that take no time: the score of a run is what a function says."""

    def with_scores(score_of):
        def fake(run):
            value = score_of(run)
            scores = dict.fromkeys(["valid", "test", "best_valid", "best_test"], value)
            return run._asdict() | scores | {"seconds": 1.0}

        monkeypatch.setattr(runs, "train", fake)

    return with_scores


RUNS = [Run("tiny", "none", "SGD", 0.02, None, seed) for seed in range(4)]


def test_a_killed_benchmark_goes_on_where_it_stopped(monkeypatch, tmp_path):
    trained = []

    def interrupted(run):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(run)
        return run._asdict() | {"valid": 0.5}

    monkeypatch.setattr(runs, "train", interrupted)
    path = tmp_path / "runs.jsonl"
    with pytest.raises(KeyboardInterrupt):
        Results(path).complete(RUNS)
    path.write_text(path.read_text() + '{"testbed": "tiny", "ru')  # killed while it wrote a line
    results = Results(path)
    assert list(results) == RUNS[:2]

    monkeypatch.setattr(
        runs, "train", lambda run: trained.append(run) or run._asdict() | {"valid": 0.5}
    )
    results.complete(RUNS)
    assert trained == RUNS
    assert list(Results(path)) == RUNS


def test_rate_and_knob_are_those_best_on_validation_and_each_rule_has_its_own(pretend, tmp_path):
    best = {"none": (0.04, None), "by hand": (0.08, 3.0)}
    pretend(lambda run: 0.5 + (best[run.rule] == (run.lr, run.knob)) + 0.1 * (run.knob == 3.0))
    results = Results(tmp_path / "runs.jsonl")
    part = grid.Part("SGD", ("tiny",), ("none",), at_best=True)
    grid.measure(results, part)
    measured = {run[1:5] for run in results if run.seed in grid.SEEDS}
    assert measured == {("none", "SGD", 0.04, None)}
    grid.measure(results, grid.Part("SGD", ("tiny",), ("by hand",), lr=0.08))
    measured = {run[1:5] for run in results if run.seed in grid.SEEDS and run.rule == "by hand"}
    assert measured == {("by hand", "SGD", 0.08, 3.0)}


def test_a_rate_that_is_given_is_not_tuned(pretend, tmp_path):
    pretend(lambda run: 0.5)
    results = Results(tmp_path / "runs.jsonl")
    grid.measure(results, grid.Part("SGD", ("tiny",), ("none",), lr=0.5))
    assert [(run.lr, run.seed) for run in results] == [(0.5, seed) for seed in grid.SEEDS]


def test_every_rate_is_measured_if_none_is_named(pretend, tmp_path):
    pretend(lambda run: 0.5)
    results = Results(tmp_path / "runs.jsonl")
    grid.measure(results, grid.Part("SGD", ("tiny",), ("none",)))
    assert {run.lr for run in results if run.seed in grid.SEEDS} == set(runs.RATES["SGD"])
    assert {run.seed for run in results} == {*grid.SEEDS, *grid.TUNING}


def test_every_part_of_the_grid_names_testbeds_and_rivals():
    for part in grid.PARTS:
        assert set(part.testbeds) <= set(testbeds.TESTBEDS)
        assert set(part.rules) <= set(rivals.RIVALS)


def test_the_interval_is_students():
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 4.302653 / 3**0.5))
    assert math.isnan(interval([1.0])[1])


def found(rule, seed, test, lr=1e-2, **others):
    base = {"testbed": "C0", "rule": rule, "optimizer": "AdamW", "lr": lr, "knob": None}
    scores = {"test": test, "valid": test, "best_test": test + 0.1, "best_valid": test}
    return base | scores | {"seed": seed, "seconds": 1.0 + (rule != "none")} | others


def as_runs(lines):
    return {Run(*(line[field] for field in Run._fields)): line for line in lines}


TUNED = [
    found(rule, seed, test, lr)
    for seed in grid.TUNING
    for rule, best in (("none", 1e-2), ("Useful", 1e-3))
    for lr in runs.RATES["AdamW"]
    for test in [0.6 if lr == best else 0.5]
]
LINES = [
    *TUNED,
    *(found("none", s, t, lr) for s, t in ((400, 0.5), (401, 0.7)) for lr in (1e-3, 1e-2)),
    *(found("Useful", s, t, 1e-2) for s, t in ((401, 0.9), (400, 0.6), (402, 0.0))),
    *(found("Useful", s, t, 1e-3) for s, t in ((400, 0.8), (401, 0.8))),
]


def test_changes_pair_the_seeds_of_a_rule_with_those_without_balancing():
    known = cells.Cells(as_runs(LINES))
    change = known.change("C0", lr=1e-2)
    assert (change.mean, change.seeds) == (pytest.approx(15), 2)
    assert known.change("C0", "OGM-GE") is None


def test_each_rule_is_tuned_for_itself():
    known = cells.Cells(as_runs(LINES))
    assert known.rate("C0", "none") == 1e-2
    assert known.rate("C0", "Useful") == 1e-3
    assert known.tuned("C0").mean == pytest.approx(100 * (0.8 - 0.6))


def test_no_rate_is_chosen_before_all_were_tried_with_all_seeds():
    missing = as_runs(LINES)
    missing.pop(Run("C0", "none", "AdamW", 3e-2, None, grid.TUNING[0]))
    assert math.isnan(cells.Cells(missing).rate("C0", "none"))


def test_the_span_goes_from_the_worst_rate_to_the_best():
    known = cells.Cells(as_runs(LINES))
    assert known.span("C0", "Useful", "AdamW", (1e-3, 1e-2)) == pytest.approx((50.0, 80.0))
    assert known.span("C0", "Useful", "AdamW", (1e-3, 1e-2, 3e-2)) is None


def test_p_is_that_of_students_paired_test():
    change = cells.Change.of([0.01, 0.02, 0.03])
    assert change.p == pytest.approx(0.0741799)  # t = 2 / (1 / sqrt 3), two degrees of freedom


def test_holm_stops_at_the_first_that_cannot_be_told():
    tested = {
        name: cells.Change(1.0, 0.5, p, 10)
        for name, p in (("a", 0.001), ("b", 0.03), ("c", 0.04), ("d", 0.001))
    }
    assert cells.holm(tested) == {"a", "d"}  # b would need .05 / 2, c .05


def test_drawing_anew_gives_the_change_of_the_mean_correlation_first():
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(40, 3, generator=generator)
    outputs = [
        [target + spread * torch.randn(40, 3, generator=generator) for _ in range(3)]
        for spread in (0.5, 2.0)
    ]
    ours, others = (
        {seed: {"predictions": runs.packed(output)} for seed, output in enumerate(arm)}
        for arm in outputs
    )
    change, low, high = cells.redrawn(ours, others, target.numpy(), draws=200)
    expected = [np.mean([score(output, target) for output in arm]) for arm in outputs]
    assert change == pytest.approx(100 * (expected[0] - expected[1]), abs=0.1)
    assert low < change < high


def test_the_report_tells_every_table_out_of_a_few_runs():
    text = report.describe(as_runs(LINES))
    assert "+15.0 ± 63.5 (n=2)" in text
    assert "| speech beside noise (C0) | 60.0 | +20.0 ± 127.1 (n=2) |" in text


def test_a_branch_slowed_by_hand_is_shown_by_its_factor():
    by_hand = {0.3: 0.4, 0.1: 0.3, 0.001: 0.6}
    at = {"testbed": "H", "lr": 3e-2}
    lines = [
        found(rule, s, t) | at for rule, t in (("none", 0.5), ("Useful", 0.4)) for s in (400, 401)
    ]
    lines += [
        found("a slower noisy branch", s, t) | at | {"knob": factor}
        for factor, t in by_hand.items()
        for s in (400, 401)
    ]
    known = as_runs(lines)
    shown = report.slowed(cells.Cells(known), known)
    assert "| 0.3 by hand | 0.1 by hand | 0.001 by hand |" in shown[0]
    changes = [cell.partition(" ")[0].strip("*") for cell in shown[2].split(" | ")[2:]]
    assert changes == ["−10.0", "−10.0", "−20.0", "+10.0"]


def test_a_run_is_one_line_with_both_epochs():
    line = runs.train(Run("tiny", "none", "AdamW", 1e-2, None, 0))
    assert 1 <= line["best_epoch"] <= TINY.epochs
    assert line["best_valid"] >= line["valid"]
    json.dumps(line)
