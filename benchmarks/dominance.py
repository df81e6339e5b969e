"""Does balancing help? ``python -m benchmarks.dominance`` trains what is missing and writes ``results/dominance.*``.

Every run is one line of ``dominance.jsonl``, written when it ends; stop it at any time and start it again. The learning
rate of a testbed and optimizer is the best of three without balancing, on validation, and all rules share it but those
with a rate of their own, the best of five for them; a rule with a knob has three tries more. Rules were designed on the
same testbeds, but on other seeds.
"""

import argparse
import json
import os
from collections.abc import Callable, Iterable
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from time import process_time
from typing import Any, NamedTuple

import torch

from benchmarks.dominance_report import MODES, report
from benchmarks.rivals import RULES, ours, plain
from benchmarks.testbeds import BEDS, Model, probe, score
from gradbalance import Recorder
from gradbalance._penalty import penalty_of

RESULTS = Path(__file__).parent / "results"
SEEDS = range(100, 110)
ALONE = SEEDS[:4]  # enough for the headroom
TUNING = 90
WATCHED = SEEDS[0]  # the seed whose norms are recorded; it costs time

RATES = {
    "SGD": (0.01, 0.02, 0.04),
    "Adam": (3e-4, 1e-3, 3e-3),
    "AdamW": (3e-4, 1e-3, 3e-3),
    "Muon": (3e-3, 0.01, 0.03),
}
HIGHER = {"SGD": (0.08, 0.16)}  # also tried by the rules with a rate of their own
BASE = ("none", "default")
BY_HAND = ("clip groups", "faster by hand", "slower by hand")
LEARNED = ("paper", "errors", "OGM-GE")
COSTLY = ("GradNorm", "UPGrad", "OGM", "clip all", "own heads", "PCGrad", "IMTL-G")

# What is run, most important first: testbeds, rules, and the optimizer where it is not the testbed's.
ALL = ("S1", "S2", "S3", "V2", "Y3", "Y6", "C1", "C2", "VC", "C0", "B", "YB", "A1", "POM")
UNEVEN, EVEN = ALL[:10], ALL[10:]
PLAN: list[tuple[tuple[str, ...], tuple[str, ...], str | None]] = [
    (ALL, BASE, None),
    (UNEVEN, ("none, own rate", "default, own rate"), None),
    (UNEVEN, BY_HAND, None),
    (("S2", "C1"), MODES[:-1], "SGD"),
    (("S2", "C1"), ("none", *MODES), "Adam"),
    (("S2", "C1"), ("none", *MODES), "AdamW"),
    (("S2", "C1"), ("none", *MODES), "Muon"),
    (("V2", "Y3"), ("none", "default", "norms only", "norms only, raising"), "Adam"),
    (("S2", "C1"), (*LEARNED, *COSTLY), None),
    (UNEVEN, ("norms only", "damping"), None),
    (UNEVEN, LEARNED, None),
    (EVEN, (*BY_HAND, "norms only"), None),
    (EVEN, LEARNED, None),
    (UNEVEN, ("agreement 0.8",), None),
    (("S2", "S3", "V2", "Y3", "C1", "C2", "VC", "C0"), ("damping, norms only",), None),
    (("Y3L",), (*BASE, "damping"), None),
]


class Run(NamedTuple):
    """One training run. ``rule`` is one of RULES, or "alone: " and a branch."""

    bed: str
    rule: str
    optimizer: str
    lr: float
    knob: float | None
    seed: int


def optimizer_for(name: str, model: Model, lr: float) -> torch.optim.Optimizer:
    """The optimizer, with one param_group for every branch and one for the rest."""
    if name == "Muon":  # takes matrices alone: the biases stay at their start
        for p in model.parameters():
            p.requires_grad_(p.dim() == 2)
    parts = [*model.encoders.values(), torch.nn.ModuleList([model.joint, model.heads])]
    groups = [{"params": [p for p in part.parameters() if p.requires_grad]} for part in parts]
    options: dict[str, Any] = {"SGD": {"momentum": 0.9}, "AdamW": {"weight_decay": 0.01}}.get(name, {})
    return getattr(torch.optim, name)(groups, lr=lr, **options)


