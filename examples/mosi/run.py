"""The run folder: everything in it but the log is written under a temporary name and then renamed."""

import csv
import dataclasses
import json
import math
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from examples.mosi.config import Config, differing, read_settings
from examples.mosi.data import Corpus, Dataset, atomic
from examples.mosi.metrics import MMSA
from examples.mosi.text import identity, reason

CHECKPOINT, MODEL, TEST = "checkpoint.pt", "model.pt", "test.json"


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """`atomic`, and one line where a disk is full or a folder is gone."""
    try:
        with atomic(path) as temporary:
            yield temporary
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError where a disk is full
        raise OSError(
            f"`{path}` must be written. Got: {reason(error)}. Make room, or take another folder."
        ) from error


def write_text(path: Path, text: str) -> None:
    with writing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def check_free(out: Path, resume: bool) -> None:
    """Refuses, before any work, a folder that holds something else, or that cannot be written."""
    if not resume and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(
            f"`out` must be a new or empty folder. Got {out}. Choose another, or `--resume {out}`."
        )
    there = next(place for place in (out, *out.absolute().parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"room for a block")
    except OSError as error:
        raise ValueError(
            f"`out` must be a folder that can be written. Got {out}, and: {reason(error)}. Choose another."
        ) from error


def record_of(config: Config, corpus: Corpus) -> dict[str, Any]:
    """What a run depends on beside its settings."""
    return {
        "data": corpus.source,
        "banner": corpus.banner,
        "corpus": corpus.digest(),
        "encoder": identity(config.text_encoder),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }


def start(out: Path, config: Config, record: dict[str, Any]) -> None:
    described = dataclasses.asdict(config) | {"run": record}
    write_text(out / "config.json", json.dumps(described, indent=2) + "\n")


def log(out: Path, line: str) -> None:
    with (out / "log.txt").open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def is_run(out: Path) -> bool:
    """Whether there is a run to go on with, or a finished one."""
    return any((out / name).is_file() for name in (CHECKPOINT, TEST))


def stored_config(out: Path) -> tuple[Config, dict[str, Any]]:
    """The configuration of the run, or of the runs over seeds, in this folder, and its record."""
    settings, record = read_settings(out / "config.json") if out.is_dir() else ({}, {})
    if not is_run(out) and "seeds" not in record:
        raise FileNotFoundError(
            f"`resume` must be a run folder with a {CHECKPOINT}. Got {out}. Start a new run."
        )
    return Config(**settings), record


def save(out: Path, state: dict[str, Any], config: Config, record: dict[str, Any]) -> None:
    """checkpoint.pt, which alone decides where a resumed run goes on, and metrics.jsonl for the reader."""
    with writing(out / CHECKPOINT) as temporary:
        torch.save(state | {"config": dataclasses.asdict(config), "run": record}, temporary)
    write_text(out / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in state["history"]))


def read_checked(path: Path) -> dict[str, Any]:
    """What ``torch.save`` has written, once the checksum of each part is found right, and its configuration."""
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
        if damaged:
            raise ValueError(f"a wrong checksum of {damaged}")
        state = torch.load(path, weights_only=True, map_location="cpu")
        return state | {"config": Config(**state["config"])}
    except Exception as error:  # a damaged file raises half a dozen kinds
        raise ValueError(
            f"`{path}` must be a whole file of this example. Got: {reason(error)}. Start a new run."
        ) from error


def restore(out: Path, config: Config, record: dict[str, Any]) -> dict[str, Any]:
    path = out / CHECKPOINT
    state = read_checked(path)
    check_same(path, state.pop("config"), config)
    stored = state.pop("run")
    if stored["corpus"] != record["corpus"]:
        raise ValueError(
            f"`{path}` must be of the same data. Got other data than it was trained on. Start a new run."
        )
    if stored["encoder"] != record["encoder"]:
        raise ValueError(
            f"`{path}` must be of the same text encoder. Got other files of {config.text_encoder} than it was "
            "trained with. Bring them back, or start a new run."
        )
    for name in ("threads", "torch"):
        if stored[name] != record[name]:
            warnings.warn(
                f"This run was trained with {name}={stored[name]} and goes on with {name}={record[name]}: its numbers "
                "can differ in the last digits from those of an unbroken run.",
                stacklevel=3,
            )
    return state


