"""The two pickles that everybody has, of CMU-MOSI or CMU-MOSEI: those of MAG-BERT/ITHP and those of MMSA."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from examples.mosi.data import Corpus, Feature, Ragged
from examples.mosi.pickles import load

PARTS = {"train": ("train",), "valid": ("valid", "dev"), "test": ("test",)}


class Utterance(NamedTuple):
    name: str
    words: list[str]
    label: float
    features: dict[str, np.ndarray]  # each [T, D]: T words, or 1, or 0 where the modality is absent


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
        tables = {part: next(content[name] for name in names if name in content) for part, names in PARTS.items()}
        kind, utterances = ("MMSA", mmsa) if isinstance(tables["train"], dict) else ("MAG-BERT", mag)
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
        spoken = [str(word).lower() for word in words]
        features = {"audio": finite(acoustic), "visual": finite(visual)}
        for name, rows in features.items():
            if rows.ndim != 2 or len(rows) != len(spoken):
                raise ValueError(f"{name} of shape {rows.shape} for {len(spoken)} words in {str(segment)[:40]}")
        yield Utterance(str(segment), spoken, float(np.asarray(label).reshape(())), features)


def mmsa(table: dict[str, Any]) -> Iterator[Utterance]:
    """raw_text, audio [n, T, 5], vision [n, T, 20], regression_labels, id; steps of zeros are padding."""
    columns = [table[name] for name in ("id", "raw_text", "regression_labels", "audio", "vision")]
    for name, text, label, audio, vision in zip(*columns, strict=True):
        features = {"audio": mean_step(finite(audio)), "visual": mean_step(finite(vision))}
        yield Utterance(str(name), str(text).lower().split(), float(np.asarray(label).reshape(())), features)


def finite(rows: np.ndarray) -> np.ndarray:
    """As float32, with 0 for what is not finite: COVAREP has the logarithm of silence."""
    if not isinstance(rows, np.ndarray):
        raise TypeError(f"a {type(rows).__name__} in place of an array")
    return np.nan_to_num(rows.astype(np.float32), nan=0, posinf=0, neginf=0)


def mean_step(steps: np.ndarray) -> np.ndarray:
    """[T, D] -> [1, D], or [0, D] where all is padding."""
    real = steps[steps.any(1)]
    return real.mean(0, keepdims=True) if len(real) else real


def corpus(parts: dict[str, list[Utterance]], kind: str, path: Path) -> Corpus:
    every = [utterance for part in parts.values() for utterance in part]
    ends = np.cumsum([0, *map(len, parts.values())])
    index = {
        part: torch.arange(start, stop) for part, (start, stop) in zip(parts, pairwise(ends.tolist()), strict=True)
    }
    empty = [part for part, utterances in parts.items() if not utterances]
    if empty:
        raise ValueError(f"no utterance in {empty[0]}")
    labels = torch.tensor([utterance.label for utterance in every])
    if not bool((labels.abs() <= 3).all()):
        raise ValueError("a label outside [-3, 3]")
    size = path.stat().st_size
    features = {}
    for name in every[0].features:
        tables = [utterance.features[name] for utterance in every]
        if sum(table.nbytes for table in tables) > size:  # one array under many references
            raise ValueError(f"more {name} than the {size} bytes of the file can hold")
        features[name] = feature(tables, "word" if kind == "MAG-BERT" else "utterance")
    sizes = "/".join(str(len(part)) for part in parts.values())
    banner = f"{path.name}, the format of {kind}, real data, the file's own split ({sizes})."
    return Corpus("real", banner, [u.name for u in every], [u.words for u in every], labels, index, features)


def feature(tables: list[np.ndarray], per) -> Feature:
    rows = torch.from_numpy(np.concatenate(tables))
    ends = np.cumsum([0, *map(len, tables)])
    at = [torch.arange(start, stop) for start, stop in pairwise(ends.tolist())]
    if per == "utterance":
        at = [row if len(row) else torch.tensor([-1]) for row in at]
    return Feature(rows, Ragged.of(at), per)
