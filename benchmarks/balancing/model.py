"""The model of all testbeds, its losses and how its branches are scored."""

from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from benchmarks.balancing.testbeds import Branch, Testbed


class Tokens(nn.Module):
    """A small transformer over the frames of a spectrogram, averaged."""

    def __init__(self, bands: int, width: int, depth: int) -> None:
        super().__init__()
        self.bands = bands
        self.embed = nn.Linear(bands, width)
        layer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        frames = x.unflatten(1, (self.bands, -1)).transpose(1, 2)
        return self.layers(self.embed(frames)).mean(1)


def encoder(branch: "Branch", dim: int, width: int) -> nn.Module:
    """``branch.kind``: layers of a perceptron, convolutions over ``rows`` of the input, or a transformer."""
    if branch.kind == "transformer":
        return Tokens(branch.rows, width, branch.depth)
    if branch.kind == "convolutional":
        channels = [1, *(8 * 2**i for i in range(branch.depth))]
        layers = (
            layer
            for i, o in pairwise(channels)
            for layer in (nn.Conv2d(i, o, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        )
        rows, columns = branch.rows, dim // branch.rows
        flat = channels[-1] * (rows >> branch.depth) * (columns >> branch.depth)
        shape = nn.Unflatten(1, (1, rows, columns))
        return nn.Sequential(shape, *layers, nn.Flatten(), nn.Linear(flat, width), nn.ReLU())
    sizes = [dim] + [width] * branch.depth
    return nn.Sequential(*(nn.Sequential(nn.Linear(i, o), nn.ReLU()) for i, o in pairwise(sizes)))


class Model(nn.Module):
    """An encoder for each branch, a linear layer over all of them, and one over each alone."""

    def __init__(self, testbed: "Testbed", dims: list[int], outputs: int) -> None:
        super().__init__()
        self.testbed = testbed
        self.encoders = nn.ModuleDict(
            {
                branch.name: encoder(branch, dim, testbed.width)
                for branch, dim in zip(testbed.branches, dims, strict=True)
            }
        )
        self.joint = nn.Linear(testbed.width * len(dims), outputs)
        self.heads = nn.ModuleList(nn.Linear(testbed.width, outputs) for _ in dims)

    def features(self, inputs: list[Tensor]) -> list[Tensor]:
        return [encoder(x) for encoder, x in zip(self.encoders.values(), inputs, strict=True)]

    def output(self, features: list[Tensor]) -> Tensor:
        return self.joint(torch.cat(features, 1))

    def contributions(self, features: list[Tensor]) -> list[Tensor]:
        """What each branch adds to the joint output: its part of the matrix, and of the bias in equal shares."""
        weights = self.joint.weight.split([f.shape[1] for f in features], 1)
        return [
            F.linear(f, w, self.joint.bias / len(features))
            for f, w in zip(features, weights, strict=True)
        ]

    def without(self, features: list[Tensor], known: list[Tensor]) -> list[Tensor]:
        """The joint output with each branch missing in turn: its features are their mean over ``known``."""
        means = [k.mean(0).expand_as(f) for k, f in zip(known, features, strict=True)]
        return [
            self.output([*features[:m], means[m], *features[m + 1 :]]) for m in range(len(features))
        ]


def losses(output: Tensor, target: Tensor) -> Tensor:
    """The loss of each sample: cross-entropy, or the mean squared error of regression."""
    if target.is_floating_point():
        return F.mse_loss(output, target, reduction="none").mean(1)
    return F.cross_entropy(output, target, reduction="none")


def score(output: Tensor, target: Tensor) -> float:
    """Accuracy, or the correlation averaged over the targets of a regression."""
    if not target.is_floating_point():
        return float((output.argmax(1) == target).double().mean())
    output, target = output - output.mean(0), target - target.mean(0)
    return float(F.cosine_similarity(output, target, dim=0).mean())
