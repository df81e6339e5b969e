"""What does the penalty cost? ``python -m benchmarks.overhead`` writes ``results/overhead.*``.

Every call is timed in turn with its rivals, so that a ratio compares neighbours in time; the tables have the median of
the ratios of all rounds and their quartiles.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks._markdown import gpu_results
from benchmarks._overhead_fsdp2 import measure_fsdp2
from benchmarks._overhead_report import plot, report
from benchmarks._overhead_rivals import MAX_NORM, Branches, Groups, NoStep, clipping, with_own_backward
from benchmarks._timing import Call, environment, interleaved, peak_memory, quartiles, ratios
from gradbalance import attach

JSON = Path(__file__).parent / "results" / "overhead.json"
CLIP = "clip_grad_norm_"
IN_PLACE = "negation in place"
# The rule at its busiest: every group but the smallest is scaled, by factors near 1 so that the same gradients can be
# scaled a thousand times.
BUSY: dict[str, Any] = {"threshold": 1.0, "eta": 0.999, "smoothing": 0.0, "agreement": None}
MODES: dict[str, dict[str, Any]] = {
    "update": {**BUSY, "apply_to": "update"},
    "gradient": {**BUSY, "apply_to": "gradient"},
    "update + max_norm": {**BUSY, "apply_to": "update", "max_norm": MAX_NORM},
    "gradient + max_norm": {**BUSY, "apply_to": "gradient", "max_norm": MAX_NORM},
    "update, defaults": {},
    "gradient, nothing to scale": {**BUSY, "apply_to": "gradient", "threshold": 1e6},
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW fused": partial(torch.optim.AdamW, lr=1e-5, fused=True),
    "AdamW foreach": partial(torch.optim.AdamW, lr=1e-5, foreach=True),
    "AdamW default": partial(torch.optim.AdamW, lr=1e-5),
    "SGD": partial(torch.optim.SGD, lr=1e-5),
}


def with_gradients(n_groups: int, n_tensors: int, numel: int, device: str) -> Groups:
    """Parameters with random gradients."""
    groups: Groups = {f"group{m}": [] for m in range(n_groups)}
    for i in range(n_tensors):
        p = nn.Parameter(torch.zeros(numel, device=device))
        p.grad = torch.randn_like(p)
        groups[f"group{i * n_groups // n_tensors}"].append(p)
    return groups


def penalty(groups: Groups, options: dict[str, Any]) -> Call:
    """One step of the penalty on an optimizer that does nothing else."""
    optimizer = NoStep([p for group in groups.values() for p in group])
    attach(optimizer, groups, **options)
    return optimizer.step


def renewal(groups: Groups) -> Call:
    """What makes gradients that were clipped already count as new ones that have to be clipped."""
    first = next(iter(groups.values()))[0]

    def renew() -> None:
        # A little above the limit: clipping it away hundreds of times must not make the others denormal.
        first.grad = first.grad.detach()
        first.grad.flatten()[:1].fill_(1.01 * MAX_NORM)

    return renew


def measure_operations(n_groups: int, n_tensors: int, numel: int, device: str, rounds: int, rivals: bool) -> dict:
    """The penalty alone beside clipping, and beside the time in which the same bytes can be read and written."""
    groups = with_gradients(n_groups, n_tensors, numel, device)
    others = clipping(groups)
    calls = {CLIP: others[CLIP], **{name: penalty(groups, options) for name, options in MODES.items()}}
    calls |= others if rivals else {}
    source = torch.randn(n_tensors * numel, device=device) if rivals else torch.empty(0)
    calls |= {"copy": partial(torch.empty_like(source).copy_, source), IN_PLACE: source.neg_} if rivals else {}
    renew = renewal(groups)
    times = interleaved(calls, rounds, device, prepare=renew)
    found: dict = {
        "parameters": n_tensors * numel,
        "tensors": n_tensors,
        "groups": n_groups,
        "clip_ms": [1e3 * t for t in quartiles(times[CLIP])],
        "ratios": ratios(times, CLIP),
    }
    if rivals:
        # In place every byte is read and written once: so it is in scaling, and norms only read it.
        scaled = (n_groups - 1) / n_groups if device == "cpu" else 1.0
        floors = {CLIP: 1.5, "update": 0.5, "gradient": 0.5 + scaled}
        floors |= {"update + max_norm": 1.5, "gradient + max_norm": 1.5}
        found["gb_per_s"] = {name: 8e-9 * len(source) / float(times[name].median()) for name in ("copy", IN_PLACE)}
        found["over_floor"] = {name: quartiles(times[name] / times[IN_PLACE] / f) for name, f in floors.items()}
        found["peak_bytes"] = {}
        for name in (CLIP, *MODES):
            renew()
            found["peak_bytes"][name] = peak_memory(calls[name], device)
    return found


def measure_step(kind: str, size: int, optimizer: str, device: str, rounds: int, rivals: bool) -> dict:
    """A whole training step: forward, backward, balance, update. All share the model and the optimizer's state."""
    torch.manual_seed(0)
    model = Branches(kind, size).move(device)
    plain = OPTIMIZERS[optimizer](model.parameters())

    def twin() -> torch.optim.Optimizer:
        other = OPTIMIZERS[optimizer](model.parameters())
        other.state = plain.state
        return other

    def whole(optimizer: torch.optim.Optimizer, balance: Call | None = None, backward: Call | None = None) -> None:
        optimizer.zero_grad()
        if backward is None:
            model().backward()
        else:
            backward()
        if balance is not None:
            balance()
        optimizer.step()

    calls: dict[str, Call] = {"plain": partial(whole, plain)}
    for name in MODES if rivals else ("update", "gradient", "update, defaults"):
        balanced = twin()
        attach(balanced, model.groups(), **MODES[name])
        calls[name] = partial(whole, balanced)
    others = clipping({**model.groups(), "head": list(model.head.parameters())})
    if rivals:
        calls |= {name: partial(whole, plain, other) for name, other in others.items()}
    if rivals and size < 60:  # PCGrad alone takes 20 times as long as all others
        own = with_own_backward(model.losses, model.head.weight, twin())
        calls |= {name: partial(whole, plain, None, backward) for name, backward in own.items()}
    else:
        calls[CLIP] = partial(whole, plain, others[CLIP])
    times = interleaved(calls, rounds, device, warm_up=1)
    return {
        "model": kind,
        "optimizer": optimizer,
        "parameters": sum(p.numel() for p in model.parameters()),
        "plain_ms": [1e3 * t for t in quartiles(times["plain"])],
        "ratios": ratios(times, "plain"),
    }


