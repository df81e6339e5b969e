"""The two pickles that everybody has, of CMU-MOSI or CMU-MOSEI: those of MAG-BERT/ITHP and those of MMSA."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from examples.mosi.data import Corpus, Feature, Ragged
from examples.mosi.pickles import load

PARTS = {"train": ("train",), "valid": ("valid", "dev"), "test": ("test",)}


class Utterance(NamedTuple):
    name: str
    text: Sequence[str]  # words as they are in the file, or one sentence
    label: float
    features: dict[str, np.ndarray]  # each [T, D], as it is in the file


def read(path: Path) -> Corpus:
    """The corpus in the splits of the file.

    MAG-BERT/ITHP: one vector a word, laid along the sub-words of any encoder. MMSA: its steps belong to BERT's tokens,
    or to none, so that audio and vision become one vector an utterance, the mean of their steps [R].

    Raises:
        ValueError: If the file is not one of the two, or damaged.
        FileNotFoundError: If there is none.
    """
    try:
        content = load(path)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"`data` must be a file. Got {path}, which does not exist. Fetch it: python -m examples.mosi.download"
        ) from None
    try:
        tables = {
            part: next(content[name] for name in names if name in content)
            for part, names in PARTS.items()
        }
        kind, utterances = (
            ("MMSA", mmsa) if isinstance(tables["train"], dict) else ("MAG-BERT", mag)
        )
        parts = {part: list(utterances(table)) for part, table in tables.items()}
        return corpus(parts, kind, path)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, StopIteration) as error:
        raise ValueError(
            f"`{path}` must have the structure of mosi.pkl (MAG-BERT, ITHP) or aligned_50.pkl (MMSA). "
            f"Got {type(error).__name__}: {str(error)[:200]}. Download it again."
        ) from error


def mag(examples: list) -> Iterator[Utterance]:
    """((words, visual [L, 47 or 35], acoustic [L, 74]), label [1, 1], segment) of each utterance."""
    for (words, visual, acoustic), label, segment in examples:
        for rows in (visual, acoustic):
            if rows.ndim != 2 or len(rows) != len(words) or not rows.shape[1]:
                raise ValueError(
                    f"features of shape {rows.shape} for {len(words)} words in {str(segment)[:40]}"
                )
        yield Utterance(
            str(segment), words, np.asarray(label).item(), {"audio": acoustic, "visual": visual}
        )


def mmsa(table: dict[str, Any]) -> Iterator[Utterance]:
    """raw_text, audio [n, T, 5], vision [n, T, 20], regression_labels, id of all utterances."""
    columns = [table[name] for name in ("id", "raw_text", "regression_labels", "audio", "vision")]
    for name, text, label, audio, vision in zip(*columns, strict=True):
        yield Utterance(
            str(name), [text], np.asarray(label).item(), {"audio": audio, "visual": vision}
        )


def bounded(utterances: list[Utterance], size: int) -> None:
    """Finds one list or array under many references before anything is copied: a file holds all that it gives."""
    held = 0
    for utterance in utterances:
        for rows in utterance.features.values():
            held += rows.nbytes
        for text in utterance.text:
            held += len(text)
            if held > size:
                raise ValueError(f"more than the {size} bytes of the file can hold")


def finite(rows: np.ndarray) -> np.ndarray:
    """As float32, with 0 for what is not finite: COVAREP has the logarithm of silence."""
    return np.nan_to_num(rows.astype(np.float32), nan=0, posinf=0, neginf=0)


def mean_step(steps: np.ndarray) -> np.ndarray:
    """[T, D] -> [1, D], or [0, D] where all is zeros, which are padding."""
    real = steps[steps.any(1)]
    return real.mean(0, keepdims=True) if len(real) else real


def corpus(parts: dict[str, list[Utterance]], kind: str, path: Path) -> Corpus:
    every = [utterance for part in parts.values() for utterance in part]
    empty = [part for part, utterances in parts.items() if not utterances]
    if empty:
        raise ValueError(f"no utterance in {empty[0]}")
    bounded(every, path.stat().st_size)
    labels = torch.tensor([utterance.label for utterance in every], dtype=torch.float32)
    if not bool((labels.abs() <= 3).all()):
        raise ValueError("a label outside [-3, 3]")
    words = [[str(word).lower() for word in utterance.text] for utterance in every]
    rows = {
        name: [finite(utterance.features[name]) for utterance in every]
        for name in every[0].features
    }
    if kind == "MMSA":
        words = [sentence[0].split() for sentence in words]
        rows = {name: [mean_step(steps) for steps in tables] for name, tables in rows.items()}
    features = {
        name: feature(tables, "utterance" if kind == "MMSA" else "word")
        for name, tables in rows.items()
    }
    ends = np.cumsum([0, *map(len, parts.values())]).tolist()
    index = {
        part: torch.arange(start, stop)
        for part, (start, stop) in zip(parts, pairwise(ends), strict=True)
    }
    sizes = "/".join(str(len(part)) for part in parts.values())
    banner = f"{path.name}, the format of {kind}, real data, the file's own split ({sizes})."
    return Corpus(
        "real", banner, [utterance.name for utterance in every], words, labels, index, features
    )


def feature(tables: list[np.ndarray], per: Literal["word", "utterance"]) -> Feature:
    rows = torch.from_numpy(np.concatenate(tables))
    ends = np.cumsum([0, *map(len, tables)])
    at = [torch.arange(start, stop) for start, stop in pairwise(ends.tolist())]
    if per == "utterance":
        at = [row if len(row) else torch.tensor([-1]) for row in at]
    return Feature(rows, Ragged.of(at), per)
