"""What is run, the most wanted first."""

from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from math import nan
from statistics import fmean
from typing import NamedTuple

from benchmarks.balancing.rivals import RIVALS
from benchmarks.balancing.runs import APART, RATES, Found, Results, Run
from benchmarks.balancing.testbeds import BEDS

SEEDS = range(200, 210)
FEW = SEEDS[:4]  # enough for the headroom
LANDED = range(
    100, 110
)  # those of the rule that Coherence replaces, whose runs are kept as its record
TUNING = range(90, 93)


class Part(NamedTuple):
    """Some testbeds under one optimizer with some rules.

    ``lr`` is chosen if None, among those of RATES: the one best without balancing, or for the rule with ``own``.
    """

    optimizer: str
    beds: tuple[str, ...]
    rules: tuple[str, ...]
    lr: float | None = None
    seeds: Iterable[int] = SEEDS
    tuning: Iterable[int] = TUNING
    own: bool = False


ALL = tuple(BEDS)
FIRST = ("C0", "V2", "VC", "C2", "POMN", "S2", "D", "S1", "C1", "B", "Y3", "YB", "POM")
OTHERS = tuple(bed for bed in ALL if bed not in (*FIRST, "S3", "Y6"))
OLD = (
    "S1",
    "S2",
    "S3",
    "V2",
    "Y3",
    "Y6",
    "C1",
    "C2",
    "VC",
    "C0",
    "B",
    "YB",
    "POM",
)  # run with the rule replaced
BASE = ("none", "Coherence")
FORMULA = (
    "raise only",
    "damp only",
    "chance 0.01",
    "most 2",
    "most 10",
    "a threshold",
    "smoothing 0.9",
    "smoothing 0.995",
    "1,024 entries",
    "65,536 entries",
)
TELLING = (
    "by hand", "own heads", "own heads and Coherence", "OGM-GE", "noise alone", "clip groups", "epochwise, as MILES",
    "paper, on the update", "Adam's signal to noise", "update times signal to noise", "update over signal to noise",
)  # fmt: skip

ONCE = TUNING[:1]
DEFAULT = 1e-3  # the rate that torch proposes for Adam and AdamW, at which most people train
SMALL = ("POMN", "D", "POM", "YB")  # half a second a run
PARTS = [
    Part("AdamW", FIRST, BASE),
    Part("SGD", OLD, BASE, seeds=LANDED, tuning=ONCE),
    Part("AdamW", ("C0", "VC", "C2", *SMALL), BASE, lr=DEFAULT),
    Part("AdamW", SMALL, TELLING, lr=DEFAULT),
    Part("AdamW", FIRST, (APART,), seeds=FEW),
    Part("AdamW", ("C0", "C2", "VC"), BASE, lr=3e-3),
    Part("AdamW", ("POMN", "D", "V2"), ("every 4", "every 16"), lr=DEFAULT),
    Part("Adam", SMALL, BASE, tuning=ONCE),
    Part("Muon", SMALL, BASE, tuning=ONCE),
    Part("Muon", SMALL, BASE, lr=0.01),
    Part("Muon", SMALL, ("Coherence",), tuning=ONCE, own=True),
    Part("AdamW", ("C0",), TELLING[:4], lr=DEFAULT),
    Part("AdamW", SMALL[:3], FORMULA, lr=DEFAULT),
    Part("AdamW", OTHERS, BASE, lr=DEFAULT),
    Part("AdamW", SMALL, ("Coherence",), own=True),
    Part("AdamW", ("V2",), TELLING, lr=DEFAULT),
    Part("AdamW", ("S1", "S2", "C1", "B", "Y3"), BASE, lr=DEFAULT),
    Part("AdamW", ("V2",), FORMULA, lr=DEFAULT),
    Part("Adam", ("C0", "V2", "S2"), BASE, tuning=ONCE),
    Part("Muon", ("C0", "VC", "Y3"), BASE, tuning=ONCE),
    Part("AdamW", OTHERS, (*BASE, APART), tuning=ONCE),
    Part("AdamW", ("C0",), TELLING[4:], lr=DEFAULT),
]


def best_rate(runs: Mapping[Run, Found], bed: str, optimizer: str, rule: str = "none") -> float:
    """The learning rate that is best for a rule, by the mean over the seeds of tuning."""
    scores: dict[float, list[float]] = {}
    for run, found in runs.items():
        if run[:3] == (bed, rule, optimizer) and run.seed in TUNING:
            scores.setdefault(run.lr, []).append(found["valid"])
    return max(scores, key=lambda lr: fmean(scores[lr]), default=nan)


def measure(results: Results, part: Part, carry_out: Callable[..., Iterable[Found]] = map) -> None:
    """The learning rates first, then the knobs, then every seed."""
    if not part.lr:
        results.complete(
            (
                Run(bed, rule, part.optimizer, lr, None, seed)
                for bed in part.beds
                for rule in (part.rules if part.own else ("none",))
                for lr in RATES[part.optimizer]
                for seed in part.tuning
            ),
            carry_out,
        )

    def tries(bed: str, rule: str) -> list[Run]:
        lr = part.lr or best_rate(results, bed, part.optimizer, rule if part.own else "none")
        knobs = RIVALS[rule].knobs if rule in RIVALS else (None,)
        return [Run(bed, rule, part.optimizer, lr, knob, TUNING[0]) for knob in knobs]

    for bed in part.beds:
        found = [tries(bed, rule) for rule in part.rules]
        results.complete(chain.from_iterable(t for t in found if len(t) > 1), carry_out)
        chosen = [results.best(t) if len(t) > 1 else t[0] for t in found]
        results.complete(
            (run._replace(seed=seed) for seed in part.seeds for run in chosen), carry_out
        )
