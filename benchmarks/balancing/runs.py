"""One training run, and the file that keeps what every run gave."""

import base64
import json
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from time import process_time
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.balancing.data import Part
from benchmarks.balancing.model import Model, score
from benchmarks.balancing.rivals import RIVALS, Step, by_hand
from benchmarks.balancing.testbeds import TESTBEDS, Testbed
from gradbalance import ConflictAwarePenalty, Recorder
from gradbalance.rules import Useful, Watch

Found = dict[str, Any]

RATES = {
    "SGD": (0.01, 0.02, 0.04, 0.08, 0.16, 0.32),
    "Adam": (1e-3, 3e-3, 1e-2, 3e-2),
    "AdamW": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "Muon": (3e-3, 0.01, 0.03, 0.1, 0.3),
}
# Whose predictions are kept, so that a fixed test set can be drawn anew: POM has one split.
KEPT = ("POM", "POMN")


class Run(NamedTuple):
    """One training run. ``rule`` is one of RIVALS."""

    testbed: str
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


def train(run: Run) -> Found:
    """Train once, with a test after the last epoch and after the one that is best on validation.

    Returns:
        The run; the scores ``valid`` and ``test`` after the last epoch; ``best_epoch``, ``best_valid`` and
        ``best_test``, those of the epoch with the highest score on validation; the ``coefficients`` at the end; the
        ``seconds`` of processor time of the training steps.
    """
    testbed = TESTBEDS[run.testbed]
    parts = testbed.parts(testbed, run.seed)
    rival = RIVALS[run.rule]
    if rival.watch:
        rival = by_hand(watched(run, testbed, parts["train"], rival.watch))
    model = model_for(testbed, parts["train"], run.seed)
    step = rival.step(model, optimizer_for(run.optimizer, model, run.lr), run.knob)
    found: Found = run._asdict() | {"best_valid": -1.0}
    seconds = 0.0
    for epoch, spent in enumerate(epochs_of(testbed, parts["train"], run.seed, model, step), 1):
        seconds += spent
        model.eval()
        with torch.no_grad():
            if step.after_epoch is not None:
                step.after_epoch(parts["valid"])
            found["valid"] = score(predicted(model, parts["valid"]), parts["valid"].target)
            if found["valid"] > found["best_valid"] or epoch == testbed.epochs:
                output = predicted(model, parts["test"])
                found["test"] = score(output, parts["test"].target)
            if found["valid"] > found["best_valid"]:
                best = {"epoch": epoch, "valid": found["valid"], "test": found["test"]}
                found |= {f"best_{key}": value for key, value in best.items()}
    is_kept = run.testbed in KEPT and run.rule in ("none", "Useful")
    if is_kept and (run.optimizer, run.lr) == ("AdamW", 1e-3):
        found["predictions"] = packed(output)
    found["coefficients"] = [round(c, 3) for c in step.coefficients()]
    found["seconds"] = round(seconds, 3)
    return found


def model_for(testbed: Testbed, known: Part, seed: int) -> Model:
    torch.manual_seed(seed)
    outputs = 1 + int(known.target.max())
    if known.target.is_floating_point():
        outputs = known.target.shape[1]
    return Model(testbed, [x.shape[1] for x in known.inputs], outputs)


def epochs_of(
    testbed: Testbed, known: Part, seed: int, model: Model, step: Step
) -> Iterator[float]:
    """Train epoch by epoch, giving the processor time of the steps of each."""
    batches = torch.Generator().manual_seed(seed)
    for _ in range(testbed.epochs):
        model.train()
        began = process_time()
        for batch in torch.randperm(len(known.target), generator=batches).split(testbed.batch):
            if len(batch) == testbed.batch:
                step([x[batch] for x in known.inputs], known.target[batch])
        yield process_time() - began


def watched(run: Run, testbed: Testbed, known: Part, epochs: int) -> dict[str, float]:
    """The constant factors that the default rule would give, after a watch of a few epochs that changes nothing."""
    model = model_for(testbed, known, run.seed)
    optimizer = optimizer_for(run.optimizer, model, run.lr)
    rule = Watch(Useful())
    wrapped = ConflictAwarePenalty(optimizer, dict(model.encoders.items()), rule)
    with Recorder(wrapped) as recorder:
        for _ in islice(epochs_of(testbed, known, run.seed, model, Step(model, wrapped)), epochs):
            pass
    return {name: factor for name, (factor, _) in recorder.multipliers().items()}


def predicted(model: Model, part: Part) -> Tensor:
    return model.output(model.features(part.inputs))


def packed(output: Tensor) -> str:
    """Predictions in half precision, as text."""
    return base64.b64encode(output.half().numpy().tobytes()).decode()


class Results(dict[Run, Found]):
    """What was measured, by run; kept in a file of one line each.

    Args:
        path: The file that is appended to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        # The last one may have been cut off.
        whole = [line for line in lines if line.endswith("\n")]
        if len(whole) < len(lines):
            path.write_text("".join(whole))
        for found in map(json.loads, whole):
            self[Run(*(found[field] for field in Run._fields))] = found

    def complete(
        self, runs: Iterable[Run], carry_out: Callable[..., Iterable[Found]] = map
    ) -> None:
        """Train what is missing with a ``map`` and write each line as it comes."""
        missing = [run for run in dict.fromkeys(runs) if run not in self]
        with self.path.open("a") as file:
            for found in carry_out(train, missing):
                self[Run(*(found[field] for field in Run._fields))] = found
                file.write(json.dumps(found, separators=(",", ":")) + "\n")
                file.flush()
