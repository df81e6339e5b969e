"""Predictions with a trained run of the MOSI example: for sentences and for data."""

import csv
import shutil
import sys
from dataclasses import replace

import pytest
import torch

from examples.mosi import predict, train
from examples.mosi.config import Config
from examples.mosi.data import Feature
from examples.mosi.simulated import simulate
from tests.mosi import samples
from tests.mosi.test_mosi_train import fail_at


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    words = sorted({word for sentence in simulate().words for word in sentence})
    return Config(
        data="simulated:20",
        text="top",
        text_layers=1,
        text_encoder=samples.encoder(tmp_path_factory.mktemp("encoder"), words),
        epochs=1,
        hidden=8,
        fused=8,
        draws=4,
    )


@pytest.fixture(scope="module")
def out(config, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADBALANCE_CACHE", str(tmp_path_factory.mktemp("cache")))
        out = tmp_path_factory.mktemp("runs") / "run"
        train.train(config, out=out)
    return out


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADBALANCE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def command(monkeypatch, capsys):
    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["predict", *map(str, arguments)])
        status = predict.main()
        return status, *capsys.readouterr()

    return command


def test_the_command_predicts_sentences_from_their_text_alone(command, out, tmp_path):
    status, output, errors = command(out, "--text", "It was GOOD", "it was awful")
    assert status == 0
    assert "Without audio and timing, with which it was trained." in errors
    values = predict.load(out)(["it was good", "it was awful"]).tolist()
    assert output.splitlines() == [
        f"{values[0]:+.3f}  It was GOOD",
        f"{values[1]:+.3f}  it was awful",
    ]
    assert values[0] != values[1]
    assert not (tmp_path / "cache").exists()


def test_a_sentence_has_the_prediction_of_an_utterance_without_the_others(out):
    corpus = simulate(share=20)
    trained = predict.load(out)
    bare = trained.of(replace(corpus, features={}))["test"]
    texts = [" ".join(corpus.words[i]) for i in corpus.split["test"]]
    torch.testing.assert_close(trained(texts), bare)
    assert not torch.allclose(trained.of(corpus)["test"], bare)


def test_the_data_of_the_run_has_the_predictions_of_the_run(command, out, tmp_path):
    status, output, _ = command(out, "--data", "simulated:20", "--csv", tmp_path / "own.csv")
    assert (status, output) == (0, f"109 predictions in {tmp_path}/own.csv\n")
    assert (tmp_path / "own.csv").read_bytes() == (out / "predictions.csv").read_bytes()
    _, printed, _ = command(out, "--data", "simulated:20")
    assert printed.encode().replace(b"\r\n", b"\n") == (
        (out / "predictions.csv").read_bytes().replace(b"\r\n", b"\n")
    )
    with (out / "predictions.csv").open(newline="") as file:
        assert {row["split"] for row in csv.DictReader(file)} == {"train", "valid", "test"}


def test_other_data_is_on_the_scale_of_the_training_data(out):
    corpus = simulate(share=20)
    trained = predict.load(out)
    alone = {"test": corpus.split["test"][:3]}
    few = trained.of(replace(corpus, split=alone))["test"]
    torch.testing.assert_close(few, trained.of(corpus)["test"][:3])


def test_what_is_no_finished_run_is_refused(command, config, out, tmp_path, monkeypatch):
    fail_at(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        train.train(config, out=tmp_path / "killed")
    for place in (tmp_path / "killed", tmp_path / "nowhere"):
        status, _, errors = command(place, "--text", "good")
        assert status == 2
        assert errors.splitlines()[-1].startswith(
            "error: `run` must be the folder of a finished run"
        )
    damaged = shutil.copytree(out, tmp_path / "damaged") / "model.pt"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(ValueError, match=r"model.pt` must be a whole file of this example"):
        predict.load(damaged.parent)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "`text` or `data` must be given"),
        (["--text", "good", "--data", "simulated"], "`text` or `data` must be given"),
        (["--text", " "], "`text` must have a word. Got ' '"),
        (["--text", "good", "--device", "tpu"], "`device` must be one of"),
        (["--data", "/nowhere"], "`data` must be"),
        (
            ["--data", "simulated:20", "--csv", "/dev/null/x.csv"],
            "`/dev/null/x.csv` must be written",
        ),
    ],
)
def test_what_cannot_be_predicted_ends_with_one_line(command, out, arguments, message):
    status, _, errors = command(out, *arguments)
    assert status == 2
    assert errors.splitlines()[-1].startswith(f"error: {message}")


def test_a_modality_of_another_width_is_refused(out):
    corpus = simulate(share=20)
    audio = corpus.features["audio"]
    other = {"audio": Feature(audio.rows[:, :5], audio.at, audio.per)}
    with pytest.raises(ValueError, match=r"`audio` must have 20 features, as in training. Got 5"):
        predict.load(out).of(replace(corpus, features=other))
