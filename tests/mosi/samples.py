"""Small stand-ins for the MOSI example: files in the real format, and a data set without a transformer."""

import json
from pathlib import Path

import numpy as np
import torch

from examples.mosi.data import Corpus, Dataset, Ragged
from examples.mosi.files import UTTERANCES, VISUAL, WORDS


def table(videos: int = 12, each: int = 4) -> dict[str, np.ndarray]:
    """The columns of the real npz file, for a few utterances."""
    rng = np.random.default_rng(0)
    n = videos * each
    video = np.repeat([f"video{v:02d}" for v in range(videos)], each)
    third = np.repeat(np.arange(videos) % 3, each)
    return {
        "id": np.array([f"{name}_{i % each}" for i, name in enumerate(video)]),
        "video": video,
        "text": np.array([f"THE MOVIE WAS REALLY NUMBER{i}" for i in range(n)]),
        "label": rng.uniform(-3, 3, n).astype(np.float32),
        "split": np.array(["train", "valid", "test"])[third],
        "poria_split": np.where(third == 2, "test", "train"),
        "acoustic73": rng.normal(size=(n, 73)).astype(np.float32),
        VISUAL: rng.normal(size=(n, 100)).astype(np.float32),
    }


def spoken(columns: dict[str, np.ndarray]) -> list[dict]:
    """Timed words: a pause, then each word of the text for a quarter of a second and a gap of a quarter."""
    return [
        {
            "id": name,
            "words": [["sp", 0.0, 0.5]]
            + [[w.lower(), 0.5 + i / 2, 0.75 + i / 2] for i, w in enumerate(t)],
        }
        for name, t in zip(
            columns["id"].tolist(), map(str.split, columns["text"].tolist()), strict=True
        )
    ]


def write(folder: Path, columns: dict[str, np.ndarray], words: list[dict] | None = None) -> Path:
    np.savez(folder / UTTERANCES, **columns)
    (folder / WORDS).write_text(
        json.dumps(spoken(columns) if words is None else words), encoding="utf-8"
    )
    return folder


def encoder(folder: Path, words: list[str]) -> str:
    """A transformer of 2 layers and 32 features in a local folder; what is not among the words is spelled."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789"]
    vocabulary = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *words,
        *letters,
        *("##" + x for x in letters),
    ]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(vocabulary))}
    BertTokenizerFast(vocab=vocabulary).save_pretrained(folder)
    torch.manual_seed(0)
    small = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    BertModel(BertConfig(vocab_size=len(vocabulary), **small)).save_pretrained(folder)
    return str(folder)


def dataset(corpus: Corpus, width: int = 8, limit: int | None = None) -> Dataset:
    """One token a word between two special ones; its state is a fixed random vector of the word."""
    vocabulary = sorted({word for words in corpus.words for word in words})
    vectors = torch.randn(len(vocabulary) + 1, width, generator=torch.Generator().manual_seed(0))
    number = {word: i + 1 for i, word in enumerate(vocabulary)}
    states = Ragged.of(
        [vectors[[0, *(number[word] for word in words), 0]] for words in corpus.words]
    )
    word_of = torch.cat([torch.tensor([-1, *range(len(words)), -1]) for words in corpus.words])
    made = Dataset(corpus, states, word_of)
    for part, index in corpus.split.items():
        corpus.split[part] = index[:limit]
    return made