def check_same(path: Path, stored: Config, config: Config) -> None:
    names = differing(stored, config)
    if names:
        got = ", ".join(
            f"{name}={getattr(config, name)!r} for {getattr(stored, name)!r}" for name in names
        )
        raise ValueError(
            f"`{path}` must be of the same configuration. Got {got}. Resume with its settings."
        )


def finished(out: Path, config: Config) -> dict[str, Any] | None:
    """The result of a finished run that has dropped its checkpoint; otherwise None."""
    if (out / CHECKPOINT).exists() or not (out / TEST).is_file():
        return None
    check_same(out / "config.json", stored_config(out)[0], config)
    result = json.loads((out / TEST).read_text(encoding="utf-8"))
    del result["mmsa"]
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return result | {"history": [json.loads(line) for line in lines]}


def finish(
    out: Path,
    test: dict[str, Any],
    state: dict[str, Any],
    config: Config,
    record: dict[str, Any],
    dataset: Dataset,
    predictions: dict[str, Tensor],
) -> None:
    """predictions.csv, the figure, model.pt with what a prediction needs, and at last test.json."""
    write_predictions(out / "predictions.csv", dataset.corpus, predictions)
    plot(out / "trajectory.png", state["history"], dataset.corpus.source)
    with writing(out / MODEL) as temporary:
        scaling = {name: list(both) for name, both in dataset.scaling.items()}
        described = {"config": dataclasses.asdict(config), "run": record, "scaling": scaling}
        torch.save(described | {"weights": state["best"]}, temporary)
    renamed = {MMSA[name]: value for name, value in test.items() if name in MMSA}
    write_text(out / TEST, json.dumps(test | {"mmsa": renamed}, indent=2) + "\n")


def write_predictions(path: Path, corpus: Corpus, predictions: dict[str, Tensor]) -> None:
    with writing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        table_of(corpus, predictions, file)


def table_of(corpus: Corpus, predictions: dict[str, Tensor], file: TextIO) -> None:
    """A row for each prediction, with the label where there is one."""
    rows = csv.writer(file)
    rows.writerow(["id", "split", "label", "prediction", "text"])
    for part, prediction in predictions.items():
        for i, value in zip(corpus.split[part].tolist(), prediction.tolist(), strict=True):
            label = corpus.labels[i].item()
            shown = "" if math.isnan(label) else f"{label:.6g}"
            rows.writerow([corpus.ids[i], part, shown, value, " ".join(corpus.words[i])])


def plot(path: Path, history: list[dict[str, Any]], source: str) -> None:
    """Losses and validation MAE, epoch by epoch; where modalities are balanced, norms, coefficients and dominance."""
    from matplotlib.figure import Figure

    epochs = [line["epoch"] for line in history]
    records = [line["balance"] for line in history if "balance" in line]
    figure = Figure(figsize=(20 if records else 8, 3.5), layout="constrained")
    every = figure.subplots(1, 5 if records else 2)
    for name in history[0]["train"]:
        every[0].plot(epochs, [line["train"][name] for line in history], label=name)
    every[0].set(title="training losses")
    every[1].plot(epochs, [line["valid"]["mae"] for line in history], label="validation MAE")
    every[1].set(title="validation MAE")
    if records:
        for name in records[0]["norms"]:
            every[2].plot(epochs, [line["norms"][name] for line in records], label=name)
            every[3].plot(epochs, [line["coefficients"][name] for line in records], label=name)
        for key, label in (("dominance", "before"), ("dominance_after", "after")):
            every[4].plot(epochs, [line[key] for line in records], label=f"{label} balancing")
        every[2].set(title="gradient norm", yscale="log")
        every[3].set(title="coefficient")
        every[3].set_ylim(bottom=-0.05)
        every[4].set(title="dominance ratio", yscale="log")
    for axes in every:
        axes.set_xlabel("epoch")
        axes.legend()
    figure.suptitle(f"{source} data")
    with writing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
