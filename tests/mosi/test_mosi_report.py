"""The report of the MOSI study: its statistics, and its verdict."""

import json
import math
import re
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from benchmarks.mosi import ablation, compare, report
from benchmarks.mosi.compare import by_row, collapsed, difference, interval, metric, verdict
from benchmarks.mosi.document import Heading, Paragraph, Table, markdown
from benchmarks.mosi.probe import ridge
from benchmarks.mosi.rows import config, study
from benchmarks.mosi.tables import differences
from examples.mosi.simulated import simulate
from tests.mosi import samples

values = st.lists(st.floats(0.5, 1.5), min_size=2, max_size=12)


def runs(figures, row="A0", **more):
    epoch = {"dominance": 4.0, "dominance_after": 4.0}
    return {
        seed: {
            "row": row,
            "seed": seed,
            "mae": mae,
            "corr": 0.7,
            "acc2_nonzero": 0.8,
            "history": [epoch],
        }
        | more
        for seed, mae in enumerate(figures)
    }


@settings(max_examples=10)
@given(pairs=st.lists(st.tuples(st.floats(0.5, 1.5), st.floats(0.5, 1.5)), min_size=3, max_size=12))
def test_the_paired_difference_is_that_of_scipy(pairs):
    one, other = np.array(pairs).T
    gap = difference(runs(one), runs(other), metric("mae"))
    if np.ptp(one - other) < 1e-9:
        return
    expected = stats.ttest_rel(one, other)
    np.testing.assert_allclose(
        (gap.low, gap.high), expected.confidence_interval(0.95), rtol=1e-6, atol=1e-9
    )
    assert math.isclose(gap.mean, (one - other).mean(), abs_tol=1e-12)
    assert gap.p == stats.wilcoxon(one - other).pvalue


def test_only_the_seeds_of_both_rows_are_paired():
    one, other = runs([1.0, 2.0, 3.0]), runs([0.0, 0.0])
    gap = difference(one, {0: other[0], 1: other[1], 7: other[0]}, metric("mae"))
    assert (gap.mean, gap.seeds) == (1.5, 2)


def test_one_seed_has_no_interval_and_tells_nothing_apart():
    gap = difference(runs([1.0]), runs([0.5]), metric("mae"))
    assert (gap.low, gap.high, gap.distinguishable) == (-math.inf, math.inf, False)
    assert gap.told() == "+0.500 [no interval]"


def test_rows_without_a_common_seed_are_not_compared():
    here = runs([0.9, 0.91])
    elsewhere = {seed + 10: run for seed, run in here.items()}
    table = differences({"A0": here, "L": elsewhere}, study(()), 1.46, "A0")
    cells = table.rows[1][2:8]
    assert cells == ["no common seed", "–"] * 3


def test_equal_rows_have_p_1():
    assert difference(runs([1.0, 2.0]), runs([1.0, 2.0]), metric("mae")).p == 1


@given(figures=values)
def test_the_interval_holds_the_mean(figures):
    low, high = interval(np.array(figures))
    assert low <= np.mean(figures) + 1e-12
    assert high >= np.mean(figures) - 1e-12


@pytest.mark.parametrize(
    ("mae", "corr", "expected"), [(0.9, 0.7, False), (1.5, 0.7, True), (0.9, 0.29, True)]
)
def test_a_run_that_is_no_better_than_a_constant_collapsed(mae, corr, expected):
    assert collapsed({"mae": mae, "corr": corr}, 1.46) is expected


@pytest.mark.parametrize(
    ("full", "after", "told"),
    [
        (
            [0.80, 0.81, 0.79, 0.80],
            1.2,
            (r"MAE [^;]*: distinguishable;", "times after them: balanced"),
        ),
        (
            [0.80, 1.01, 0.79, 1.0],
            3.0,
            (r"MAE [^;]*: not distinguishable;", "times after them: still imbalanced"),
        ),
    ],
)
def test_the_verdict_follows_the_numbers(full, after, told):
    found = {
        "A0": runs([0.9] * 4),
        "A6": runs(full, "A6", history=[{"dominance": 4.0, "dominance_after": after}]),
    }
    text = " ".join(verdict(found, 1.46))
    assert f"MAE {difference(found['A6'], found['A0'], metric('mae')).told()}" in text
    for part in told:
        assert re.search(part, text)


def test_the_verdict_says_when_the_seeds_are_too_few():
    for seeds, told in ((5, True), (6, False)):
        found = {"A0": runs([0.9] * seeds), "A6": runs([0.8] * seeds)}
        assert ("an effect is not ruled out" in " ".join(verdict(found, 1.46))) is told


