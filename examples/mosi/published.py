"""The pickles that everybody has, of CMU-MOSI or CMU-MOSEI: those of MAG-BERT/ITHP and those of MMSA; and own ones."""

import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from examples.mosi.data import Corpus
from examples.mosi.pickles import load
from examples.mosi.table import (
    COLUMNS,
    PARTS,
    as_array,
    corpus,
    decoded,
    listed,
    name_of,
    shown,
    size_of,
    uneven,
)

# From the README of thuiar/MMSA.
SHA256 = {
    "78e0f8b5ef8ff71558e7307848fc1fa929ecb078203f565ab22b9daab2e02524": "MOSI/unaligned_50.pkl",
    "d3994fd25681f9c7ad6e9c6596a6fe9b4beb85ff7d478ba978b124139002e5f9": "MOSI/aligned_50.pkl",
    "ad8b23d50557045e7d47959ce6c5b955d8d983f2979c7d9b7b9226f6dd6fec1f": "MOSEI/unaligned_50.pkl",
    "45eccfb748a87c80ecab9bfac29582e7b1466bf6605ff29d3b338a75120bf791": "MOSEI/aligned_50.pkl",
}
ALLOWANCE = 1 << 26  # bytes that small files may hold by repeating what is in them
VIDEO = re.compile(r"(\$_\$|_|\[)\d+\]?$")  # what follows the name of the video in an id
LENGTHS = ("audio_lengths", "vision_lengths")
FIELDS = ("id", "raw_text", "regression_labels", "audio", "vision")


class Origin(NamedTuple):
    """What the errors name."""

    path: Path
    part: str

    def refusal(self, contract: str, got: str, cure: str = "Correct the file") -> ValueError:
        return ValueError(f"`{self.part}` of {self.path} must {contract}. Got {got}. {cure}.")


def read(path: Path) -> Corpus:
    """The corpus in the splits of the file.

    MAG-BERT/ITHP: one vector a word, laid along the sub-words of any encoder. MMSA: its steps belong to BERT's tokens,
    or to none, so that audio and vision become one vector an utterance, the mean of their steps [R]. Own: a dict of
    the columns of `table.corpus`.

    Raises:
        ValueError: If the file has another structure, or is damaged.
    """
    content = load(path)
    if not isinstance(content, dict):
        got = "a list, as each part of MISA's data" if isinstance(content, list) else shown(content)
        raise ValueError(
            f"`{path}` must be a dict, as mosi.pkl (MAG-BERT, ITHP), aligned_50.pkl (MMSA) and own data are. Got {got}. "
            "Put the parts in one dict: train, dev and test."
        )
    content = {decoded(name): value for name, value in content.items()}
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    note = f"SHA-256 {digest[:16]}{', published by MMSA as ' + SHA256[digest] if digest in SHA256 else ''}."
    if not PARTS.keys() & content.keys():
        bounded(content, path)
        return corpus(content, f"Own data of {path.name}", where=str(path), note=note)
    parts = {PARTS[name]: content[name] for name in PARTS if name in content}
    if len(parts) < 3:
        raise ValueError(
            f"`{path}` must have the parts train, valid (or dev) and test. Got {listed(content)}. Add what is missing."
        )
    kind, utterances = ("MMSA", mmsa) if isinstance(parts["train"], dict) else ("MAG-BERT", mag)
    names, columns = [], {name: [] for name in (*COLUMNS, "audio", "visual")}
    for part, table in parts.items():
        for row, utterance in enumerate(utterances(table, Origin(path, part))):
            names.append(f"row {row} of {part}")
            for column, value in zip(columns.values(), utterance, strict=True):
                column.append(value)
    bounded(columns, path)
    for name in ("audio", "visual"):
        columns[name] = [finite(table) for table in columns[name]]
    return corpus(
        columns,
        f"{path.name}, the format of {kind}, real data, the file's own split",
        where=str(path),
        names=names,
        known={"visual": "vision"} if kind == "MMSA" else None,
        videos=[VIDEO.sub("", name_of(name)) for name in columns["id"]],
        note=note,
    )


