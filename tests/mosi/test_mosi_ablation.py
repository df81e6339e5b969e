"""The study of the MOSI example: every run once, whatever interrupts it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.mosi import ablation
from benchmarks.mosi.noise import with_noise
from benchmarks.mosi.rows import config, study
from examples.mosi.build import balancing
from examples.mosi.config import Config
from examples.mosi.simulated import simulate
from tests.mosi import samples

ROOT = Path(__file__).resolve().parents[2]
TIMES = ("seconds", "cpu_seconds")
ROWS = study(("audio", "timing"))


def sample(*, noise=False):
    return samples.dataset(with_noise(simulate()) if noise else simulate(), limit=40)


def jobs(*names, seeds=2):
    common = {
        "data": "simulated",
        "text": "frozen",
        "epochs": 1,
        "hidden": 8,
        "fused": 8,
        "draws": 4,
    }
    return [
        ablation.Job(name, config(ROWS[name], **common, seed=seed))
        for seed in range(seeds)
        for name in names
    ]


@pytest.fixture(autouse=True)
def few(monkeypatch):
    data = {noise: sample(noise=noise) for noise in (False, True)}
    monkeypatch.setattr(ablation, "dataset_of", lambda place, split, noise, *_: data[noise])


@pytest.fixture
def out(tmp_path):
    return tmp_path / "lines.jsonl"


def without_times(lines):
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, "tests/mosi")
import test_mosi_ablation as t
data = t.sample()
t.ablation.dataset_of = lambda *_: data
t.ablation.run(t.jobs("A0", "A6", "T", seeds=200), Path(sys.argv[1]), 1)
"""


def test_a_killed_study_goes_on_without_loss_or_repetition(out, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, out], cwd=ROOT, env=os.environ | {"PYTHONPATH": "."}
    )
    try:
        while len(ablation.read(out)) < 4:
            assert process.poll() is None
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    ablation.repair(out)
    before = out.read_bytes()
    seeds = len(ablation.read(out)) // 3 + 2
    wanted = jobs("A0", "A6", "T", seeds=seeds)
    ablation.run(wanted, out, 1)
    assert out.read_bytes().startswith(before)
    assert [(line["row"], line["seed"]) for line in ablation.read(out)] == [
        (j.row, j.config.seed) for j in wanted
    ]
    whole = tmp_path / "whole.jsonl"
    ablation.run(wanted, whole, 1)
    assert without_times(ablation.read(whole)) == without_times(ablation.read(out))


def test_the_study_of_the_defaults_runs_the_example_as_it_comes():
    assert config(ROWS["L"], **ablation.STUDIES["default"]) == Config()


WORKING = """
import multiprocessing, time
from concurrent.futures import ProcessPoolExecutor
from benchmarks.mosi.ablation import begin
if __name__ == "__main__":
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), begin) as pool:
        pool.submit(print, "at work", flush=True).result()
        pool.submit(time.sleep, 600).result()
"""


def test_a_worker_ends_with_a_study_that_is_killed(tmp_path):
    script = tmp_path / "working.py"
    script.write_text(WORKING)
    environment = os.environ | {"PYTHONPATH": "."}
    with subprocess.Popen(
        [sys.executable, script], cwd=ROOT, env=environment, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"at work\n"
        process.kill()
        process.communicate(timeout=60)  # reads until the last process that could write has ended


def test_a_finished_study_runs_nothing(out, monkeypatch):
    ablation.run(jobs("A0"), out, 1)
    monkeypatch.setattr(ablation, "train", None)
    before = out.read_bytes()
    ablation.run(jobs("A0"), out, 1)
    assert out.read_bytes() == before


def test_half_a_line_is_dropped_and_its_run_done_again(out):
    ablation.run(jobs("A0"), out, 1)
    whole = ablation.read(out)
    with out.open("rb+") as file:
        file.truncate(out.stat().st_size - 10)
    assert ablation.read(out) == whole[:1]
    ablation.run(jobs("A0"), out, 1)
    assert without_times(ablation.read(out)) == without_times(whole)


def test_runs_of_other_settings_are_not_mixed(out):
    ablation.run(jobs("A0", seeds=1), out, 1)
    with pytest.raises(SystemExit, match=r"same settings\. Got other ones of row A0, seed 0"):
        ablation.run([ablation.Job("A0", Config(data="simulated"))], out, 1)


def test_a_run_does_not_depend_on_those_before_it(out, tmp_path):
    ablation.run(jobs("A0", "A6", "L"), out, 1)
    ablation.run(jobs("L", "A6", "A0")[::-1], tmp_path / "other.jsonl", 1)

    def sort(lines):
        return sorted(without_times(lines), key=lambda line: (line["row"], line["seed"]))

    assert sort(ablation.read(out)) == sort(ablation.read(tmp_path / "other.jsonl"))


@pytest.mark.parametrize("name", ROWS)
def test_every_row_gives_a_line_with_what_the_report_asks_for(name):
    line = ablation.work(jobs(name, seeds=1)[0])
    assert json.loads(json.dumps(line)) == line
    assert line["probes"].keys() == set(
        line["settings"]["modalities"] or ("text", "audio", "timing")
    )
    if len(line["probes"]) > 1:
        assert line["history"][0]["coefficients"].keys() == line["probes"].keys()
    if name == "A0":
        assert set(line["history"][0]["coefficients"].values()) == {1.0}


@pytest.mark.parametrize(
    ("name", "ame", "sl", "gm", "ge", "cp"),
    [
        ("A0", False, False, False, False, False),
        ("A1", True, False, False, False, False),
        ("A2", True, False, True, False, False),
        ("A3", True, False, True, True, False),
        ("A4", True, False, True, True, True),
        ("A5", True, True, True, True, False),
        ("A6", True, True, True, True, True),
        ("B2", False, False, True, False, False),
        ("B3", False, True, False, False, False),
        ("B4", False, False, True, True, False),
        ("B5", False, False, True, False, True),
        ("C1", False, False, True, True, True),
        ("C2", True, True, False, False, False),
        ("C5", True, True, True, False, True),
    ],
)
def test_each_row_of_the_paper_has_the_parts_of_its_name(name, ame, sl, gm, ge, cp):
    own = config(ROWS[name], stat=0.2)
    options = balancing(own, 10, ["audio"])
    assert (own.ame, own.stat > 0, own.balance) == (ame, sl, "paper" if gm else "off")
    if gm:
        assert (options["noise"], options["rule"].eta < 1) == ({"audio": 1.0} if ge else 0.0, cp)


def test_every_row_of_the_paper_has_its_numbers():
    assert [name for name, row in ROWS.items() if row.published] == [
        *("A0", "A6", "C2", "A5", "A1", "A2", "A3", "A4", "B2", "B3", "B4", "B5", "C1", "C5"),
    ]
