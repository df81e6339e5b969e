"""What the rule was to reach, and whether it does."""

from typing import NamedTuple

from benchmarks.balancing.cells import Cells, Change
from benchmarks.balancing.grid import DEFAULT, OLD
from benchmarks.balancing.testbeds import BEDS

# Testbed, points, and the rate where it is not the best one without balancing.
GAINS = [
    ("C0", 6.0, None),
    ("V2", 2.5, None),
    ("VC", 1.2, None),
    ("C2", 1.5, None),
    ("POMN", 3.0, None),
    ("C0", 10.0, 1e-3),
]
STARVED = ("S1", "S2", "S3", "V2", "Y3", "Y6")
MOST_HARM = 0.3


class Goal(NamedTuple):
    what: str
    reached: str
    met: bool


def goals(cells: Cells) -> list[Goal]:
    """Each goal with its figure; those without runs are left out."""
    found = []
    for bed, least, lr in GAINS:
        change = cells.change(bed, "Coherence", "AdamW", lr)
        if change:
            rate = f"at {lr or cells.rate(bed, 'AdamW'):g}"
            others = {
                r: cells.change(bed, "Coherence", "AdamW", r) for r in (1e-3, 3e-3) if lr is None
            }
            room = cells.headroom(bed)[0] if lr is None else None
            shown = [
                f"{c} at {r:g}" for r, c in others.items() if c and r != cells.rate(bed, "AdamW")
            ]
            shown += [f"headroom {room}"] if room else []
            reached = "; ".join([str(change), *shown])
            found.append(
                Goal(
                    f"AdamW, {BEDS[bed].title} {rate}: at least +{least}",
                    reached,
                    change.mean >= least,
                )
            )
    for optimizer, lr in (("AdamW", None), ("AdamW", DEFAULT), ("Adam", None), ("Muon", None)):
        changes = {bed: cells.change(bed, "Coherence", optimizer, lr) for bed in BEDS}
        known = {bed: change for bed, change in changes.items() if change}
        harmed = {bed: change for bed, change in known.items() if change.worse(-MOST_HARM)}
        if known:
            shown = (
                ", ".join(f"{bed} {change}" for bed, change in harmed.items())
                or f"none of {len(known)}"
            )
            at = f"at {lr:g}" if lr else "at the best rate"
            what = f"{optimizer} {at}: nowhere significantly worse by more than {MOST_HARM}"
            found.append(Goal(what, shown, not harmed))
    for bed in OLD:
        change = cells.change(bed, "Coherence", "SGD")
        if bed in STARVED:
            against = cells.change(bed, "Coherence", "SGD", base="landed")
            least = 0.0 if bed in ("S3", "V2") else -1.0
            what = f"SGD, {BEDS[bed].title}: {'ahead of' if least == 0 else 'at most 1 behind'} the rule before"
            if against:
                found.append(Goal(what, _both(change, against), against.mean >= least))
        elif change:
            found.append(
                Goal(
                    f"SGD, {BEDS[bed].title}: at least −{MOST_HARM}",
                    str(change),
                    change.mean >= -MOST_HARM,
                )
            )
    for rule in ("every 4", "every 16"):
        for bed in BEDS:
            change = cells.change(bed, rule, lr=DEFAULT, base="Coherence")
            if change:
                alike = change.mean >= -max(change.half, MOST_HARM)
                what = f"AdamW, {BEDS[bed].title}, {rule}: as good as every step within noise"
                found.append(Goal(what, str(change), alike))
    return found


def _both(change: Change | None, against: Change) -> str:
    return f"{change}; against it {against}"