def train(run: Run) -> dict[str, Any]:
    """Train and test once: the scores of the joint output and of a probe on each branch, its norms, the time."""
    bed, step_of = BEDS[run.bed], plain
    if run.rule.startswith("alone: "):
        bed = bed.alone(next(b for b in bed.branches if b.name == run.rule.removeprefix("alone: ")))
    elif run.rule == "none" and run.seed == WATCHED:
        step_of = ours(eta=1, alpha=0, agreement=None)  # bitwise the same steps, recorded
    else:
        step_of = RULES[run.rule].step
    parts = bed.parts(bed, run.seed)
    train = parts["train"]
    torch.manual_seed(run.seed)
    outputs = train.target.shape[1] if train.target.is_floating_point() else 10
    model = Model(bed, [x.shape[1] for x in train.inputs], outputs)
    optimizer = optimizer_for(run.optimizer, model, run.lr)
    step = step_of(model, optimizer, run.knob)
    recorder = Recorder(optimizer, every=5) if run.seed == WATCHED and penalty_of(optimizer) else None
    began = process_time()
    batches = torch.Generator().manual_seed(run.seed)
    for _ in range(bed.epochs):
        for batch in torch.randperm(len(train.target), generator=batches).split(bed.batch):
            if len(batch) == bed.batch:
                step([x[batch] for x in train.inputs], train.target[batch])
    found: dict[str, Any] = run._asdict() | {"seconds": round(process_time() - began, 3)}
    with torch.no_grad():
        known = model.features(train.inputs)
        for name in ("valid", "test"):
            features = model.features(parts[name].inputs)
            found[name] = score(model.joint(torch.cat(features, 1)), parts[name].target)
        tests = zip(known, features, strict=True)
        found["probes"] = [score(probe(k, train.target, f), parts["test"].target) for k, f in tests]
    if recorder is not None:
        summary = recorder.summary()
        found["dominance"], found["dominance_after"] = summary.dominance, summary.dominance_after
        found["coefficients"] = list(summary.coefficients.values())
    return found


class Results(dict[Run, dict[str, Any]]):
    """What was measured, by run; kept in a file of one line each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith("\n")]  # the last one may have been cut off
        if len(whole) < len(lines):
            path.write_text("".join(whole))
        for found in map(json.loads, whole):
            self[Run(*(found[field] for field in Run._fields))] = found

    def complete(self, runs: Iterable[Run], carry_out: Callable[..., Iterable[dict[str, Any]]] = map) -> None:
        """Train what is missing with a ``map`` and write each line as it comes."""
        missing = [run for run in dict.fromkeys(runs) if run not in self]
        with self.path.open("a") as file:
            for found in carry_out(train, missing):
                self[Run(*(found[field] for field in Run._fields))] = found
                file.write(json.dumps(found) + "\n")
                file.flush()

    def best(self, tries: list[Run]) -> Run:
        """Of runs that are complete the best on validation."""
        return max(tries, key=lambda run: self[run]["valid"])


def measure(
    results: Results,
    beds: Iterable[str],
    rules: Iterable[str],
    optimizer: str | None,
    carry_out: Callable[..., Iterable[dict[str, Any]]] = map,
) -> None:
    """One entry of PLAN: the learning rates first, then the knobs, then every seed."""
    optimizers = {bed: optimizer or BEDS[bed].optimizer for bed in beds}
    rates = {bed: [Run(bed, "none", o, lr, None, TUNING) for lr in RATES[o]] for bed, o in optimizers.items()}
    results.complete(chain.from_iterable(rates.values()), carry_out)
    best = {bed: results.best(tries) for bed, tries in rates.items()}

    def starts(bed: str, rule: str) -> list[Run]:
        higher = [rates[bed][0]._replace(lr=lr) for lr in HIGHER.get(optimizers[bed], ())]
        return rates[bed] + higher if RULES[rule].own_rate else [best[bed]]

    knobs = {
        (bed, rule): [run._replace(rule=rule, knob=k) for run in starts(bed, rule) for k in RULES[rule].knobs]
        for bed in beds
        for rule in rules
    }
    results.complete(chain.from_iterable(tries for tries in knobs.values() if len(tries) > 1), carry_out)
    chosen = [results.best(tries) if len(tries) > 1 else tries[0] for tries in knobs.values()]
    runs = [run._replace(seed=seed) for seed in SEEDS for run in chosen]
    if "none" in rules and optimizer is None:
        branches = [(bed, branch.name) for bed in beds for branch in BEDS[bed].branches]
        runs += [best[bed]._replace(rule=f"alone: {branch}", seed=seed) for seed in ALONE for bed, branch in branches]
    results.complete(runs, carry_out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="only write the tables and the figure")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    RESULTS.mkdir(exist_ok=True)
    kept = Results(RESULTS / "dominance.jsonl")
    if not arguments.report:
        with get_context("spawn").Pool(arguments.workers, torch.set_num_threads, (1,)) as pool:
            for part in PLAN:
                measure(kept, *part, pool.imap_unordered)
    report(kept, SEEDS, RESULTS)
