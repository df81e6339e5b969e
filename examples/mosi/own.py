"""Own data in a folder: utterances.csv, and a npy or npz file for each modality."""

import csv
from pathlib import Path
from typing import Any

from examples.mosi.arrays import read_arrays
from examples.mosi.data import Corpus
from examples.mosi.table import COLUMNS, check_name, corpus

UTTERANCES = "utterances.csv"


def read(path: Path) -> Corpus:
    """The corpus of a CSV file with the columns id, text, label, split, and if you like video, and the files beside it.

    ``NAME.npy`` is an array [n, D] with the rows of the CSV file, ``NAME.npz`` has also ``lengths`` where it is
    [n, T, D].

    Raises:
        ValueError: If anything is wrong; the message has the field, the line and the value.
    """
    columns, lines = read_csv(path)
    videos = columns.pop("video", None)
    for file in sorted(path.parent.iterdir()):
        if file.suffix.lower() in (".npy", ".npz") and not file.name.startswith("."):
            check_name(file.stem, str(path.parent))
            if file.stem in columns:
                raise ValueError(
                    f"`{path.parent}` must have one file a modality. Got two of {file.stem}. Remove one."
                )
            columns |= modality(file)
    names = [f"line {line}" for line in lines]
    return corpus(
        columns, f"Own data of {path.parent.name}", where=str(path), names=names, videos=videos
    )


def modality(file: Path) -> dict[str, Any]:
    arrays = read_arrays(file)
    lengths = arrays.pop("lengths", None)
    if len(arrays) != 1:
        raise ValueError(
            f"`{file}` must hold one array, and `lengths` if it is [n, T, D]. Got {sorted(arrays)[:20]}. "
            "Write a file for each modality."
        )
    columns = {file.stem: next(iter(arrays.values()))}
    return columns if lengths is None else columns | {f"{file.stem}_lengths": lengths}


def read_csv(path: Path) -> tuple[dict[str, list[str]], list[int]]:
    """The columns of a CSV file that are known, and the line in which each row ends."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = next(reader, [])
            missing = [name for name in COLUMNS if header.count(name) != 1]
            if missing:
                raise ValueError(f"the columns {header[:20]}, in which {missing[0]!r} is not once")
            cells, lines = [], []
            for row in reader:
                if not row:
                    continue  # an empty line
                if len(row) != len(header):
                    raise ValueError(
                        f"{len(row)} cells in line {reader.line_num}, not {len(header)}: {row!s:.60}"
                    )
                cells.append(row)
                lines.append(reader.line_num)
    except (ValueError, csv.Error) as error:
        raise ValueError(
            f"`{path}` must be a CSV file in UTF-8, with commas and the columns {', '.join(COLUMNS)}. Got {error}. "
            "Quote texts with commas in them."
        ) from error
    known = [name for name in header if name in (*COLUMNS, "video")]
    return {name: [row[header.index(name)] for row in cells] for name in known}, lines
