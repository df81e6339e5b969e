"""The command and the run folder of the MOSI example: doors, disks, damage, seeds, logs."""

import csv
import json
import resource
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

import pytest
import torch

from examples.mosi import __main__ as command
from examples.mosi import run, train
from examples.mosi.config import Config
from examples.mosi.simulated import simulate
from tests import needs
from tests.mosi import samples
from tests.mosi.test_mosi_train import SMALL, fail_at, flat, settings

FLAGS = [flag for name, value in SMALL.items() for flag in (f"--{name.replace('_', '-')}", value)]


@pytest.fixture(scope="module")
def data():
    return samples.dataset(simulate(), limit=20)


@pytest.fixture
def start(data, monkeypatch, capsys):
    """Runs the command in this process; returns its exit status, output and errors."""
    monkeypatch.setattr(train, "prepare", lambda config: data)

    def start(*flags):
        settings = [] if "--resume" in flags else FLAGS
        monkeypatch.setattr(sys, "argv", ["mosi", *map(str, [*settings, *flags])])
        status = command.main()
        return status, *capsys.readouterr()

    return start


def test_the_first_line_waits_for_no_heavy_import():
    code = "import sys, examples.mosi.__main__; print({'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert (done.stdout, done.returncode) == ("set()\n", 0)


