"""Testbeds in which one branch starves another, in which a dominant branch is the better one, and balanced ones.

The first branch of a testbed is the one that dominates. All data are pairs, or tuples, of independent recordings of the
same class: spoken digits (the Free Spoken Digit Dataset) with scikit-learn's handwritten ones, or Gaussian classes. POM
has real audio and video of the same speakers.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

DATA = Path(os.environ.get("GRADBALANCE_DATA", Path(__file__).parents[1] / "../shared/data"))
SIZES = {"valid": 1000, "test": 2000}


class Part(NamedTuple):
    """Inputs of every branch, and the classes or the regression targets."""

    inputs: list[Tensor]
    target: Tensor


@dataclass(frozen=True)
class Branch:
    """One modality: ``depth`` layers over inputs times ``scale``, with Gaussian noise added before."""

    name: str
    depth: int
    noise: float
    scale: float = 1.0


@dataclass(frozen=True)
class Bed:
    name: str
    about: str
    branches: tuple[Branch, ...]
    parts: Callable[["Bed", int], dict[str, Part]]
    size: int = 1000
    epochs: int = 60
    width: int = 128
    batch: int = 64
    optimizer: str = "SGD"

    @property
    def starved(self) -> bool:
        """Whether a branch that could add much is starved by a worse one: meant so, the headroom is measured."""
        return self.name in ("S1", "S2", "S3", "V2", "Y3", "Y3L", "Y6")

    def alone(self, branch: Branch) -> "Bed":
        """The same data with one branch."""

        def parts(_: Bed, seed: int) -> dict[str, Part]:
            m = self.branches.index(branch)
            return {name: Part([part.inputs[m]], part.target) for name, part in self.parts(self, seed).items()}

        return replace(self, branches=(branch,), parts=parts)


class Model(nn.Module):
    """A multilayer perceptron for each branch, a linear layer over all of them, and one over each alone."""

    def __init__(self, bed: Bed, dims: list[int], outputs: int) -> None:
        super().__init__()
        encoders = {}
        for branch, dim in zip(bed.branches, dims, strict=True):
            sizes = [dim] + [bed.width] * branch.depth
            layers = (nn.Sequential(nn.Linear(i, o), nn.ReLU()) for i, o in pairwise(sizes))
            encoders[branch.name] = nn.Sequential(*layers)
        self.encoders = nn.ModuleDict(encoders)
        self.joint = nn.Linear(bed.width * len(dims), outputs)
        self.heads = nn.ModuleList(nn.Linear(bed.width, outputs) for _ in dims)

    def features(self, inputs: list[Tensor]) -> list[Tensor]:
        return [encoder(x) for encoder, x in zip(self.encoders.values(), inputs, strict=True)]

    def contributions(self, features: list[Tensor]) -> list[Tensor]:
        """What each branch adds to the joint output: its part of the matrix, and of the bias in equal shares."""
        weights = self.joint.weight.split([f.shape[1] for f in features], 1)
        return [F.linear(f, w, self.joint.bias / len(features)) for f, w in zip(features, weights, strict=True)]


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


def probe(train: Tensor, target: Tensor, test: Tensor, ridge: float = 1e-2) -> Tensor:
    """What a ridge regression fitted on ``train`` predicts for ``test``."""
    mean, std = train.mean(0), train.std(0) + 1e-3
    train, test = (train - mean) / std, (test - mean) / std
    labels = target if target.is_floating_point() else F.one_hot(target).to(train)
    gram = train.T @ train / len(train) + ridge * torch.eye(train.shape[1])
    return test @ torch.linalg.solve(gram, train.T @ (labels - labels.mean(0)) / len(train)) + labels.mean(0)


def log_mel(signal: np.ndarray, rate: int = 8000, bands: int = 20, frames: int = 4) -> Tensor:
    """The logarithm of a mel spectrogram, brought to a fixed number of frames, flat."""
    window = torch.hann_window(256)
    power = torch.stft(torch.tensor(signal / 32768.0).float(), 256, 80, window=window, return_complex=True).abs() ** 2
    mel = 2595 * torch.log10(1 + torch.linspace(0, rate / 2, 129) / 700)
    low, high = (2595 * np.log10(1 + f / 700) for f in (50, rate / 2))
    edges = torch.linspace(low, high, bands + 2)
    rise = (mel - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    fall = (edges[2:, None] - mel) / (edges[2:] - edges[1:-1])[:, None]
    energies = torch.log(torch.minimum(rise, fall).clamp(min=0) @ power + 1e-6)
    return F.adaptive_avg_pool1d(energies[None], frames).flatten()


def _file(name: str) -> Path:
    if not (DATA / name).is_file():
        raise FileNotFoundError(
            f"`GRADBALANCE_DATA` must be a folder with {name}. Got {DATA}. Set it to where the data lies."
        )
    return DATA / name


@cache
def recordings(frames: int) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Standardised inputs and digits of audio and visual; to which part an audio recording belongs, by its take."""
    from sklearn.datasets import load_digits

    with np.load(_file("spoken_digits.npz")) as spoken:
        count = len(spoken["digit"])
        ends = [*spoken["offset"][1:count], len(spoken["signal"])]
        signal = spoken["signal"]
        audio = torch.stack(
            [log_mel(signal[a:b], frames=frames) for a, b in zip(spoken["offset"][:count], ends, strict=True)]
        )
        take, digit = torch.tensor(spoken["take"]), torch.tensor(spoken["digit"]).long()
    train = take >= 8
    audio = (audio - audio[train].mean(0)) / audio[train].std(0)
    part = torch.where(take < 5, 2, torch.where(train, 0, 1))  # train, valid, test
    visual, label = (torch.tensor(array) for array in load_digits(return_X_y=True))
    visual = (visual.float() - visual.float().mean(0)) / (visual.float().std(0) + 1.0)  # some pixels never change
    return {"audio": (audio, digit, part), "visual": (visual, label, torch.empty(0))}


