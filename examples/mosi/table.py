"""A table of utterances becomes a corpus: every format and own data pass this door, and errors name field and row."""

import reprlib
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import nn

from examples.mosi.data import Corpus, Feature, Ragged

COLUMNS = ("id", "text", "label", "split")
PARTS = {"train": "train", "valid": "valid", "dev": "valid", "val": "valid", "test": "test"}


class Rows(NamedTuple):
    """The utterances of a file, under the names that errors give them."""

    where: str
    ids: list[str]
    names: Sequence[str]  # "row 3 of train", "line 7"

    def refusal(self, field: str, contract: str, got: Any, row: int, also: str = "") -> ValueError:
        place = f"{self.names[row]} ({self.ids[row]:.60}){also}"
        return ValueError(
            f"`{field}` of {self.where} must {contract}. Got {shown(got)} in {place}. Correct or drop that row."
        )


def corpus(
    columns: Mapping[str, Any],
    banner: str = "Own data",
    *,
    where: str = "the table",
    names: Sequence[str] | None = None,
    known: Mapping[str, str] | None = None,
    videos: Sequence[str] | None = None,
    note: str = "",
) -> Corpus:
    """The corpus of a table with a row for each utterance.

    Args:
        columns: ``id``, ``text`` (a sentence, or a list of words), ``label`` (a number in [-3, 3]) and ``split``
            (train, valid or dev, test); any other column is a modality: an array [n, D], or [n, T, D] with the column
            ``NAME_lengths``, or a list of n arrays [T, D]. Where T is the number of words everywhere it has one vector
            a word, otherwise one an utterance, the mean of its steps. T = 0 says that it is absent.
        banner: What every output says of the data, before the sizes of the parts.
        where: The name of the table in errors.
        names: Of its rows, in errors.
        known: Names of columns in errors, where they are others.
        videos: Which utterances are from one video, for a warning.
        note: The end of the banner.

    Raises:
        ValueError: If anything is missing or wrong; the message has the column, the row and the value.
    """
    missing = [name for name in COLUMNS if name not in columns]
    if missing:
        raise ValueError(
            f"`{where}` must have the columns {', '.join(COLUMNS)}. Got {listed(columns)}, without {missing[0]}. Add it."
        )
    count = size_of(columns["id"], "id", where)
    for name in COLUMNS:
        if (found := size_of(columns[name], name, where)) != count:
            raise uneven(name, where, found, count)
    ids = [name_of(value) for value in columns["id"]]
    rows = Rows(where, ids, names or [f"row {row}" for row in range(count)])
    words = [words_of(text, row, rows) for row, text in enumerate(columns["text"])]
    labels = [label_of(label, row, rows) for row, label in enumerate(columns["label"])]
    index = parts_of(columns["split"], rows)
    features, means = {}, []
    for name, value in columns.items():
        if name in COLUMNS or name.removesuffix("_lengths") in columns.keys() - {name}:
            continue
        check_name(name, where)
        if isinstance(value, Feature):
            features[name] = value
            continue
        field = (known or {}).get(name, name)
        tables = tables_of(field, value, columns.get(f"{name}_lengths"), rows)
        counts = [len(table) for table in tables]
        if max(counts) > 1 and counts == [len(sentence) for sentence in words]:
            features[name] = feature(tables, "word")
            continue
        if max(counts) > 1:
            means.append(name)
            tables = [table.mean(0, keepdims=True) if len(table) else table for table in tables]
        features[name] = feature(tables, "utterance")
    said = [f"{banner} ({'/'.join(str(len(part)) for part in index.values())})."]
    if means:
        said.append(f"One vector an utterance, the mean of its steps: {', '.join(means)}.")
    said += [note, shared(ids, "id", index), shared(videos or [], "video", index)]
    return Corpus(
        "real", " ".join(filter(None, said)), ids, words, torch.tensor(labels), index, features
    )


def feature(tables: list[np.ndarray], per: Literal["word", "utterance"]) -> Feature:
    ends = np.cumsum([0, *map(len, tables)]).tolist()
    at = [torch.arange(start, stop) for start, stop in pairwise(ends)]
    if per == "utterance":
        at = [row if len(row) else torch.tensor([-1]) for row in at]
    return Feature(torch.from_numpy(np.concatenate(tables)), Ragged.of(at), per)


def shown(value: Any) -> str:
    """The start of a value that may be nested without end."""
    return value[:60] if isinstance(value, str) else reprlib.repr(value)


def listed(names: Any) -> list[str]:
    return [str(name)[:40] for name in list(names)[:20]]


def size_of(column: Any, name: str, where: str) -> int:
    try:
        return len(column)
    except TypeError:
        raise ValueError(
            f"`{name}` of {where} must have one row per `id`. Got {shown(column)}. Give a list or an array."
        ) from None


def uneven(name: str, where: str, found: int, count: int) -> ValueError:
    return ValueError(
        f"`{name}` of {where} must have one row per `id`. Got {found} rows for {count}. Correct the file."
    )


