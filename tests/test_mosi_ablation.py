"""The comparison of the MOSI example: every run once, whatever interrupts it, and a table of what there is."""

import json
import sys

import mosi_samples as samples
import pytest

from examples.mosi import ablation
from examples.mosi.simulated import simulate


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Runs the command on a few utterances, and returns the lines it left."""
    data = samples.dataset(simulate(), limit=40)
    monkeypatch.setattr(ablation, "prepare", lambda config: data)
    monkeypatch.setattr(ablation, "ROWS", {name: row | {"epochs": 1} for name, row in ablation.ROWS.items()})

    def command(*flags):
        monkeypatch.setattr(sys, "argv", ["ablation", "--out", str(tmp_path / "lines.jsonl"), *flags])
        ablation.main()
        return ablation.read(tmp_path / "lines.jsonl")

    return command


def test_a_killed_comparison_goes_on_without_loss_or_repetition(command, monkeypatch):
    whole = ablation.train

    def killed(config, dataset):
        if config.balance == "errors" and config.seed == 1:
            raise KeyboardInterrupt
        return whole(config, dataset)

    monkeypatch.setattr(ablation, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        command("--seeds", "2")
    monkeypatch.setattr(ablation, "train", whole)
    lines = command("--seeds", "2")
    assert sorted((line["row"], line["seed"]) for line in lines) == sorted(
        (r, s) for r in ablation.ROWS for s in (0, 1)
    )
    assert command("--seeds", "2") == lines


def test_a_run_of_the_comparison_does_not_depend_on_those_before_it(command, monkeypatch, tmp_path):
    first = {line["row"]: line["mae"] for line in command("--seeds", "1")}
    monkeypatch.setattr(ablation, "ROWS", dict(reversed(ablation.ROWS.items())))
    (tmp_path / "lines.jsonl").unlink()
    assert {line["row"]: line["mae"] for line in command("--seeds", "1")} == first


def test_the_table_gives_mean_and_deviation_and_names_the_data():
    run = dict.fromkeys(ablation.COLUMNS, 0.5) | {"data": "simulated", "row": "a"}
    text = {name: value for name, value in run.items() if "dominance" not in name} | {"row": "b"}
    lines = [run | {"mae": 1.0}, run | {"mae": 2.0}, text]
    head, _, a, b = ablation.table(json.loads(json.dumps(lines))).splitlines()
    assert head.startswith("| simulated data | seeds | MAE |")
    assert a.startswith("| a | 2 | 1.500 ± 0.707 | 0.500 ± 0.000 |")
    assert b.startswith("| b | 1 | 0.500 ± 0.000 |")
    assert b.endswith("| – | – |")
