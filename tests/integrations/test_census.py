"""The census of optimizers: it notices what is silent, its table has none, and its hard cases stay as they are."""

import re
import time
import warnings

import pytest
import torch
from torch.optim import SGD, AdamW

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from benchmarks.census import run
    from benchmarks.census.__main__ import RESULTS, tried
    from benchmarks.census.optimizers import listed
    from benchmarks.census.report import table
    from benchmarks.census.run import OUTCOMES, Verdict, verdict
from gradbalance import attach, rules
from tests import needs
from tests.contract.fixed import Branches

pytestmark = pytest.mark.filterwarnings("ignore")  # of the packages


def made(name):
    package, _, of = name.partition("/")
    warnings.simplefilter("ignore")
    needs(package)
    try:
        return dict(listed(package))[of]
    except ImportError as error:
        pytest.skip(str(error))


def adamw(model):
    return AdamW(model.parameters(), weight_decay=0.0)


def test_an_optimizer_that_follows_its_rate_works():
    found = verdict(adamw)
    assert found.outcome == "by learning rate"
    assert found.worst == pytest.approx((0.5, 1.0), abs=1e-4)


def test_a_penalty_without_effect_is_called_silent(monkeypatch):
    monkeypatch.setattr(run, "attach", lambda *args, **options: "Penalty")
    found = verdict(adamw)
    assert found.outcome == "SILENT"
    assert found.worst == (1.0, 1.0)
    assert "a.0.weight" in found.note
    assert "b.0.weight" not in found.note


def test_a_penalty_that_moves_other_groups_is_called_silent(monkeypatch):
    def on_all(optimizer, groups, rule, apply_to="update"):
        return attach(optimizer, groups, rule=rules.ByHand(a=0.5, b=0.5), apply_to=apply_to)

    monkeypatch.setattr(run, "attach", on_all)
    found = verdict(adamw)
    assert found.outcome == "SILENT"
    assert "b.0.weight" in found.note
    assert "a.0.weight" not in found.note


def test_what_does_not_train_by_itself_is_told_apart_from_what_is_refused():
    def fails(model):
        raise OSError("no such thing")

    assert verdict(fails) == Verdict("plain run fails", note="OSError: no such thing")
    assert verdict(lambda model: SGD(model.parameters(), lr=0.0)).note == "nothing moves"
    assert verdict(lambda model: torch.optim.LBFGS(model.parameters())).outcome == "refused"


def test_an_optimizer_that_takes_too_long_or_dies_stops_nothing():
    def slow(model):
        time.sleep(60)

    def dies(model):
        import os

        os._exit(1)

    assert tried(slow, 0.5).note == "more than 0 s"
    assert tried(dies, 60).note == "the process died"


def test_the_table_counts_and_shows_each():
    rows = [
        ("one", "First", Verdict("by learning rate", (0.5, 1.0))),
        ("one", "Second", Verdict("refused", note="because | of\nthis")),
        ("two", "Third", Verdict("SILENT", (1.0, 1.0), "a.0.weight")),
    ]
    text = table(rows)
    assert "| all | 3 | 1 | 0 | 0 | 1 | 0 | 1 | 0 |" in text
    assert "| First | by learning rate | 0.500 | 1.000 |  |" in text
    assert "| Second | refused |  |  | because / of this |" in text


def test_no_optimizer_in_the_published_table_is_silent():
    text = RESULTS.read_text()
    heads = [cell.strip() for cell in text.splitlines()[0].split("|")[2:-1]]
    row = re.search(r"^\| all \|(.*)\|$", text, re.MULTILINE)[1].split("|")
    counts = dict(zip(heads, map(int, row), strict=True))
    assert set(counts) == {"listed", *OUTCOMES}
    assert counts["listed"] > 250
    assert counts["SILENT"] == counts["fails in the step"] == 0
    assert counts["by learning rate"] + counts["by displacement"] > 200


@pytest.mark.parametrize("package", ["torch.optim", "pytorch_optimizer", "schedulefree"])
def test_the_published_table_lists_every_optimizer_of(package):
    warnings.simplefilter("ignore")
    needs(package)
    try:
        names = [name for name, _ in listed(package)]
    except ImportError as error:
        pytest.skip(str(error))
    section = RESULTS.read_text().split(f"\n## {package}\n")[1].split("\n## ")[0]
    assert names
    assert set(names) <= set(re.findall(r"^\| (\w+) \|", section, re.MULTILINE))


# Those that were wrong without a word, or broke in mid-run.
@pytest.mark.parametrize(
    ("name", "outcome"),
    [
        ("pytorch_optimizer/adafactor", "by displacement"),
        ("pytorch_optimizer/apollodqn", "by displacement"),
        ("pytorch_optimizer/avagrad", "by displacement"),
        ("pytorch_optimizer/adabound", "by displacement"),
        ("pytorch_optimizer/adamg", "by displacement"),
        ("pytorch_optimizer/gravity", "by displacement"),
        ("pytorch_optimizer/nero", "refused"),
        ("pytorch_optimizer/madgrad", "refused"),
        ("pytorch_optimizer/asgd", "refused"),
        ("pytorch_optimizer/lomo", "refused"),
        ("pytorch_optimizer/adahessian", "by learning rate"),
        ("pytorch_optimizer/demo", "by learning rate"),
        ("schedulefree/AdamWScheduleFree", "by learning rate"),
    ],
)
def test_the_hard_cases(name, outcome):
    assert verdict(made(name)).outcome == outcome


@pytest.mark.parametrize(
    "name",
    [
        "prodigyopt/Prodigy",
        *(f"dadaptation/DAdapt{kind}" for kind in ("AdaGrad", "Adam", "Adan", "Lion", "SGD")),
        *(f"pytorch_optimizer/dadapt{kind}" for kind in ("adagrad", "adam", "adan", "lion", "sgd")),
        "pytorch_optimizer/prodigy",
    ],
)
@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_learning_rate_free_ones_are_refused_at_construction(name, order):
    model = Branches()
    optimizer = made(name)(model)
    groups = {key: model.groups[key] for key in order}
    with pytest.raises(
        ValueError, match=f"(?s)`apply_to.*Got {type(optimizer).__name__}, .*Use another optimizer"
    ):
        attach(optimizer, groups)
