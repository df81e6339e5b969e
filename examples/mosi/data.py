"""CMU-MOSI in memory: utterances, features along their words, splits and padded batches."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ragged:
    """Rows of many utterances end to end; utterance i owns ``rows[offset[i]:offset[i + 1]]``."""

    rows: Tensor  # [R, ...]
    offset: Tensor  # [n + 1]

    @classmethod
    def of(cls, parts: Sequence[Tensor]) -> "Ragged":
        lengths = torch.tensor([0, *map(len, parts)])
        return cls(torch.cat(list(parts)), lengths.cumsum(0))

    @property
    def lengths(self) -> Tensor:
        return self.offset.diff()

    def pad(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The chosen utterances as [B, T, ...] and which of their steps exist, [B, T]; padding repeats a real row."""
        length = self.lengths[index, None]
        step = torch.arange(max(1, int(length.max())))
        mask = step < length
        rows = self.rows if len(self.rows) else self.rows.new_full((1, *self.rows.shape[1:]), -1)
        return rows[(self.offset[index, None] + step).where(mask, 0)], mask


class Feature(NamedTuple):
    """One non-text modality: a table of vectors and, for each word or for each utterance, the row that it owns."""

    rows: Tensor  # [R, D]
    at: Ragged  # row numbers; -1 where the modality is absent
    per: Literal["word", "utterance"]


@dataclass(frozen=True)
class Corpus:
    """Everything known about the utterances before any text encoder has seen them."""

    source: Literal["real", "simulated"]
    banner: str
    ids: list[str]
    words: list[list[str]]
    labels: Tensor  # [n], in [-3, 3]
    split: dict[str, Tensor]  # "train", "valid", "test" -> utterance numbers
    features: dict[str, Feature]

    def digest(self) -> str:
        """A fingerprint of all that training depends on."""
        tensors = [self.labels, *self.split.values()]
        for feature in self.features.values():
            tensors += [feature.rows, feature.at.rows, feature.at.offset]
        return fingerprint(
            repr((self.ids, self.words)).encode(), *(t.numpy().tobytes() for t in tensors)
        )


class Batch(NamedTuple):
    """Utterances padded to the longest of the batch; a process of several holds every `world`-th row of `size`."""

    index: Tensor  # [B]
    labels: Tensor  # [B]
    text: Tensor  # [B, L, width] states or [B, L] token numbers
    mask: Tensor  # [B, L]
    features: dict[str, Tensor]  # [B, L, D], or [B, 1, D] for one vector an utterance
    masks: dict[str, Tensor]
    size: int
    rank: int = 0
    world: int = 1

    def shard(self, rank: int, world: int) -> "Batch":
        def part(x: Tensor) -> Tensor:
            return x[rank::world]

        tensors = (part(self.index), part(self.labels), part(self.text), part(self.mask))
        parts = [
            {name: part(x) for name, x in group.items()} for group in (self.features, self.masks)
        ]
        return Batch(*tensors, *parts, self.size, rank, world)

    def to(self, device: torch.device) -> "Batch":
        tensors = (x.to(device) for x in self[:4])
        parts = [
            {name: x.to(device) for name, x in group.items()}
            for group in (self.features, self.masks)
        ]
        return Batch(*tensors, *parts, *self[6:])


class Dataset:
    """A corpus joined with its tokens: features standardised by the training split and laid along the sub-words.

    Args:
        corpus: The utterances.
        tokens: Token numbers, or frozen states, of each utterance.
        word_of: For each token the number of its word in the utterance, -1 for special tokens.
    """

    def __init__(self, corpus: Corpus, tokens: Ragged, word_of: Tensor) -> None:
        self.corpus, self.tokens = corpus, tokens
        self.rows, self.at = {}, {}
        utterance = torch.repeat_interleave(torch.arange(len(corpus.ids)), tokens.lengths)
        for name, (rows, at, per) in corpus.features.items():
            self.rows[name] = standardise(rows, used=at.pad(corpus.split["train"]))
            if per == "word":
                row = torch.cat([at.rows, torch.tensor([-1])])
                place = (at.offset[utterance] + word_of).where(word_of >= 0, -1)
                at = Ragged(row[place], tokens.offset)
            self.at[name] = at

    @property
    def widths(self) -> dict[str, int]:
        return {name: rows.shape[1] for name, rows in self.rows.items()}

    def batch(self, index: Tensor, names: Sequence[str]) -> Batch:
        text, mask = self.tokens.pad(index)
        features, masks = {}, {}
        for name in names:
            row, exists = self.at[name].pad(index)
            masks[name] = exists & (row >= 0)
            features[name] = self.rows[name][row.clamp(0)] * masks[name][..., None]
        return Batch(index, self.corpus.labels[index], text, mask, features, masks, len(index))

    def batches(self, part: str, size: int, generator: torch.Generator) -> list[Tensor]:
        """A shuffled epoch in batches of at most `size` whose sizes differ by one at most.

        Utterances of similar length meet in a batch, out of pools of at least 768: padding falls from 70 % of the steps
        to 25 % (32 a batch).
        """
        index = self.corpus.split[part]
        index = index[torch.randperm(len(index), generator=generator)]
        by_length = [
            pool[self.tokens.lengths[pool].argsort(stable=True)]
            for pool in index.split(max(8 * size, 768))
        ]
        parts = torch.cat(by_length).tensor_split(-(-len(index) // size))
        return [parts[i] for i in torch.randperm(len(parts), generator=generator)]


def standardise(rows: Tensor, used: tuple[Tensor, Tensor]) -> Tensor:
    """Zero mean and unit variance over the rows `used` in training; a constant column becomes 0, outliers end at 10."""
    row, exists = used
    train = rows[row[exists & (row >= 0)]].double()
    if not len(train):
        return torch.zeros_like(rows)
    mean, std = train.mean(0), train.std(0, correction=0)
    constant = std <= 1e-6 * mean.abs().clamp(min=1e-6)
    return ((rows - mean) / std.where(~constant, torch.inf)).clamp(-10, 10).float()


def load(data: str | Path = "auto", split: str = "standard") -> Corpus:
    """The corpus at `data` (a folder, a file, ``simulated``, or ``auto``), ``standard`` or ``poria`` split."""
    from examples.mosi.door import find

    if split not in ("standard", "poria"):
        raise ValueError(
            f'`split` must be "standard" or "poria". Got {split!r}. Choose one of them.'
        )
    return find(str(data), split)


def check_present(corpus: Corpus, names: Sequence[str]) -> None:
    """Refuses a modality that no utterance of the training part has: there is nothing to learn from."""
    for name in names:
        row, exists = corpus.features[name].at.pad(corpus.split["train"])
        if not bool((exists & (row >= 0)).any()):
            others = " ".join(["text", *(other for other in names if other != name)])
            raise ValueError(
                f"`modalities` must be there in the training part. Got {name!r}, which no utterance of it has. "
                f"Leave it out: --modalities {others}"
            )


def cache_folder() -> Path:
    """Where encoder states are kept: ``$GRADBALANCE_CACHE``, or the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "gradbalance"
    return Path(os.environ.get("GRADBALANCE_CACHE", default))


def fingerprint(*chunks: bytes) -> str:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()[:16]


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` that becomes `path` at the end of the block: never half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