def decoded(value: Any) -> str | None:
    """A string, of bytes too; None for anything else."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value.decode("latin1")
    return str(value) if isinstance(value, str) else None


def name_of(value: Any) -> str:
    name = decoded(value)
    return shown(value) if name is None else name


def words_of(text: Any, row: int, rows: Rows) -> list[str]:
    if (sentence := decoded(text)) is not None:
        return sentence.lower().split()
    words = [None]
    if isinstance(text, list | tuple | np.ndarray):
        words = [decoded(word) for word in text]
    if None in words:
        raise rows.refusal("text", "be a sentence or a list of words", text, row)
    return [word.lower() for word in words]


def label_of(value: Any, row: int, rows: Rows) -> float:
    try:
        label = float(value.item() if isinstance(value, np.ndarray | torch.Tensor) else value)
    except (TypeError, ValueError, RuntimeError):
        raise rows.refusal("label", "be one number", value, row) from None
    if not np.isfinite(label):
        raise rows.refusal("label", "be finite", str(label), row)
    if abs(label) > 3:
        raise rows.refusal("label", "be within [-3, 3]", f"{label:.9g}", row)
    return label


def parts_of(split: Any, rows: Rows) -> dict[str, torch.Tensor]:
    index: dict[str, list[int]] = {"train": [], "valid": [], "test": []}
    for row, value in enumerate(split):
        part = PARTS.get((decoded(value) or "").strip().lower())
        if part is None:
            raise rows.refusal("split", "be train, valid (or dev) or test", shown(value), row)
        index[part].append(row)
    for part, members in index.items():
        if not members:
            raise ValueError(
                f"`split` of {rows.where} must have utterances in train, valid (or dev) and test. Got none in {part}. "
                "Name some."
            )
    return {part: torch.tensor(members) for part, members in index.items()}


def shared(names: Sequence[str], kind: str, index: Mapping[str, torch.Tensor]) -> str:
    """A warning, where what is trained on is tested on too."""
    if not names:
        return ""
    train = {names[row] for row in index["train"].tolist()}
    both = train.intersection(
        names[row] for part in ("valid", "test") for row in index[part].tolist()
    )
    if not both:
        return ""
    return f"WARNING: training shares {len(both)} of its {kind}s with validation or test, as {min(both):.60}."


def check_name(name: Any, where: str) -> None:
    """A modality is called by the name of a module, a keyword and a file."""
    taken = name in (*COLUMNS, "self") or hasattr(nn.ModuleDict(), str(name))
    if taken or not str(name).isidentifier():
        raise ValueError(
            f"`{where}` must name a modality by letters, digits and _, and not as a column or a method of a module. "
            f"Got {name_of(name)!r:.60}. Rename it."
        )


def tables_of(name: str, value: Any, lengths: Any, rows: Rows) -> list[np.ndarray]:
    """An array [T, D] of finite numbers for each utterance."""
    count = len(rows.ids)
    if (found := size_of(value, name, rows.where)) != count:
        raise uneven(name, rows.where, found, count)
    if isinstance(value, list):
        tables = [as_array(table) for table in value]
    else:
        tables = cut(name, as_array(value), lengths, rows)
    width = tables[0].shape[-1]
    made = []
    for row, table in enumerate(tables):
        if table.ndim != 2 or table.dtype.kind not in "biuf" or not width == table.shape[1] > 0:
            got = f"{table.dtype} of shape {list(table.shape)}"
            raise rows.refusal(name, f"be numbers [T, {width or 'D'}]", got, row)
        with np.errstate(over="ignore"):
            table = table.astype(np.float32)
        bad = np.argwhere(~np.isfinite(table))
        if len(bad):
            got = str(tables[row][tuple(bad[0])])
            raise rows.refusal(name, "be finite", got, row, f", column {bad[0][1]}")
        made.append(table)
    return made


def as_array(value: Any) -> np.ndarray:
    """Nothing but an array or a tensor: lists may be nested without end."""
    return np.asarray(value) if isinstance(value, np.ndarray | torch.Tensor) else np.empty(0)


def cut(name: str, array: np.ndarray, lengths: Any, rows: Rows) -> list[np.ndarray]:
    """[n, D], or [n, T, D] up to the length of each."""
    if array.ndim == 2:
        return list(array[:, None])
    if array.ndim != 3 or lengths is None:
        raise ValueError(
            f"`{name}` of {rows.where} must be an array [n, D], or [n, T, D] with {name}_lengths. "
            f"Got shape {list(array.shape)}. Give the number of steps of each utterance."
        )
    if (found := size_of(lengths, f"{name}_lengths", rows.where)) != len(array):
        raise uneven(f"{name}_lengths", rows.where, found, len(array))
    tables = []
    for row, steps in enumerate(lengths):
        if not isinstance(steps, int | np.integer) or not 0 <= steps <= array.shape[1]:
            contract = f"be a whole number from 0 to {array.shape[1]}"
            raise rows.refusal(f"{name}_lengths", contract, steps, row)
        tables.append(array[row, :steps])
    return tables
