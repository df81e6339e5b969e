"""What is run, the most wanted first."""

from collections.abc import Callable, Iterable, Mapping
from math import nan
from statistics import fmean
from typing import NamedTuple

from benchmarks.balancing.rivals import RIVALS
from benchmarks.balancing.runs import RATES, Found, Results, Run
from benchmarks.balancing.testbeds import TESTBEDS, UNSEEN

SEEDS = range(400, 410)  # of no run that formed the rule
TUNING = range(390, 393)
DEFAULT = 1e-3  # the rate that torch proposes for Adam and AdamW, at which most people train


class Part(NamedTuple):
    """Some testbeds under one optimizer with some rules.

    Each rate is run with the seeds that are measured if ``lr`` is None and ``at_best`` is False, after the seeds of
    tuning. With ``at_best`` the rates are run with the seeds of tuning, and the rate that is best without balancing
    with those that are measured; and so is the rate that is best for the rule.
    """

    optimizer: str
    testbeds: tuple[str, ...]
    rules: tuple[str, ...]
    lr: float | None = None
    at_best: bool = False


BASE = ("none", "Useful")
GAINS = ("C0", "D", "H", "VC", "C2", "POMN", "V2")  # where a branch is noise, or worse
LOSSES = ("WU", "S2", "POM", "B", "YB")  # where the rule has nothing to gain
SEEN = tuple(testbed for testbed in TESTBEDS if testbed not in UNSEEN)
OTHERS = tuple(t for t in SEEN if t not in (*GAINS, *LOSSES, "S3", "Y6"))
STARVED = tuple(name for name, testbed in TESTBEDS.items() if testbed.starved)
CURES = ("a slower noisy branch", "weight decay", "dropout", "by hand", "hypergradient")
WATCHED = ("watched for 1 epoch", "watched for 5 epochs")
RIVAL = (
    "own heads", "own heads and Useful", "OGM-GE", "noise alone", "clip groups", "epochwise, as MILES",
    "paper, on the update", "update times signal to noise", "update over signal to noise",
)  # fmt: skip
FORMULA = (
    "without shrinkage", "useful part alone", "most 3", "most 30", "smoothing 0.98", "smoothing 0.999", "1,024 entries",
)  # fmt: skip
FEW = ("C0", "D", "POMN", "V2")

PARTS = [
    Part("AdamW", (*GAINS, *LOSSES), BASE, lr=DEFAULT),
    Part("AdamW", UNSEEN, BASE),
    Part("AdamW", GAINS, BASE),
    Part("AdamW", LOSSES, BASE),
    Part("SGD", STARVED, BASE, at_best=True),
    Part("AdamW", ("C0", "D", "H", "V2", "POMN"), CURES, lr=DEFAULT),
    *(Part("AdamW", ("D", "C0", "H", "V2", "S2", "WU"), WATCHED, lr=lr) for lr in RATES["AdamW"]),
    Part("AdamW", OTHERS, BASE),
    Part("AdamW", (*FEW, "WU"), ("every 4", "every 16"), lr=DEFAULT),
    Part("AdamW", (*FEW, "H", "WU"), FORMULA, lr=DEFAULT),
    Part("Muon", ("D", "POMN", "POM", "YB", "C0", "VC", "Y3"), BASE, at_best=True),
    Part("Adam", ("D", "POMN", "POM", "YB", "C0", "V2", "S2"), BASE, at_best=True),
    Part("AdamW", FEW, RIVAL, lr=DEFAULT),
    Part("SGD", ("C1", "C2", "VC", "C0", "B", "YB", "POM"), BASE, at_best=True),
]

# A noisy branch slowed by hand where the rate is so large that it cannot settle.
SLOWED = [
    Run(testbed, "a slower noisy branch", optimizer, lr, factor, 0)
    for testbed, optimizer, lr in (("H", "AdamW", 3e-2), ("D", "Muon", 0.1))
    for factor in (0.3, 0.1, 0.001)
]


def best_rate(
    runs: Mapping[Run, Found], testbed: str, optimizer: str, rule: str, value: str = "valid"
) -> float:
    """The learning rate that is best for a rule on validation, by the mean over the seeds of tuning.

    NaN until each rate was tried with each of these seeds.
    """
    scores: dict[float, list[float]] = {}
    for run, found in runs.items():
        if run[:3] == (testbed, rule, optimizer) and run.seed in TUNING:
            scores.setdefault(run.lr, []).append(found[value])
    complete = {lr: fmean(v) for lr, v in scores.items() if len(v) == len(TUNING)}
    if set(complete) < set(RATES[optimizer]):
        return nan
    return max(complete, key=lambda lr: complete[lr])


def measure(results: Results, part: Part, carry_out: Callable[..., Iterable[Found]] = map) -> None:
    """For each testbed the seeds of tuning, then those that are measured."""
    for testbed in part.testbeds:
        tried = [Run(testbed, rule, part.optimizer, 0.0, None, 0) for rule in part.rules]
        rates = (part.lr,) if part.lr else RATES[part.optimizer]
        if part.lr is None:
            tuned = [r._replace(lr=lr, seed=s) for r in tried for lr in rates for s in TUNING]
            results.complete(tuned, carry_out)
        if part.at_best:
            best = [best_rate(results, testbed, part.optimizer, rule) for rule in part.rules]
            rates = tuple(dict.fromkeys(best))
        chosen = [with_knob(results, r._replace(lr=lr), carry_out) for r in tried for lr in rates]
        results.complete([r._replace(seed=s) for s in SEEDS for r in chosen], carry_out)


def with_knob(results: Results, run: Run, carry_out: Callable[..., Iterable[Found]]) -> Run:
    """The run with the knob of its rule that is best on validation, by the mean over the seeds of tuning."""
    tries = [run._replace(knob=knob) for knob in RIVALS[run.rule].knobs]
    if len(tries) == 1:
        return tries[0]
    results.complete([t._replace(seed=seed) for t in tries for seed in TUNING], carry_out)
    return max(
        tries, key=lambda t: fmean(results[t._replace(seed=seed)]["valid"] for seed in TUNING)
    )
