"""The real CMU-MOSI files (Zadeh et al. 2016), read with every check at the door."""

import json
import math
import re
import zipfile
import zlib
from difflib import SequenceMatcher
from pathlib import Path

import numpy as np
import torch

from examples.mosi.data import Corpus, Feature, Ragged

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


def read(place: Path, split: str) -> Corpus:
    path = utterance_file(place)
    fields = ["id", "video", "text", "label", "split", "poria_split", "acoustic73"]
    table = read_npz(path, fields + [VISUAL] * (split == "poria"))
    for field, column in table.items():
        if len(column) != len(table["id"]):
            raise ValueError(
                f"`{field}` of {path} must have one row per `id`. Got {len(column)} rows for {len(table['id'])}. "
                "Copy the file again."
            )
    ids = table["id"].tolist()
    for field in ("label", "acoustic73", VISUAL):
        if field in table:
            check_finite(table[field], path, field, ids)
    outside = np.flatnonzero(np.abs(table["label"]) > 3)
    if len(outside):
        row = outside[0]
        raise ValueError(
            f"`label` of {path} must be within [-3, 3]. Got {table['label'][row]} in row {row} ({ids[row]}). "
            "Correct or drop that row."
        )
    words = [text.lower().split() for text in table["text"].tolist()]
    features = {
        "audio": per_utterance(table["acoustic73"]),
        "timing": word_timing(path.with_name(WORDS), ids, words),
    }
    if split == "poria":
        features["visual"] = per_utterance(table[VISUAL])
        parts = hold_out(table["poria_split"], table["video"])
    else:
        parts = table["split"]
    index = {
        part: torch.from_numpy(np.flatnonzero(parts == part)) for part in ("train", "valid", "test")
    }
    sizes = "/".join(str(len(i)) for i in index.values())
    banner = f"CMU-MOSI, real data, {split} split ({sizes})." + f" {LEAK}" * (split == "poria")
    return Corpus(
        "real", banner, ids, words, torch.from_numpy(table["label"]).float(), index, features
    )


def hold_out(split: np.ndarray, video: np.ndarray) -> np.ndarray:
    """The Poria split has no validation part: every sixth training video becomes one."""
    held = np.unique(video[split == "train"])[::6]
    return np.where(np.isin(video, held), "valid", split)


def per_utterance(vectors: np.ndarray) -> Feature:
    rows = torch.arange(len(vectors))
    return Feature(
        torch.from_numpy(vectors).float(), Ragged(rows, torch.arange(len(rows) + 1)), "utterance"
    )


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
    rows = np.array(vectors)
    check_finite(rows, path, "words", owners)
    return Feature(torch.from_numpy(rows).float(), Ragged.of(at), "word")


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


def utterance_file(place: Path) -> Path:
    nested = place / "mosi" / UTTERANCES
    return nested if nested.is_file() else place / UTTERANCES if place.suffix != ".npz" else place


def read_npz(path: Path, fields: list[str]) -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            return {field: file[field] for field in fields}
    except FileNotFoundError:
        raise FileNotFoundError(
            f"`data` must be a folder with {UTTERANCES}, or that file. Got {path}, which does not exist. "
            "Give another place, or `--data simulated`."
        ) from None
    except KeyError as error:
        raise ValueError(
            f"`{path}` must hold the fields {fields}. Got no {error}. Copy it again."
        ) from None
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"`{path}` must be a complete npz file. Got {error}. Copy it again."
        ) from error


def read_words(path: Path) -> dict[str, list[Word]]:
    """The timed words of each utterance, without pauses."""
    try:
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
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"`{path}` must be a complete list of timed words. Got {error!r}. Copy it again."
        ) from error


def check_finite(values: np.ndarray, path: Path, field: str, ids: list[str]) -> None:
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        row = bad[0][0]
        place = f"row {row} ({ids[row]})" + (f", column {bad[0][1]}" if values.ndim > 1 else "")
        raise ValueError(
            f"`{field}` of {path} must be finite. Got {values[tuple(bad[0])]} in {place}. Correct or drop that row."
        )
