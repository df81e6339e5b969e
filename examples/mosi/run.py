"""The run folder: everything in it is written under a temporary name and then renamed."""

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.mosi.config import Config, differing
from examples.mosi.data import Corpus, atomic


def write_text(path: Path, text: str) -> None:
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def start(out: Path, config: Config, corpus: Corpus) -> None:
    """A new folder with its config.json; never one that holds something else."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(
            f"`out` must be a new or empty folder. Got {out}. Choose another, or `--resume {out}`."
        )
    described = dataclasses.asdict(config) | {
        "corpus": {"data": corpus.source, "banner": corpus.banner}
    }
    write_text(out / "config.json", json.dumps(described, indent=2) + "\n")


def stored_config(out: Path) -> Config:
    """The configuration of the run that is to be resumed."""
    if not (out / "checkpoint.pt").is_file():
        raise FileNotFoundError(
            f"`resume` must be a run folder with a checkpoint.pt. Got {out}. Start a new run."
        )
    try:
        described = json.loads((out / "config.json").read_text(encoding="utf-8"))
        described.pop("corpus")
        return Config(**described)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"`{out / 'config.json'}` must be that of a run. Got {error!r}. Start a new run."
        ) from error


def save(out: Path, state: dict[str, Any], config: Config, corpus: Corpus) -> None:
    """checkpoint.pt, which alone decides where a resumed run goes on, and metrics.jsonl for the reader."""
    with atomic(out / "checkpoint.pt") as temporary:
        torch.save(
            state | {"config": dataclasses.asdict(config), "corpus": corpus.digest()}, temporary
        )
    write_text(out / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in state["history"]))


def restore(out: Path, config: Config, corpus: Corpus) -> dict[str, Any]:
    path = out / "checkpoint.pt"
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        stored = Config(**state["config"])
    except Exception as error:  # torch.load raises half a dozen kinds for a damaged file
        raise ValueError(
            f"`{path}` must be a checkpoint of this example. Got {error!r}. Start a new run."
        ) from error
    names = differing(stored, config, ignore=("device",))
    if names:
        got = ", ".join(
            f"{name}={getattr(config, name)!r} for {getattr(stored, name)!r}" for name in names
        )
        raise ValueError(
            f"`{path}` must be of the same configuration. Got {got}. Resume with its settings."
        )
    if state["corpus"] != corpus.digest():
        raise ValueError(
            f"`{path}` must be of the same data. Got other data than it was trained on. Start a new run."
        )
    return state


def finish(
    out: Path,
    test: dict[str, Any],
    corpus: Corpus,
    index: Tensor,
    prediction: Tensor,
    history: list,
) -> None:
    """test.json, predictions.csv and, where there was something to balance, trajectory.png."""
    write_text(out / "test.json", json.dumps(test, indent=2) + "\n")
    with (
        atomic(out / "predictions.csv") as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        rows = csv.writer(file)
        rows.writerow(["id", "label", "prediction"])
        labels = corpus.labels[index].tolist()
        rows.writerows(
            zip([corpus.ids[i] for i in index], labels, prediction.tolist(), strict=True)
        )
    if "balance" in history[-1]:
        plot(out / "trajectory.png", history, corpus.source)


def plot(path: Path, history: list[dict[str, Any]], source: str) -> None:
    """Mean gradient norm and coefficient of each modality, and the dominance ratio, epoch by epoch."""
    from matplotlib.figure import Figure

    lines = [line["balance"] for line in history]
    epochs = [line["epoch"] for line in history]
    figure = Figure(figsize=(12, 3.5), layout="constrained")
    norms, coefficients, dominance = figure.subplots(1, 3)
    for name in lines[0]["norms"]:
        norms.plot(epochs, [line["norms"][name] for line in lines], label=name)
        coefficients.plot(epochs, [line["coefficients"][name] for line in lines], label=name)
    dominance.plot(epochs, [line["dominance"] for line in lines], label="before balancing")
    dominance.plot(epochs, [line["dominance_after"] for line in lines], label="after balancing")
    norms.set(title="gradient norm", yscale="log")
    coefficients.set(title="coefficient")
    coefficients.set_ylim(bottom=-0.05)
    dominance.set(title="dominance ratio", yscale="log")
    for axes in (norms, coefficients, dominance):
        axes.set_xlabel("epoch")
        axes.legend()
    figure.suptitle(f"{source} data")
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