def digits(bed: Bed, seed: int, frames: int = 4) -> dict[str, Part]:
    """Pairs of a spoken and a written digit; no recording and no image is in two parts."""
    generator = torch.Generator().manual_seed(seed)
    (_, _, takes), (_, label, _) = recordings(frames).values()
    order = torch.randperm(len(label), generator=generator)
    images = dict(zip(("valid", "test", "train"), order.tensor_split([200, 700]), strict=True))
    parts = {}
    for number, name in enumerate(("train", "valid", "test")):
        count = SIZES.get(name, bed.size)
        target = torch.randint(10, (count,), generator=generator)
        inputs = []
        for branch in bed.branches:
            x, digit, _ = recordings(frames)[branch.name]
            pool = images[name] if branch.name == "visual" else (takes == number).nonzero()[:, 0]
            chosen = torch.empty(count, dtype=torch.long)
            for d in range(10):
                ours, theirs = target == d, pool[digit[pool] == d]
                chosen[ours] = theirs[torch.randint(len(theirs), (int(ours.sum()),), generator=generator)]
            noise = torch.randn(count, x.shape[1], generator=generator)
            inputs.append(branch.scale * (x[chosen] + branch.noise * noise))
        parts[name] = Part(inputs, target)
    return parts


def gaussians(bed: Bed, seed: int, redundancy: float = 0.0, dim: int = 32) -> dict[str, Part]:
    """Ten classes, each one of four points for every branch, in noise of which a part is common to all branches."""
    generator = torch.Generator().manual_seed(seed)
    centres = [torch.randn(10, 4, dim, generator=generator) for _ in bed.branches]
    parts = {}
    for name in ("train", "valid", "test"):
        count = SIZES.get(name, bed.size)
        target = torch.randint(10, (count,), generator=generator)
        common = torch.randn(count, dim, generator=generator)
        inputs = []
        for branch, centre in zip(bed.branches, centres, strict=True):
            own = torch.randn(count, dim, generator=generator)
            noise = redundancy**0.5 * common + (1 - redundancy) ** 0.5 * own
            point = centre[target, torch.randint(4, (count,), generator=generator)]
            inputs.append(branch.scale * (point + branch.noise * noise))
        parts[name] = Part(inputs, target)
    return parts