def steps(device: str, quick: bool = False) -> list[Call]:
    """`measure_step` of every model and optimizer."""
    return [
        partial(measure_step, kind, million, name, device, 3 if quick else 7, name == "AdamW fused")
        for million in ((10,) if quick else (10, 60))
        for kind in ("MLP", "transformer")
        for name in OPTIMIZERS
    ]


def measure_profile(device: str, steps: int = 100) -> list[dict]:
    """The operators of one step of the penalty in gradient mode on 300 small tensors, by the host time they take."""
    groups = with_gradients(3, 300, 1000, device)
    step, renew = penalty(groups, MODES["gradient"]), renewal(groups)
    whole = interleaved({"step": step}, steps, "cpu", prepare=renew)["step"].median()
    durations: dict[str, list[float]] = {}
    for _ in range(steps):
        renew()
        with profile(activities=[ProfilerActivity.CPU]) as trace:
            step()
        for event in trace.events():
            durations.setdefault(event.name.removeprefix("aten::"), []).append(event.self_cpu_time_total)
    rows = [
        # The median, since what else runs on the machine interrupts a few.
        {"operator": name, "calls": len(us) / steps, "us": float(torch.tensor(us).median()) * len(us) / steps}
        for name, us in durations.items()
    ]
    return [{"operator": "whole", "calls": 1, "us": 1e6 * float(whole)}, *sorted(rows, key=lambda r: -r["us"])]


def curves(largest: int) -> dict[str, list[tuple[int, int, int]]]:
    """Groups, tensors, and elements of a tensor along each curve."""
    parameters = (10**6, 10**7, 10**8, 5 * 10**8)
    return {
        "parameters": [(3, 300, n // 300) for n in parameters if n <= largest],
        "tensors": [(2, n, 64) for n in (10, 100, 1000, 10_000)],
        "groups": [(n, 512, 64) for n in (2, 16, 64, 256)],
        "groups, 10,000 tensors": [(n, 10_000, 64) for n in (2, 256)],
    }


def rounds_at(size: tuple[int, int, int]) -> int:
    """As many as take about a second."""
    _, tensors, numel = size
    return max(5, min(60, 10**8 // (tensors * (numel + 10**4))))


def measurements(device: str = "cpu", quick: bool = False) -> dict[str, Call]:
    """What measures each part, ready for JSON; ``quick`` for the smallest sizes alone, to see that it runs."""
    numel, largest, rounds = (3000, 10**6, 9) if quick else (220_000, 5 * 10**8, 25)
    return {
        "operations": lambda: measure_operations(3, 300, numel, device, rounds, True),
        "curves": lambda: {
            name: [measure_operations(*at, device, rounds_at(at), False) for at in points]
            for name, points in curves(largest).items()
        },
        "steps": lambda: [call() for call in steps(device, quick)],
        "profile": lambda: measure_profile(device, 5 if quick else 100),
        "fsdp2": measure_fsdp2,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"measure these again: {', '.join(measurements())}; default all")
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds, nothing written")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    calls = measurements("cpu", arguments.quick)
    measured = {"environment": environment("cpu"), **{part: calls[part]() for part in arguments.parts or calls}}
    if arguments.parts:
        measured = {**json.loads(JSON.read_text()), **measured}
    shown = report(measured, gpu_results())
    if not arguments.quick:
        JSON.write_text(json.dumps(measured, indent=1) + "\n")
        JSON.with_suffix(".md").write_text(shown)
        plot(measured, JSON.with_suffix(".png"))
    print(shown)
