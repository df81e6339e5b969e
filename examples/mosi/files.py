"""The real CMU-MOSI files (Zadeh et al. 2016), read with every check at the door."""

import json
import math
import re
from difflib import SequenceMatcher
from pathlib import Path

import numpy as np
import torch

from examples.mosi.arrays import read_arrays
from examples.mosi.data import Corpus, Feature, Ragged
from examples.mosi.table import Rows, corpus, name_of, size_of, uneven, words_of

UTTERANCES, WORDS, VISUAL = (
    "mosi_utterance.npz",
    "mosi_words.json",
    "visual_cnn3d_SUPERVISED_ON_PORIA_TRAIN",
)
Word = tuple[str, float, float]  # with start and stop in seconds
LEAK = (
    "LEAK: the visual features come from a network trained with the labels of the Poria training videos; "
    "train and validation are in-sample for `visual`, only test is clean."
)


def read(path: Path, split: str) -> Corpus:
    fields = ["id", "video", "text", "label", "split", "poria_split", "acoustic73"]
    table = read_arrays(path, fields + [VISUAL] * (split == "poria"))
    for field, column in table.items():
        if column.ndim == 0 or len(column) != len(table["id"]):
            found = size_of(column, field, str(path))
            raise uneven(field, str(path), found, len(table["id"]))
    ids = strings(table["id"]).tolist()
    rows = Rows(str(path), ids, [f"row {row}" for row in range(len(ids))])
    words = [words_of(text, row, rows) for row, text in enumerate(table["text"].tolist())]
    columns = {
        "id": ids,
        "text": words,
        "label": table["label"],
        "split": table["split"],
        "audio": table["acoustic73"],
        "timing": word_timing(path.with_name(WORDS), ids, words),
    }
    if split == "poria":
        columns |= {
            "split": hold_out(strings(table["poria_split"]), strings(table["video"])),
            "visual": table[VISUAL],
        }
    return corpus(
        columns,
        f"CMU-MOSI, real data, {split} split",
        where=str(path),
        known={"audio": "acoustic73", "visual": VISUAL},
        videos=strings(table["video"]).tolist(),
        note=LEAK if split == "poria" else "",
    )


def strings(column: np.ndarray) -> np.ndarray:
    return np.array([name_of(value) for value in column.tolist()])


def hold_out(split: np.ndarray, video: np.ndarray) -> np.ndarray:
    """The Poria split has no validation part: every sixth training video becomes one."""
    held = np.unique(video[split == "train"])[::6]
    return np.where(np.isin(video, held), "valid", split)


def word_timing(path: Path, ids: list[str], words: list[list[str]]) -> Feature:
    """When and how fast each word is said; words of the transcript that the aligner missed have no timing."""
    timed = read_words(path)
    missing = [name for name in ids if name not in timed]
    if missing:
        raise ValueError(
            f"`words` of {path} must cover every utterance. Got nothing for {missing[0]}. Copy it again."
        )
    vectors, at, owners = [], [], []
    for name, spoken in zip(ids, words, strict=True):
        said = timed[name]
        row = torch.full((len(spoken),), -1)
        matcher = SequenceMatcher(
            None, [plain(w) for w in spoken], [plain(w) for w, _, _ in said], autojunk=False
        )
        for i, j, count in matcher.get_matching_blocks():
            row[i : i + count] = torch.arange(len(owners) + j, len(owners) + j + count)
        vectors += describe(said)
        owners += [name] * len(said)
        at.append(row)
    rows = np.array(vectors, np.float32).reshape(len(vectors), 6)
    bad = np.argwhere(~np.isfinite(rows))
    if len(bad):
        raise ValueError(
            f"`words` of {path} must be finite. Got {rows[tuple(bad[0])]} in a word ({owners[bad[0][0]]}). Correct or drop it."
        )
    return Feature(torch.from_numpy(rows), Ragged.of(at), "word")


def describe(said: list[Word]) -> list[list[float]]:
    """Per word: seconds, log seconds, pause before, pause after, place in the utterance, letters a second."""
    ends = [0.0, *(stop for _, _, stop in said)]
    nexts = [*(start for _, start, _ in said[1:]), ends[-1]]
    vectors = []
    for (word, start, stop), before, after in zip(said, ends, nexts, strict=False):
        seconds = max(stop - start, 0.01)
        place = start / max(ends[-1], 0.01)
        vectors.append(
            [
                stop - start,
                math.log(seconds),
                start - before,
                after - stop,
                place,
                len(word) / seconds,
            ]
        )
    return vectors


def plain(word: str) -> str:
    return re.sub(r"[^a-z0-9]", "", word.lower())


def read_words(path: Path) -> dict[str, list[Word]]:
    """The timed words of each utterance, without pauses."""
    try:
        if path.exists() and not path.is_file():
            raise ValueError("no regular file")
        entries = json.loads(path.read_text(encoding="utf-8"))
        return {
            entry["id"]: [
                (str(w), float(start), float(stop))
                for w, start, stop in entry["words"]
                if w != "sp"
            ]
            for entry in entries
        }
    except FileNotFoundError:
        raise FileNotFoundError(
            f"`data` must hold {WORDS}. Got no {path}. Copy it beside {UTTERANCES}."
        ) from None
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(
            f"`{path}` must be a complete list of timed words. Got {type(error).__name__}: {error!s:.200}. Copy it again."
        ) from error
