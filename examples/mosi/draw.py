"""Random numbers: the same whatever the number of processes and, in evaluation, whatever the batch."""

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from examples.mosi.data import Batch


class Draw:
    """Random numbers for a whole batch, of which a process keeps its own rows: one process or eight draw the same."""

    def __init__(self, device: torch.device) -> None:
        self.generator = torch.Generator(device)
        self.size, self.rows = 1, slice(None)

    def begin(self, batch: Batch) -> None:
        self.size, self.rows = batch.size, slice(batch.rank % batch.size, None, batch.world)

    def __call__(self, sampler: Callable[..., Tensor], like: Tensor) -> Tensor:
        options = {"generator": self.generator, "device": like.device, "dtype": like.dtype}
        each, rest = divmod(
            len(like), len(range(self.size)[self.rows])
        )  # rows of each utterance, as one a head
        if rest:
            return sampler(like.shape, **options)  # shared by all utterances, as positions are
        return sampler((self.size, each, *like.shape[1:]), **options)[self.rows].reshape(like.shape)


class Dropout(nn.Module):
    p = 0.0  # what attention of transformers reads that drops by a function: its random numbers could not be shared

    def __init__(self, rate: float, draw: Draw) -> None:
        super().__init__()
        self.rate, self.draw = rate, draw

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        return x * self.draw(self.kept, x) / (1 - self.rate)

    def kept(self, shape: Sequence[int], generator: torch.Generator, **options: Any) -> Tensor:
        return torch.empty(shape, **options).bernoulli_(1 - self.rate, generator=generator)


def own_noise(name: str, batch: Batch, like: Tensor, draws: int) -> Tensor:
    """Standard normal numbers [draws, B, T, Z] that depend on the modality and the number of the utterance alone."""
    noise = torch.zeros(draws, *like.shape)
    lengths = batch.mask.sum(1).clamp(max=like.shape[1]).tolist()
    for row, (index, length) in enumerate(zip(batch.index.tolist(), lengths, strict=True)):
        # 32 bits are all that the generator keeps of a seed.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {index}".encode()))
        noise[:, row, :length] = torch.randn(draws, length, like.shape[2], generator=generator)
    return noise.to(like.device)
