"""One training run, and the file that keeps what every run gave."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from time import process_time
from typing import Any, NamedTuple

import torch

from benchmarks.balancing.data import Part
from benchmarks.balancing.model import Model, probe, score
from benchmarks.balancing.rivals import RIVALS, Step
from benchmarks.balancing.testbeds import BEDS, Bed

Found = dict[str, Any]
APART = "apart"  # every encoder trained alone, their outputs added up

RATES = {
    "SGD": (0.01, 0.02, 0.04),
    "Adam": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    "AdamW": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    "Muon": (1e-3, 3e-3, 0.01, 0.03, 0.1),
}


class Run(NamedTuple):
    """One training run. ``rule`` is one of RIVALS, or APART."""

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
    options: dict[str, Any] = {
        "SGD": {"momentum": 0.9},
        "Adam": {"fused": True},
        "AdamW": {"weight_decay": 0.01, "fused": True},
    }.get(name, {})
    return getattr(torch.optim, name)(groups, lr=lr, **options)


def fit(
    bed: Bed, parts: dict[str, Part], run: Run, build: Callable[[Model, Any], Step]
) -> tuple[Model, float]:
    """A trained model, and the processor time of its steps."""
    known = parts["train"]
    torch.manual_seed(run.seed)
    outputs = known.target.shape[1] if known.target.is_floating_point() else 10
    model = Model(bed, [x.shape[1] for x in known.inputs], outputs)
    step = build(model, optimizer_for(run.optimizer, model, run.lr))
    seconds, batches = 0.0, torch.Generator().manual_seed(run.seed)
    for _ in range(bed.epochs):
        began = process_time()
        for batch in torch.randperm(len(known.target), generator=batches).split(bed.batch):
            if len(batch) == bed.batch:
                step([x[batch] for x in known.inputs], known.target[batch])
        seconds += process_time() - began
        if step.after_epoch is not None:
            with torch.no_grad():
                step.after_epoch(parts["valid"])
    return model, seconds


def train(run: Run) -> Found:
    """Train and test once.

    Returns:
        The run, its score on ``valid`` and ``test``, that of a ridge ``probes`` on each branch, that of the joint
        output with each branch ``missing``, the ``coefficients`` at the end, and the ``seconds`` of a training.
    """
    bed = BEDS[run.bed]
    parts = bed.parts(bed, run.seed)
    known, test = parts["train"], parts["test"]
    found: Found = run._asdict()
    if run.rule == APART:
        results = [_alone(bed, m, parts, run) for m in range(len(bed.branches))]
        added = sum(
            r.output if known.target.is_floating_point() else r.output.log_softmax(1)
            for r in results
        )
        alone = {
            "probes": [r.probe for r in results],
            "alone": [score(r.output, test.target) for r in results],
        }
        return (
            found
            | {
                "test": score(added, test.target),
                "valid": None,
                "seconds": sum(r.seconds for r in results),
            }
            | alone
        )
    step: list[Step] = []

    def build(model: Model, optimizer: Any) -> Step:
        step.append(RIVALS[run.rule].step(model, optimizer, run.knob))
        return step[0]

    model, found["seconds"] = fit(bed, parts, run, build)
    with torch.no_grad():
        train_features, features = model.features(known.inputs), model.features(test.inputs)
        found["valid"] = score(
            model.output(model.features(parts["valid"].inputs)), parts["valid"].target
        )
        found["test"] = score(model.output(features), test.target)
        pairs = zip(train_features, features, strict=True)
        found["probes"] = [score(probe(k, known.target, f), test.target) for k, f in pairs]
        found["missing"] = [
            score(output, test.target) for output in model.without(features, train_features)
        ]
    found["coefficients"] = [round(c, 3) for c in step[0].coefficients()]
    found["seconds"] = round(found["seconds"], 3)
    return found


class Alone(NamedTuple):
    output: torch.Tensor
    probe: float
    seconds: float


def _alone(bed: Bed, m: int, parts: dict[str, Part], run: Run) -> Alone:
    """One encoder with a head of its own, trained alone: what it says of the test part, and the score of a probe."""
    own = {name: Part([part.inputs[m]], part.target) for name, part in parts.items()}
    model, seconds = fit(bed.alone(bed.branches[m]), own, run, Step)
    with torch.no_grad():
        (known,), (features,) = (model.features(own[name].inputs) for name in ("train", "test"))
        seen = score(probe(known, own["train"].target, features), own["test"].target)
        return Alone(model.output([features]), seen, round(seconds, 3))


class Results(dict[Run, Found]):
    """What was measured, by run; kept in a file of one line each.

    Args:
        path: The file that is appended to.
        record: A file of runs that can not be repeated, if any: those of the rule before, at the commit f713aad.
    """

    def __init__(self, path: Path, record: Path | None = None) -> None:
        self.path = path
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        whole = [
            line for line in lines if line.endswith("\n")
        ]  # the last one may have been cut off
        if len(whole) < len(lines):
            path.write_text("".join(whole))
        kept = record.read_text().splitlines() if record else []
        for found in map(json.loads, [*kept, *whole]):
            self[Run(*(found[field] for field in Run._fields))] = found

    def complete(
        self, runs: Iterable[Run], carry_out: Callable[..., Iterable[Found]] = map
    ) -> None:
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