def mag(examples: Any, origin: Origin) -> Iterator[tuple[Any, ...]]:
    """((words, visual [L, 47 or 35], acoustic [L, 74]), label [1, 1], segment) of each utterance."""
    if not isinstance(examples, list | tuple):
        raise origin.refusal("be a list of utterances", shown(examples))
    for row, example in enumerate(examples):
        try:
            features, label, segment = example
            words, visual, acoustic, *spelled = features
            words = spelled[0] if spelled else words  # MISA has numbers of words before
            count = len(words)
        except (TypeError, ValueError):
            raise origin.refusal(
                "hold ((words, visual, acoustic), label, segment) of each utterance",
                f"{shown(example)} in row {row}",
            ) from None
        for name, table in (("visual", visual), ("acoustic", acoustic)):
            if not isinstance(table, np.ndarray) or table.ndim != 2 or len(table) != count:
                raise origin.refusal(
                    f"have one vector of `{name}` a word",
                    f"shape {list(as_array(table).shape)} for {count} words in row {row} ({name_of(segment):.60})",
                )
        yield segment, words, label, origin.part, acoustic, visual


def mmsa(table: Any, origin: Origin) -> Iterator[tuple[Any, ...]]:
    """raw_text, audio [n, T, 5], vision [n, T, 20], regression_labels, id of all utterances, and lengths if known."""
    if not isinstance(table, dict):
        raise origin.refusal("be a dict of columns", shown(table))
    table = {decoded(name): column for name, column in table.items()}
    missing = [name for name in FIELDS if name not in table]
    if missing:
        mult = ", in the format of MulT, which has no words" * ("labels" in table)
        raise origin.refusal(
            f"have the fields {', '.join(FIELDS)}", f"{listed(table)}, without {missing[0]}{mult}"
        )
    where = f"{origin.part} of {origin.path}"
    count = size_of(table["id"], "id", where)
    columns = {name: table[name] for name in FIELDS}
    columns |= {name: table.get(name, [None] * count) for name in LENGTHS}
    for name, column in columns.items():
        if (found := size_of(column, name, where)) != count:
            raise uneven(name, where, found, count)
    by_modality = [name for name in table if str(name).startswith("regression_labels_")]
    labels = as_array(table["regression_labels"])
    if by_modality and labels.dtype.kind == "f" and np.abs(labels).max(initial=0) <= 1:
        raise origin.refusal(
            "have labels in [-3, 3]",
            "the format of CH-SIMS, whose labels are in [-1, 1]",
            "Multiply them by 3 and give them as own data",
        )
    for row, (name, text, label, *steps_and_lengths) in enumerate(
        zip(*columns.values(), strict=True)
    ):
        audio, vision, *lengths = steps_and_lengths
        for field, length in zip(LENGTHS, lengths, strict=True):
            if length is not None and not (isinstance(length, int | np.integer) and length >= 0):
                raise origin.refusal(
                    f"have whole numbers in `{field}`",
                    f"{shown(length)} in row {row} ({name_of(name):.60})",
                )
        yield name, text, label, origin.part, *map(mean_step, (audio, vision), lengths)


def mean_step(steps: Any, length: int | None) -> Any:
    """[T, D] -> [1, D], or [0, D] where all is zeros; without a length, steps of zeros are padding."""
    steps = as_array(steps)
    if steps.ndim != 2 or steps.dtype.kind not in "biuf":
        return steps  # refused later, with its row
    steps = finite(steps)
    real = steps[steps.any(1)]
    if length and len(real):
        real = steps[-length:] if steps[length:].any() else steps[:length]  # padding may come first
    return real.mean(0, keepdims=True) if len(real) else real


def finite(steps: np.ndarray) -> np.ndarray:
    """As float32, with 0 for what is not finite: COVAREP has the logarithm of silence."""
    if steps.dtype.kind not in "biuf":
        return steps
    with np.errstate(over="ignore"):
        return np.nan_to_num(steps.astype(np.float32), nan=0, posinf=0, neginf=0)


def bounded(columns: Mapping[str, Any], path: Path) -> None:
    """Refuses what holds far more than the file, by many references to one thing, before anything is copied."""
    limit = max(ALLOWANCE, 8 * path.stat().st_size)
    held = 0
    for column in columns.values():
        for value in column if isinstance(column, list | tuple) else [column]:
            held += weight(value)
            if held > limit:
                raise ValueError(
                    f"`{path}` must hold what it says. Got more than {limit} bytes in {path.stat().st_size}. "
                    "Nothing was copied; get the file from another source."
                )


def weight(value: Any) -> int:
    if isinstance(value, np.ndarray) and value.dtype != object:
        return 4 * value.size
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, list | tuple | np.ndarray):
        return sum(8 + len(item) for item in value if isinstance(item, str | bytes))
    return 8
