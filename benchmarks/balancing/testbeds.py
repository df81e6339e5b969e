"""The testbeds: a branch starves another, one is noise, the dominant one is better, or all is well.

Under SGD the first branch dominates by the size of its gradient. All data are pairs, or tuples, of independent
recordings of the same class, but POM, which has real audio and video of the same speakers. The last three formed no
rule: they were chosen, with the constants of the rule frozen, before the first run on them.
"""

from dataclasses import dataclass, replace
from functools import partial

from benchmarks.balancing.data import (
    Parts,
    beside_noise,
    cepstrum,
    digits,
    gaussians,
    interpolating,
    pom,
    sensor,
    views,
)


@dataclass(frozen=True)
class Branch:
    """One modality: ``depth`` layers over inputs times ``scale``, with Gaussian noise added before."""

    name: str
    depth: int
    noise: float = 0.0
    scale: float = 1.0
    kind: str = "perceptron"
    rows: int = 1  # of the input as a picture


@dataclass(frozen=True)
class Testbed:
    name: str
    about: str
    branches: tuple[Branch, ...]
    parts: Parts
    size: int = 1000
    epochs: int = 60
    width: int = 128
    batch: int = 64
    noisy: str | None = None  # the branch that is noise, or worse than another, if any
    starved: bool = (
        False  # whether under SGD a branch that could add much is starved by a worse one
    )

    @property
    def title(self) -> str:
        return f"{self.about} ({self.name})"


_AUDIO, _VISUAL = Branch("audio", 2, 1.0), Branch("visual", 4, 0.8, 0.5)
_CLEAN, _DEEP = replace(_AUDIO, noise=0.0), replace(_VISUAL, depth=5)
_SHALLOW = Branch("visual", 2, 1.5, 2.0)
_FAST, _SLOW, _EVEN = (
    Branch("fast", 1, 1.5, 2.0),
    Branch("slow", 4, 0.6, 0.4),
    Branch("even", 2, 1.0),
)
_WIDE, _NARROW = Branch("wide", 1), Branch("narrow", 3)
_PICTURE = {"kind": "convolutional", "rows": 20}
_FRAMES = {"kind": "transformer", "rows": 20}


def _several(branch: Branch, count: int) -> tuple[Branch, ...]:
    return tuple(replace(branch, name=f"{branch.name}{i}") for i in range(count))


_S1 = Testbed(
    "S1", "noisy speech over a deep, faint image", (_AUDIO, _DEEP), digits, 2000, 30, starved=True
)
_S2 = Testbed("S2", "noisy speech over a faint image", (_AUDIO, _VISUAL), digits, starved=True)
_C1 = Testbed("C1", "clean speech beside a faint image", (_CLEAN, _VISUAL), digits)
_Y3 = Testbed(
    "Y3",
    "Gaussians, one fast and noisy, two slow",
    (_FAST, *_several(_SLOW, 2)),
    gaussians,
    1000,
    30,
    64,
)
_POM = Testbed(
    "POM", "real audio and video", (Branch("audio", 2), Branch("video", 2)), pom, epochs=20
)
_W = Testbed(
    "W", "a wide branch beside a narrow, deep one", (_WIDE, _NARROW), interpolating, 2000, 30
)

_TESTBEDS = [
    replace(
        _C1,
        name="C0",
        about="speech beside noise",
        branches=(_CLEAN, Branch("visual", 4, 20.0, 0.05)),
        noisy="visual",
    ),
    Testbed(
        "V2",
        "a noisy image over faint speech",
        (_SHALLOW, Branch("audio", 4, 0.5, 0.25)),
        digits,
        noisy="visual",
        starved=True,
    ),
    Testbed(
        "VC",
        "a clean image over noisy speech",
        (Branch("visual", 2), Branch("audio", 4, 1.5, 0.5)),
        digits,
        noisy="audio",
    ),
    replace(
        _C1,
        name="C2",
        about="clean speech, a noisy image",
        branches=(_CLEAN, replace(_VISUAL, noise=1.5)),
        noisy="visual",
    ),
    replace(
        _POM,
        name="POMN",
        about="real audio and video beside noise",
        branches=(*_POM.branches, Branch("noise", 2)),
        parts=beside_noise(pom, 86),
        noisy="noise",
    ),
    _S1,
    _S2,
    _C1,
    Testbed(
        "B",
        "speech and image, alike",
        (Branch("audio", 2, 0.3), Branch("visual", 2, 0.3)),
        digits,
        2000,
        30,
    ),
    replace(_Y3, starved=True),
    replace(
        _Y3,
        name="YB",
        about="three equal branches",
        branches=_several(_EVEN, 3),
        parts=partial(gaussians, redundancy=0.5),
    ),
    _POM,
    Testbed(
        "D",
        "an image beside a sensor of noise",
        (Branch("image", 2, 0.3), Branch("sensor", 2)),
        sensor,
        600,
        60,
        64,
        noisy="sensor",
    ),
    replace(
        _S2,
        name="S2N",
        about="S2 beside a third branch of noise",
        branches=(_AUDIO, _VISUAL, Branch("noise", 2)),
        noisy="noise",
        starved=False,
    ),
    replace(
        _C1,
        name="U",
        about="speech beside unrelated images",
        branches=(_CLEAN, Branch("unrelated", 2)),
        noisy="unrelated",
    ),
    replace(
        _C1,
        name="H",
        about="two halves of a spectrogram, one noisy",
        branches=(Branch("low", 2), Branch("high", 2, 2.0)),
        noisy="high",
    ),
    _W,
    replace(
        _W,
        name="WU",
        about="W with a useless narrow branch",
        parts=partial(interpolating, amplitude=0.0),
    ),
    replace(
        _W,
        name="WW",
        about="W with a worse narrow branch",
        parts=partial(interpolating, amplitude=0.6),
    ),
    Testbed(
        "K",
        "convolutions, the image noisy",
        (Branch("speech", 2, **_PICTURE), Branch("visual", 2, 1.5, kind="convolutional", rows=8)),
        partial(digits, frames=8),
        1000,
        20,
        64,
        noisy="visual",
    ),
    Testbed(
        "T",
        "a transformer beside a perceptron",
        (Branch("visual", 2, 0.5), Branch("speech", 2, 0.5, **_FRAMES)),
        partial(digits, frames=12),
        1000,
        20,
        32,
    ),
    replace(
        _S2,
        name="S3",
        about="noisy, wide speech over a faint image",
        parts=partial(digits, frames=12),
    ),
    replace(
        _Y3,
        name="Y6",
        about="Gaussians, one fast and noisy, five slow",
        branches=(_FAST, *_several(_SLOW, 5)),
        starved=True,
    ),
    Testbed(
        "V6",
        "six views of a written digit",
        tuple(Branch(view, 2) for view in ("fac", "fou", "kar", "mor", "pix", "zer")),
        views,
        600,
    ),
    Testbed(
        "VN",
        "pixels beside a noisy view of the same digit",
        (Branch("pix", 2, 0.5), Branch("fou", 2, 4.0)),
        views,
        600,
        noisy="fou",
    ),
    Testbed(
        "JV",
        "lower and higher half of a cepstrum, nine speakers",
        (Branch("lower", 2), Branch("higher", 2)),
        cepstrum,
        270,
    ),
]
TESTBEDS = {testbed.name: testbed for testbed in _TESTBEDS}
UNSEEN = ("V6", "VN", "JV")  # formed no rule