def test_the_verdict_names_the_rows_that_collapse_or_differ():
    found = {
        "A0": runs([0.9, 0.91, 0.92]),
        "A6": runs([0.9, 0.9, 0.9]),
        "Y": runs([1.6, 1.61, 1.6]),
    }
    text = " ".join(verdict(found, 1.46))
    assert "higher in Y alone (+0.693)" in text
    assert "Does a row collapse? Runs that did: Y alone (3 of 3)." in text


def test_what_lacks_its_rows_is_said():
    text = " ".join(verdict({"A6": runs([0.9])}, 1.46))
    assert "no verdict, it needs the baseline and the full model" in text
    assert "beat" not in text


def test_rows_are_held_against_text_alone_and_noise_against_none():
    found = {
        "T": runs([0.9, 0.91, 0.92]),
        "C2": runs([0.8, 0.81, 0.82, 0.83]),
        "L": runs([0.7, 0.7]),
        "NC2": runs([1.0, 1.01, 1.02]),
    }
    text = " ".join(verdict(found, 1.46))
    assert "beat text alone? Of 3 other rows, MAE is lower in AME+SL (-0.100)" in text
    assert re.search(r"default rule do to AME\+SL\? MAE -0.105 .* \(2 paired seeds\)", text)
    assert re.search(r"pure noise cost\? MAE \+0.200 .* \(3 paired seeds\)", text)
    assert "give back" not in text


def test_the_ridge_is_that_of_the_normal_equations():
    x, y = np.random.default_rng(0).normal(size=(2, 20, 3))[0], np.arange(20.0)
    z = np.column_stack([np.ones(20), (x - x.mean(0)) / x.std(0)])
    weights = np.linalg.solve(z.T @ z + 5 * np.diag([0, 1, 1, 1]), z.T @ y)
    np.testing.assert_allclose(ridge(x, y, 5, x)[0], z @ weights)


def test_a_constant_column_does_no_harm_to_the_ridge():
    x = np.column_stack([np.arange(5.0), np.ones(5)])
    np.testing.assert_allclose(
        ridge(x, x[:, 0], 0.1, x)[0], ridge(x[:, :1], x[:, 0], 0.1, x[:, :1])[0]
    )


def test_a_bar_in_a_cell_does_not_end_it():
    assert "| \\| |" in markdown([Heading("a"), Paragraph("b"), Table(["|"], [["c"]])])


@pytest.fixture
def lines(tmp_path, monkeypatch):
    """Two seeds of five rows, an epoch each, on a little simulated data."""
    data = samples.dataset(simulate(), limit=40)
    monkeypatch.setattr(ablation, "dataset_of", lambda *_: data)
    rows = study(("audio", "timing"))
    common = {
        "data": "simulated",
        "text": "frozen",
        "epochs": 2,
        "hidden": 8,
        "fused": 8,
        "draws": 4,
    }
    names = ("A0", "A6", "T", "audio", "timing")
    jobs = [ablation.Job(n, config(rows[n], **common, seed=seed)) for seed in (0, 1) for n in names]
    ablation.run(jobs, tmp_path / "lines.jsonl", 1)
    return tmp_path / "lines.jsonl"


def test_the_report_is_whole(lines, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["report", str(lines), "--data", "simulated"])
    report.main()
    text = lines.with_suffix(".md").read_text(encoding="utf-8")
    for title in ("Verdict", "Results", "Gradients", "Data", "Published results beside ours"):
        assert f"## {title}" in text
    assert "SIMULATED MOSI" in text
    for name in re.findall(r"\]\((.+?\.png)\)", text):
        assert (lines.parent / name).stat().st_size < 100_000
    assert "| full: AME+GM+GE+CP+SL | A6 | 2 |" in text
    gap = difference(*(by_row(ablation.read(lines))[row] for row in ("A6", "A0")), metric("mae"))
    assert gap.told() in text


def test_a_report_needs_lines_of_one_data_set(lines, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path / "none.jsonl")])
    with pytest.raises(SystemExit, match="`lines` must hold runs"):
        report.main()
    monkeypatch.setattr(sys, "argv", ["report", str(lines), "--data", "simulated"])
    lines.write_text(lines.read_text().replace("SIMULATED MOSI", "REAL", 1))
    with pytest.raises(SystemExit, match="`lines` must be of one data set and split"):
        report.main()


def test_an_unfinished_study_is_reported_too(lines, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["report", str(lines), "--data", "simulated"])
    kept = [line for line in lines.read_text().splitlines() if json.loads(line)["row"] == "T"]
    lines.write_text(kept[0] + "\n")
    report.main()
    assert "it needs the baseline and the full model" in lines.with_suffix(".md").read_text(
        encoding="utf-8"
    )


def test_the_limit_of_the_verdict_is_told():
    assert (
        f"limit {compare.IMBALANCED:g}" in verdict({"A0": runs([0.9]), "A6": runs([0.9])}, 1.46)[0]
    )
