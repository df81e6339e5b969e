"""Training of the MOSI example: resuming, the run folder, balancing, several processes."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from examples.mosi import __main__ as command
from examples.mosi import build, run, train
from examples.mosi.config import Config
from examples.mosi.draw import Draw
from examples.mosi.simulated import simulate
from gradbalance import PAPER, ConflictAwarePenalty
from tests.mosi import samples

SMALL = {
    "data": "simulated",
    "text": "frozen",
    "batch_size": 8,
    "epochs": 3,
    "hidden": 8,
    "fused": 8,
    "draws": 4,
}
FILES = {
    "config.json",
    "metrics.jsonl",
    "test.json",
    "model.pt",
    "trajectory.png",
    "predictions.csv",
    "log.txt",
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As the command does for small steps: threads would wait for each other, for most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data():
    return samples.dataset(simulate(), limit=44)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    words = sorted({word for sentence in simulate().words for word in sentence})
    return samples.encoder(tmp_path_factory.mktemp("encoder"), words)


def assert_same_run(one: Path, other: Path):
    for name in ("metrics.jsonl", "test.json", "predictions.csv", "trajectory.png"):
        assert (one / name).read_bytes() == (other / name).read_bytes()
    for name in ("checkpoint.pt", "model.pt"):
        states = [torch.load(folder / name, weights_only=True) for folder in (one, other)]
        assert flat(states[0]) == flat(states[1])


def flat(state):
    """Nested containers and tensors as something that compares with ==, bit for bit."""
    if isinstance(state, torch.Tensor):
        return state.dtype, repr(state.tolist())
    if isinstance(state, dict):
        return {key: flat(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [flat(value) for value in state]
    return repr(state)  # where NaN, which is what was not measured, equals itself


def fail_at(monkeypatch, step):
    """KeyboardInterrupt inside the given optimizer step, counted from 1."""
    calls = iter(range(1, 10_000))

    def losses(*args, inner=train.losses):
        if next(calls) == step:
            raise KeyboardInterrupt
        return inner(*args)

    monkeypatch.setattr(train, "losses", losses)


@pytest.mark.parametrize(
    ("balance", "step"), [("off", 1), ("default", 8), ("errors", 18), ("paper", 8)]
)
def test_an_interrupted_run_resumes_bit_for_bit(data, tmp_path, monkeypatch, balance, step):
    config = Config(**SMALL, balance=balance)
    whole = train.train(config, data, out=tmp_path / "whole", keep_checkpoint=True)
    with monkeypatch.context() as patch:
        fail_at(patch, step)
        with pytest.raises(KeyboardInterrupt):
            train.train(config, data, out=tmp_path / "killed")
    assert not (tmp_path / "killed/test.json").exists()
    killed = tmp_path / "killed"
    resumed = train.train(config, data, out=killed, resume=True, keep_checkpoint=True)
    assert resumed == whole
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("kept", [False, True])
def test_a_finished_run_may_be_resumed_and_stays_as_it_is(data, tmp_path, kept):
    config, out = Config(**SMALL), tmp_path / "run"
    states = []
    for resume in (False, True):
        result = train.train(config, data, out=out, resume=resume, keep_checkpoint=kept)
        assert {path.name for path in out.iterdir()} == FILES | (
            {"checkpoint.pt"} if kept else set()
        )
        files = {path.name: path.read_bytes() for path in out.iterdir() if path.name != "log.txt"}
        states.append((result, files))
    assert states[0] == states[1]
    with pytest.raises(ValueError, match=r"same configuration. Got seed=1 for 0"):
        train.train(Config(**SMALL, seed=1), data, out=out, resume=True)


def test_the_run_folder_tells_all_and_the_best_epoch_was_tested(data, tmp_path):
    config = Config(**SMALL, lr=0.3, max_norm=0.0)  # the last epoch is not the best
    result = train.train(config, data, out=tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} == FILES
    log = (tmp_path / "run/log.txt").read_bytes().decode().splitlines(keepends=True)
    epochs, (title, _, *rows, counted) = log[1:4], log[4:]
    assert [line.split("  ")[0] for line in epochs] == ["epoch 0", "epoch 1", "epoch 2"]
    assert all(line.endswith(" s\n") and "validation MAE" in line for line in epochs)
    assert title == "What each modality did in the last epoch:\n"
    assert [row.split()[0] for row in rows] == ["text", "audio", "timing"]
    assert counted.endswith("counted\n")
    assert "\r" not in "".join(log)
    test = json.loads((tmp_path / "run/test.json").read_text())
    assert test["data"] == "simulated"
    assert "SIMULATED" in test["banner"]
    history = [
        json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    ]
    assert history == result["history"]
    assert test["best_epoch"] == min(range(3), key=lambda epoch: history[epoch]["valid"]["mae"])

    state = torch.load(tmp_path / "run/model.pt", weights_only=True)
    model = build.build(config, data, ["audio", "timing"], Draw(torch.device("cpu")))
    model.load_state_dict(state["weights"])
    valid = train.predict(model, data, "valid", ["audio", "timing"])
    best = history[test["best_epoch"]]["valid"]["mae"]
    assert (
        valid - data.corpus.labels[data.corpus.split["valid"]]
    ).abs().mean().item() == pytest.approx(best)
    assert test["best_epoch"] < 2
    prediction = train.predict(model, data, "test", ["audio", "timing"])
    with (tmp_path / "run/predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    index = [i for part in data.corpus.split.values() for i in part.tolist()]
    assert [row["id"] for row in rows] == [data.corpus.ids[i] for i in index]
    assert [row["text"] for row in rows] == [" ".join(data.corpus.words[i]) for i in index]
    assert [float(row["label"]) for row in rows] == pytest.approx(
        data.corpus.labels[index].tolist()
    )
    tested = [float(row["prediction"]) for row in rows if row["split"] == "test"]
    assert tested == prediction.tolist()
    assert test["mmsa"]["Has0_acc_2"] == test["acc2_nonneg"]
    assert test["mae"] == pytest.approx(
        (prediction - data.corpus.labels[data.corpus.split["test"]]).abs().mean().item()
    )


def test_without_a_folder_nothing_is_written(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train.train(Config(**SMALL), data)
    assert not list(tmp_path.iterdir())


def test_training_stops_after_epochs_without_progress(data):
    result = train.train(Config(**SMALL | {"epochs": 9, "patience": 2, "lr": 0.0}), data)
    assert (len(result["history"]), result["best_epoch"]) == (3, 0)


def test_off_is_the_plain_optimizer_bit_for_bit(data, monkeypatch):
    config = Config(**SMALL, balance="off", max_norm=0.0)
    watched = train.train(config, data)
    wrapped = train.optimizer_of
    monkeypatch.setattr(train, "optimizer_of", lambda *args: wrapped(*args).optimizer)
    plain = train.train(config, data)
    for line in watched["history"]:
        assert set(line.pop("balance")["coefficients"].values()) == {1.0}
    assert watched == plain


def test_paper_observes_all_but_text_inside_its_window(data, monkeypatch):
    seen = []
    monkeypatch.setattr(
        ConflictAwarePenalty, "observe", lambda self, **errors: seen.append(set(errors))
    )
    for balance in ("paper", "errors", "default", "off"):
        train.train(Config(**SMALL | {"epochs": 1}, balance=balance), data)
    assert seen == [{"audio", "timing"}] * 6 + [{"text", "audio", "timing"}] * 6
    noise = {"audio": 1.0, "visual": 1.0}
    paper = build.balancing(Config(epochs=30, balance="paper"), 10, ["audio", "visual"])
    assert paper == PAPER | {"window": (0, 250), "noise": noise}


def test_further_options_go_to_the_rule_or_to_the_penalty():
    options = build.balancing(
        Config(balance="paper", penalty={"eta": 1.0, "noise": 0.0}), 10, ["audio"]
    )
    assert options["rule"] == replace(PAPER["rule"], eta=1.0)
    assert options["noise"] == 0


@pytest.mark.parametrize(
    "modalities", [("text",), ("audio",), ("text", "timing"), ("audio", "timing")]
)
def test_any_modalities_train(data, modalities):
    result = train.train(Config(**SMALL | {"epochs": 1}, modalities=modalities), data)
    balance = result["history"][0].get("balance")
    assert (set(balance["norms"]) if balance else set(modalities)) == set(modalities)
    assert (balance is None) == (len(modalities) == 1)


@pytest.mark.parametrize("text", ["finetune", "top"])
def test_a_text_encoder_may_be_trained_and_resumed(encoder, tmp_path, monkeypatch, text):
    monkeypatch.setenv("GRADBALANCE_CACHE", str(tmp_path / "cache"))
    config = Config(
        **SMALL | {"epochs": 2, "text": text, "precision": "bf16"},
        text_layers=1,
        text_encoder=encoder,
    )
    data = train.prepare(config)
    data.corpus.split.update({part: index[:20] for part, index in data.corpus.split.items()})
    train.train(config, data, out=tmp_path / "whole", keep_checkpoint=True)
    fail_at(monkeypatch, 4)
    with pytest.raises(KeyboardInterrupt):
        train.train(config, data, out=tmp_path / "killed")
    train.train(config, data, out=tmp_path / "killed", resume=True, keep_checkpoint=True)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    first = build.build(
        config, data, ["audio", "timing"], Draw(torch.device("cpu"))
    ).text.state_dict()
    last = torch.load(tmp_path / "whole/checkpoint.pt", weights_only=True)["model"]
    assert all(
        not torch.equal(first[name], last[f"text.{name}"])
        for name in first
        if "query.weight" in name
    )


def test_a_checkpoint_of_other_settings_or_data_is_refused(data, tmp_path):
    out = tmp_path / "run"
    train.train(Config(**SMALL), data, out=out, keep_checkpoint=True)
    with pytest.raises(
        ValueError, match=r"same configuration. Got seed=1 for 0, balance='off' for 'default'"
    ):
        train.train(Config(**SMALL, seed=1, balance="off"), data, out=out, resume=True)
    with pytest.raises(ValueError, match=r"same data"):
        train.train(
            Config(**SMALL), samples.dataset(simulate(seed=1), limit=44), out=out, resume=True
        )
    (out / "checkpoint.pt").write_bytes((out / "checkpoint.pt").read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"checkpoint.pt` must be a whole file of this example"):
        train.train(Config(**SMALL), data, out=out, resume=True)


def test_a_folder_in_use_is_not_written_to(data, tmp_path):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(ValueError, match=r"`out` must be a new or empty folder"):
        train.train(Config(**SMALL), data, out=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"modalities": ("text", "vidio")},
            r"`modalities` must be among \['text', 'audio', 'timing'\]. Got 'vidio'",
        ),
        ({"modalities": ("visual",)}, r"use `--split poria`"),
        (
            {"modalities": ("text", "audio"), "balance": "paper"},
            r"two beside text .* Got \['audio', 'text'\]",
        ),
        ({"balance": "sometimes"}, r"`balance` must be one of .* Got 'sometimes'"),
        ({"uni": 0.0, "balance": "errors"}, r"`uni` must be positive"),
        ({"lr": -1.0}, r"`lr` must be from 0 to 1e\+06. Got -1.0"),
        ({"lr": float("nan")}, r"`lr` must be from 0 to 1e\+06. Got nan"),
        ({"recon": 1e38}, r"`recon` must be from 0 to 1e\+06"),
        ({"epochs": 0}, r"`epochs` must be from 1"),
        ({"hidden": 0}, r"`hidden` must be from 1"),
        ({"hidden": -1}, r"`hidden` must be from 1"),
        ({"fused": 0}, r"`fused` must be from 1"),
        ({"latent": -1}, r"`latent` must be from 0"),
        ({"warmup": 2.0}, r"`warmup` must be from 0 to 1\. Got 2"),
        ({"dropout": 1.5}, r"`dropout` must be from 0 to 0.99. Got 1.5"),
        ({"seed": -1}, r"`seed` must be from 0"),
        ({"hidden": 8.0}, r"`hidden` must be an integer. Got 8.0"),
        ({"ame": 1}, r"`ame` must be true or false. Got 1"),
        ({"lr": "1"}, r"`lr` must be a number. Got '1'"),
        ({"modalities": "text"}, r"`modalities` must be a list of names. Got 'text'"),
        ({"penalty": {"rool": 1}}, r"`penalty` must hold options of ConflictAwarePenalty"),
        ({"split": "mine"}, r"`split` must be one of"),
    ],
)
def test_settings_that_make_no_sense_are_refused(data, settings, message):
    with pytest.raises(ValueError, match=message):
        train.train(Config(**SMALL | settings), data)


def test_a_diverging_run_says_so(data):
    with pytest.raises(
        FloatingPointError, match=r"loss must stay finite. Got (nan|inf). Lower `lr`"
    ):
        train.train(Config(**SMALL, lr=1e6, max_norm=0.0, task="mse"), data)


def settings(*flags):
    """The configuration and the seeds that flags of the command stand for."""
    return command.settings(*command.parse([str(flag) for flag in flags]))


def test_a_latent_of_one_feature_trains(data):
    line = train.train(Config(**SMALL | {"epochs": 1, "latent": 1}), data)["history"][0]
    assert line["train"]["div"] == 0


def test_flags_become_settings_and_a_resumed_run_keeps_its_own(tmp_path, monkeypatch, data):
    monkeypatch.setattr(train, "prepare", lambda config: data)
    flags = [
        "--seed",
        "3",
        "--modalities",
        "text",
        "audio",
        "--no-gate",
        "--epochs",
        "1",
        "--batch-size",
        "16",
    ]
    flags += ["--text", "frozen"]
    monkeypatch.setattr(sys, "argv", ["mosi", "--out", str(tmp_path / "run"), *flags])
    assert command.main() == 0
    stored, record = run.stored_config(tmp_path / "run")
    assert stored == Config(
        seed=3, modalities=("text", "audio"), gate=False, epochs=1, batch_size=16, text="frozen"
    )
    assert (record["threads"], record["data"]) == (1, "simulated")
    assert settings("--seed", "3", "--resume", tmp_path / "run") == (stored, [])
    assert settings("--config", tmp_path / "run/config.json") == (stored, [])
    assert settings("--config", tmp_path / "run/config.json", "--seed", 5)[0].seed == 5
    with pytest.raises(ValueError, match=r"`seed` must be that of the run in .*: 3. Got 4"):
        settings("--seed", 4, "--resume", tmp_path / "run")
    with pytest.raises(FileNotFoundError, match=r"`resume` must be a run folder"):
        settings("--resume", tmp_path / "nowhere")


def test_bad_input_ends_the_command_with_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["mosi", "--data", str(tmp_path / "nowhere"), "--out", str(tmp_path / "run")]
    )
    assert command.main() == 2
    assert capsys.readouterr().err.startswith("error: `data` must be a folder with")
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def start(encoder, tmp_path_factory):
    """Starts the command in a process of its own, on simulated data with a small encoder."""
    cache = tmp_path_factory.mktemp("cache")

    def start(*flags, launcher=(sys.executable, "-m")):
        environment = os.environ | {"GRADBALANCE_CACHE": str(cache)}
        settings = [
            "--data",
            "simulated:8",
            "--text-encoder",
            encoder,
            "--hidden",
            "16",
            "--fused",
            "16",
        ]
        settings += ["--text", "top", "--text-layers", "1", "--draws", "4"]
        settings = ["--keep-checkpoint"] + ([] if "--resume" in flags else settings)
        return subprocess.Popen(
            [*launcher, "examples.mosi", *settings, *map(str, flags)],
            cwd=Path(__file__).parents[2], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            # A suite in the background ignores it, and so would its children.
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip

    return start


def finish(process: subprocess.Popen) -> str:
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    return output


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    first, second, *_ = finish(start("--out", out, "--epochs", 6)).splitlines()
    assert first.endswith("cpu, 1 thread.")
    assert second == f"To {out}. Loading ..."
    return out


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_process_resumes_bit_for_bit(start, whole, tmp_path, how):
    out = tmp_path / "killed"
    process = start("--out", out, "--epochs", 6)
    log = out / "metrics.jsonl"
    while process.poll() is None and (not log.exists() or len(log.read_text().splitlines()) < 2):
        time.sleep(0.01)
    time.sleep(0.05)  # into the middle of the next epoch
    process.send_signal(how)
    _, errors = process.communicate()
    assert not (out / "test.json").exists()
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert f"python -m examples.mosi --resume {out}" in errors.splitlines()[-1]
    finish(start("--resume", out))
    assert_same_run(whole, out)


def test_distributed_training_equals_one_process_with_the_whole_batch(start, tmp_path):
    torchrun = (
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
    )
    # Signs of the L1 loss can cancel to exactly 0 in one process alone, and Adam takes a whole step for the rest.
    flags = ("--epochs", 1, "--warmup", 0.5, "--task", "mse")
    finish(start("--out", tmp_path / "one", "--batch-size", 62, *flags))
    finish(start("--out", tmp_path / "two", "--batch-size", 31, *flags, launcher=torchrun))
    assert {path.name for path in (tmp_path / "two").iterdir()} == FILES | {"checkpoint.pt"}
    tests = [json.loads((tmp_path / name / "test.json").read_text()) for name in ("one", "two")]
    assert tests[0]["mae"] == pytest.approx(tests[1]["mae"], abs=1e-4)
    states = [
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["model"]
        for name in ("one", "two")
    ]
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, atol=1e-4, rtol=1e-3)
    index, size = torch.arange(1284 // 8), 62  # the shares of the two processes are uneven
    assert any(len(part) % 2 for part in index.tensor_split(-(-len(index) // size)))
