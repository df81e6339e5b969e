"""A modality of pure noise: what a useless one costs, and what balancing gives back."""

from dataclasses import replace

import torch

from examples.mosi.data import Corpus, Feature, Ragged

WIDTH = 73  # that of the acoustic statistics


def with_noise(corpus: Corpus) -> Corpus:
    """`corpus` with one more modality, ``noise``: a standard normal vector an utterance, the same in every run."""
    count = len(corpus.ids)
    rows = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(0))
    feature = Feature(rows, Ragged(torch.arange(count), torch.arange(count + 1)), "utterance")
    return replace(corpus, features=corpus.features | {"noise": feature})
