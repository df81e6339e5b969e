"""What is run, the most wanted first."""

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any, NamedTuple

from benchmarks.balancing.rivals import RIVALS
from benchmarks.balancing.runs import APART, RATES, Found, Results, Run
from benchmarks.balancing.testbeds import BEDS

SEEDS = range(200, 210)
FEW = SEEDS[:4]  # enough for the headroom
LANDED = range(100, 110)  # those of the rule that Coherence replaces, whose runs are kept as its record
TUNING = 90


class Part(NamedTuple):
    """Some testbeds under one optimizer with some rules; ``lr`` is chosen if None, among those of RATES."""

    optimizer: str
    beds: tuple[str, ...]
    rules: tuple[str, ...]
    lr: float | None = None
    seeds: Iterable[int] = SEEDS


ALL = tuple(BEDS)
FIRST = ("C0", "V2", "VC", "C2", "POMN", "S2", "D", "S1", "C1", "B", "Y3", "YB", "POM")
OTHERS = tuple(bed for bed in ALL if bed not in (*FIRST, "S3", "Y6"))
OLD = ("S1", "S2", "S3", "V2", "Y3", "Y6", "C1", "C2", "VC", "C0", "B", "YB", "POM")  # run with the rule replaced
BASE = ("none", "Coherence")
CHEAP = ("C0", "V2", "C2", "POMN", "S2")
FORMULA = (
    "raise only",
    "damp only",
    "chance 0.01",
    "most 2",
    "most 10",
    "a threshold",
    "smoothing 0.9",
    "smoothing 0.995",
)
TELLING = (
    "by hand", "own heads", "own heads and Coherence", "OGM-GE", "noise alone", "clip groups", "epochwise, as MILES",
    "paper, on the update", "Adam's signal to noise", "update times signal to noise", "update over signal to noise",
)  # fmt: skip

PARTS = [
    Part("AdamW", FIRST, BASE),
    Part("AdamW", FIRST, (APART,), seeds=FEW),
    Part("SGD", OLD, BASE, seeds=LANDED),
    Part("AdamW", ("C0",), BASE, lr=1e-3),
    Part("AdamW", OTHERS, BASE),
    Part("AdamW", OTHERS, (APART,), seeds=FEW),
    Part("AdamW", ("POMN", "V2", "C0", "C2", "S2"), TELLING),
    Part("AdamW", ("C0", "V2", "C2", "VC"), BASE, lr=3e-3),
    Part("Adam", ("POMN", "D", "C0", "V2", "S2", "VC"), BASE),
    Part("AdamW", ("C0", "V2", "POMN"), ("every 4", "every 16")),
    Part("AdamW", ("C0", "V2", "POMN", "S2"), FORMULA),
    Part("Muon", ("POMN", "D", "VC", "S2", "C0"), BASE),
]


def measure(results: Results, part: Part, carry_out: Callable[..., Iterable[Found]] = map) -> None:
    """The learning rates first, then the knobs, then every seed."""
    rates = {
        bed: [
            Run(bed, "none", part.optimizer, lr, None, TUNING)
            for lr in (RATES[part.optimizer] if not part.lr else [part.lr])
        ]
        for bed in part.beds
    }
    if not part.lr:
        results.complete(chain.from_iterable(rates.values()), carry_out)
    best = {bed: tries[0] if part.lr else results.best(tries) for bed, tries in rates.items()}

    def knobs(rule: str) -> tuple[Any, ...]:
        return RIVALS[rule].knobs if rule in RIVALS else (None,)

    tries = {
        (bed, rule): [best[bed]._replace(rule=rule, knob=knob) for knob in knobs(rule)]
        for rule in part.rules
        for bed in part.beds
    }
    results.complete(chain.from_iterable(t for t in tries.values() if len(t) > 1), carry_out)
    chosen = [results.best(t) if len(t) > 1 else t[0] for t in tries.values()]
    results.complete(
        (run._replace(seed=seed) for bed in part.beds for seed in part.seeds for run in chosen if run.bed == bed),
        carry_out,
    )