def test_runs_that_start_in_the_same_second_have_folders_of_their_own(start, monkeypatch):
    folders = []
    monkeypatch.setattr(command, "runs", lambda config, out, *_, **__: folders.append(out) or 1 / 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            start()
    assert folders[0] != folders[1]


def test_the_end_of_a_run_says_what_to_do_next(start, tmp_path):
    _, output, _ = start("--out", tmp_path / "run")
    lines = output.splitlines()
    assert lines[0].endswith("cpu, 1 thread.")
    assert [line.split()[:2] for line in lines if line.startswith("epoch")] == [
        ["epoch", "0"],
        ["epoch", "1"],
        ["epoch", "2"],
    ]
    assert "Non0_F1_score" in output
    assert f"python -m examples.mosi.predict {tmp_path}/run" in output
    status, again, _ = start("--resume", tmp_path / "run")
    assert status == 0
    assert "Non0_F1_score" in again


def test_an_out_that_cannot_be_written_is_refused_before_any_work(tmp_path, monkeypatch, data):
    (tmp_path / "file").touch()
    monkeypatch.setattr(train, "prepare", lambda config: pytest.fail("the data was prepared"))
    with pytest.raises(ValueError, match=r"`out` must be a folder that can be written. Got .*file"):
        train.train(Config(**SMALL), out=tmp_path / "file/run")
    with pytest.raises(ValueError, match=r"`out` must be a new or empty folder"):
        train.train(Config(**SMALL), out=tmp_path)


def test_a_full_disk_ends_a_run_with_one_line_and_the_way_to_go_on(start, tmp_path, monkeypatch):
    out, before = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)
    full = False

    def fill(*args, inner=train.losses):
        if full and (out / "metrics.jsonl").read_text():
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))  # no file may be larger
        return inner(*args)

    monkeypatch.setattr(train, "losses", fill)
    start("--out", tmp_path / "whole", "--keep-checkpoint")
    full = True
    try:
        status, _, errors = start("--out", out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        full = False
    assert status == 2
    assert errors.startswith(f"error: `{out}/checkpoint.pt` must be written. Got: ")
    assert errors.endswith(f"Go on with: python -m examples.mosi --resume {out}\n")
    assert errors.count("\n") == 1
    assert not list(out.glob(".*"))
    assert start("--resume", out)[0] == 0
    for name in ("metrics.jsonl", "test.json", "predictions.csv"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_flipped_bit_of_a_checkpoint_is_found_or_changes_nothing(data, tmp_path):
    train.train(Config(**SMALL | {"epochs": 1}), data, out=tmp_path, keep_checkpoint=True)
    path = tmp_path / "checkpoint.pt"
    whole, content = flat(run.read_checked(path)), bytearray(path.read_bytes())
    refused = 0
    positions = range(0, len(content), len(content) // 40)
    for position in positions:
        content[position] ^= 1 << position % 8
        path.write_bytes(content)
        try:
            assert flat(run.read_checked(path)) == whole
        except ValueError as error:
            assert "must be a whole file" in str(error)  # noqa: PT017
            refused += 1
        content[position] ^= 1 << position % 8
    assert refused > len(positions) / 2  # the others lie between the parts


def test_another_number_of_threads_is_said_at_a_resume(data, tmp_path):
    config = Config(**SMALL | {"epochs": 1})
    train.train(config, data, out=tmp_path, keep_checkpoint=True)
    torch.set_num_threads(2)
    try:
        with pytest.warns(UserWarning, match=r"with threads=1 and goes on with threads=2"):
            train.train(config, data, out=tmp_path, resume=True)
    finally:
        torch.set_num_threads(1)
    assert json.loads((tmp_path / "config.json").read_text())["run"]["threads"] == 1


def test_seeds_are_runs_of_their_own_with_a_table_and_resume(start, tmp_path, monkeypatch):
    status, output, _ = start("--out", tmp_path / "whole", "--seeds", 3, 1)
    assert status == 0
    tests = [json.loads((tmp_path / f"whole/seed-{s}/test.json").read_text()) for s in (3, 1)]
    with (tmp_path / "whole/seeds.csv").open() as file:
        rows = {row["seed"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["3", "1", "mean", "std"]
    maes = [test["mae"] for test in tests]
    assert [float(rows[seed]["mae"]) for seed in ("3", "1")] == maes
    assert float(rows["mean"]["mae"]) == pytest.approx(mean(maes))
    assert float(rows["std"]["mae"]) == pytest.approx(stdev(maes))
    assert f"{mean(maes):.3f} ± {stdev(maes):.3f}" in output
    with monkeypatch.context() as patch:
        fail_at(patch, 11)  # in the second epoch of the second seed
        status, _, errors = start("--out", tmp_path / "killed", "--seeds", 3, 1)
    assert status == 130
    assert errors.endswith(f"python -m examples.mosi --resume {tmp_path}/killed\n")
    assert start("--resume", tmp_path / "killed")[0] == 0
    for name in ("seeds.csv", "seed-3/metrics.jsonl", "seed-1/predictions.csv"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_function_is_told_of_every_epoch_and_every_step(data):
    lines = []
    result = train.train(Config(**SMALL), data, log=lines.append)
    epochs = [line for line in lines if "epoch" in line]
    assert [line["valid/mae"] for line in epochs] == [x["valid"]["mae"] for x in result["history"]]
    assert {"train/task", "train/stat", "valid/corr"} <= set(epochs[0])
    steps = [line["gradbalance/step"] for line in lines if "gradbalance/step" in line]
    assert steps == list(range(1, 10))
    assert {f"gradbalance/norms/{name}" for name in ("text", "audio", "timing")} <= set(lines[1])


def test_tensorboard_gets_losses_and_balance(start, tmp_path):
    needs("tensorboard", extra="integrations")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert start("--out", tmp_path / "run", "--log")[0] == 0
    files = sorted((tmp_path / "run/tensorboard").iterdir())
    tags = [set(EventAccumulator(str(file)).Reload().Tags()["scalars"]) for file in files]
    assert len(tags) == 3
    assert all({"train/task", "valid/mae", "gradbalance/norms/audio"} <= each for each in tags)


def test_the_preset_of_the_paper_sets_what_the_paper_states_and_names_its_data():
    config, _ = settings("--preset", "paper", "--text-encoder", "here")
    assert (config.text, config.balance, config.epochs, config.batch_size) == (
        *("finetune", "paper"),
        *(30, 8),
    )
    assert (config.lr, config.text_lr, config.warmup, config.text_encoder) == (
        *(1e-5, 1e-5, 0.1),
        "here",
    )
    with pytest.raises(ValueError, match=r"Got 'visual'.* mosi.pkl \(python -m examples.mosi.down"):
        config.others(["audio", "timing"])
    assert config.others(["audio", "visual"]) == ["audio", "visual"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dropout", "1.5"], "error: `dropout` must be from 0 to 0.99. Got 1.5."),
        (["--device", "cuda"], 'error: `device` must be "cpu" or "auto"'),
        (["--threads", "0"], "error: `threads` must be at least 1."),
        (["--seed", "1", "--seeds", "2"], "error: `seed` must not be given with `seeds`."),
        (["--config", "/nowhere.json"], "error: `/nowhere.json` must be a JSON object of settings"),
        (["--lr", "1e6", "--task", "mse", "--max-norm", "0"], "error: `"),
        (["--recon", "1e6", "--lr", "1e6", "--warmup", "0", "--max-norm", "0"], "error: `"),
    ],
)
def test_what_makes_no_sense_ends_with_one_line(start, tmp_path, flags, message):
    if torch.cuda.is_available() and "cuda" in flags:
        pytest.skip("a GPU is there")
    status, _, errors = start("--out", tmp_path / "run", *flags)
    assert (status, errors.count("\n")) == (2, 1)
    assert errors.startswith(message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", r"must be a JSON object of settings"),
        ("{", r"must be a JSON object of settings"),
        ('{"epoch": 3}', r"must hold settings of this example. Got 'epoch'"),
        ('{"epochs": "3"}', r"`epochs` must be an integer. Got '3'"),
        ('{"epochs": true}', r"`epochs` must be an integer. Got True"),
    ],
)
def test_a_file_of_settings_is_checked(tmp_path, content, message):
    (tmp_path / "own.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        settings("--config", tmp_path / "own.json")
