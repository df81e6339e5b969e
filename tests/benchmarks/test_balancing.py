"""The grid of the benchmark of balancing goes on where it stopped, and its report pairs the seeds."""

import json
import math

import pytest

from benchmarks._statistics import interval
from benchmarks.balancing import cells, goals, grid, report, rivals, runs, testbeds
from benchmarks.balancing.runs import APART, Results, Run
from tests.benchmarks.tiny import TINY


@pytest.fixture(autouse=True)
def tiny_bed(monkeypatch):
    monkeypatch.setitem(testbeds.TESTBEDS, "tiny", TINY)


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


def test_what_stands_in_the_record_is_not_run_again(monkeypatch, tmp_path):
    record = tmp_path / "record.jsonl"
    record.write_text(json.dumps(RUNS[0]._asdict() | {"valid": 0.5}) + "\n")
    monkeypatch.setattr(runs, "train", lambda run: run._asdict() | {"valid": 0.6})
    results = Results(tmp_path / "runs.jsonl", record)
    results.complete(RUNS[:2])
    assert [found["valid"] for found in results.values()] == [0.5, 0.6]
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 1


def test_the_learning_rate_and_the_knob_are_those_best_on_validation(monkeypatch, tmp_path):
    def fake(run):
        return run._asdict() | {
            "valid": {0.04: 0.6}.get(run.lr, 0.5) + {3.0: 0.1}.get(run.knob, 0.0)
        }

    monkeypatch.setattr(runs, "train", fake)
    results = Results(tmp_path / "runs.jsonl")
    grid.measure(results, grid.Part("SGD", ("tiny",), ("none", "by hand"), seeds=range(2)))
    chosen = {run[1:5] for run in results if run.seed not in grid.TUNING}
    assert chosen == {("none", "SGD", 0.04, None), ("by hand", "SGD", 0.04, 3.0)}


def test_a_rate_that_is_given_is_not_tuned(monkeypatch, tmp_path):
    monkeypatch.setattr(runs, "train", lambda run: run._asdict() | {"valid": 0.5})
    results = Results(tmp_path / "runs.jsonl")
    grid.measure(results, grid.Part("SGD", ("tiny",), ("none",), lr=0.5, seeds=range(2)))
    assert [(run.lr, run.seed) for run in results] == [(0.5, 0), (0.5, 1)]


def test_a_rule_with_a_rate_of_its_own_takes_the_best_one_for_itself(monkeypatch, tmp_path):
    def fake(run):
        return run._asdict() | {
            "valid": float(run.lr == (0.01 if run.rule == "Coherence" else 0.04)),
            "test": run.lr,
        }

    monkeypatch.setattr(runs, "train", fake)
    results = Results(tmp_path / "runs.jsonl")
    for own, rule in ((False, "none"), (True, "Coherence")):
        grid.measure(results, grid.Part("SGD", ("tiny",), (rule,), seeds=range(200, 202), own=own))
    known = cells.Cells(results)
    assert [known.rate("tiny", "SGD", rule) for rule in ("none", "Coherence")] == [0.04, 0.01]
    assert known.own("tiny", "Coherence", "SGD").mean == pytest.approx(100 * (0.01 - 0.04))


def test_every_part_of_the_grid_names_testbeds_and_rivals():
    for part in grid.PARTS:
        assert set(part.testbeds) <= set(testbeds.TESTBEDS)
        assert set(part.rules) <= {*rivals.RIVALS, APART}


def test_the_interval_is_students():
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 4.302653 / 3**0.5))
    assert math.isnan(interval([1.0])[1])


def found(rule, seed, test, testbed="C0", **others):
    base = {
        "testbed": testbed,
        "rule": rule,
        "optimizer": "AdamW",
        "lr": 1e-2,
        "knob": None,
        "seed": seed,
        "seconds": 1.0,
    }
    scores = {
        "test": test,
        "valid": test,
        "probes": [test, 0.1],
        "missing": [0.1, test],
        "coefficients": [2.0, 1.0],
    }
    return base | scores | others


def as_runs(lines):
    return {Run(*(line[field] for field in Run._fields)): line for line in lines}


LINES = [
    found("none", 90, 0.6),
    found("none", 90, 0.5, lr=1e-3),
    *(found("none", s, t) for s, t in ((200, 0.5), (201, 0.7))),
    *(found("Coherence", s, t) for s, t in ((201, 0.9), (200, 0.6), (202, 0.0))),
    *(found(APART, s, 0.8, alone=[0.9, 0.1]) for s in (200, 201)),
]


def test_changes_pair_the_seeds_of_a_rule_with_those_without_balancing():
    known = cells.Cells(as_runs(LINES))
    assert known.rate("C0", "AdamW") == 1e-2
    change = known.change("C0", "Coherence")
    assert (change.mean, change.seeds) == (pytest.approx(15), 2)
    whole, probes = known.headroom("C0")
    assert whole.mean == pytest.approx(30)  # the best alone is more than what they add up to
    assert probes[0].mean == pytest.approx(20)


def test_a_goal_is_met_or_not_by_the_mean():
    met = {goal.what: goal.met for goal in goals.goals(cells.Cells(as_runs(LINES)))}
    assert met == {
        "AdamW, speech beside noise (C0) at 0.01: at least +6.0": True,
        "AdamW at the best rate: nowhere significantly worse by more than 0.3": True,
    }


def test_the_report_tells_every_table_out_of_a_few_runs():
    text = report.describe(as_runs(LINES))
    assert "+15.0 ± 63.5 (n=2)" in text
    assert "2 of 2 met" in text