def pom(bed: Bed, seed: int) -> dict[str, Part]:
    """POM: mean and spread over time of audio and video, 17 ratings of the speaker; one split for all seeds."""
    parts: dict[str, Part] = {}
    with np.load(_file("pom.npz")) as file:
        raw = {
            name: ([torch.tensor(file[f"{b.name}_{name}"]) for b in bed.branches], torch.tensor(file[f"y_{name}"]))
            for name in ("train", "valid", "test")
        }
    (sequences, ratings) = raw["train"]
    known = [torch.cat([x.mean(1), x.std(1)], 1) for x in sequences]
    for name, (inputs, target) in raw.items():
        flat = [torch.cat([x.mean(1), x.std(1)], 1) for x in inputs]
        scaled = [(x - k.mean(0)) / (k.std(0) + 1e-3) for x, k in zip(flat, known, strict=True)]
        parts[name] = Part(scaled, (target - ratings.mean(0)) / ratings.std(0))
    return parts


_AUDIO, _VISUAL = Branch("audio", 2, 1.0), Branch("visual", 4, 0.8, 0.5)
_CLEAN, _DEEP = replace(_AUDIO, noise=0.0), replace(_VISUAL, depth=5)
_SHALLOW = Branch("visual", 2, 1.5, 2.0)
_FAST, _SLOW, _EVEN = Branch("fast", 1, 1.5, 2.0), Branch("slow", 4, 0.6, 0.4), Branch("even", 2, 1.0)


def _several(branch: Branch, count: int) -> tuple[Branch, ...]:
    return tuple(replace(branch, name=f"{branch.name}{i}") for i in range(count))


_EQUAL, _SHARED = _several(_EVEN, 3), partial(gaussians, redundancy=0.5)
_Y3 = Bed(
    "Y3", "synthetic: a fast, noisy branch, two slow", (_FAST, *_several(_SLOW, 2)), gaussians, epochs=30, width=64
)

_BEDS = [
    Bed("S1", "noisy audio starves a deep, faint visual branch", (_AUDIO, _DEEP), digits, size=2000, epochs=30),
    Bed("S2", "the same with half the data", (_AUDIO, _VISUAL), digits),
    Bed("S3", "S2 with three times the audio features", (_AUDIO, _VISUAL), partial(digits, frames=12)),
    Bed("V2", "noisy visual starves deep, faint audio", (_SHALLOW, Branch("audio", 4, 0.5, 0.25)), digits),
    _Y3,
    replace(_Y3, name="Y3L", about="Y3 for three times the steps", epochs=90),
    replace(_Y3, name="Y6", about="a fast, noisy branch and five slow ones", branches=(_FAST, *_several(_SLOW, 5))),
    Bed("C1", "S2 with clean audio: what dominates is better", (_CLEAN, _VISUAL), digits),
    Bed("C2", "C1 with a noisier visual branch", (_CLEAN, replace(_VISUAL, noise=1.5)), digits),
    Bed("C0", "C1 with a visual branch of noise alone", (_CLEAN, Branch("visual", 4, 20.0, 0.05)), digits),
    Bed("VC", "clean visual over noisy, deep audio", (Branch("visual", 2, 0.0), Branch("audio", 4, 1.5, 0.5)), digits),
    Bed("B", "mild noise, two layers each", (Branch("audio", 2, 0.3), Branch("visual", 2, 0.3)), digits, 2000, 30),
    replace(_Y3, name="YB", about="three equal branches, noise half shared", branches=_EQUAL, parts=_SHARED),
    Bed("A1", "S1 under Adam", (_AUDIO, _DEEP), digits, size=2000, epochs=30, optimizer="Adam"),
    Bed("POM", "real audio and video, 17 ratings", (Branch("audio", 2, 0.0), Branch("video", 2, 0.0)), pom, epochs=20),
]
BEDS = {bed.name: bed for bed in _BEDS}
