"""Everything that needs a GPU: ``python -m benchmarks.gpu`` writes ``results/gpu.json`` and enters it in the reports.

The moments, the overhead of the penalty, its kernel launches, host time and host synchronisations. A part that fails leaves its error in place of its figures.
"""

import argparse
import json
import sys
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter

import torch

from benchmarks._markdown import GPU, gpu_results
from benchmarks._timing import Call, environment, interleaved, launches, ratios
from benchmarks.moments import measure as moments
from benchmarks.moments import report as moments_report
from benchmarks.overhead import measure as overhead
from benchmarks.overhead import report as overhead_report
from benchmarks.overhead.rivals import clipping

MODES = ("update", "gradient", "gradient + max_norm")


def attempt(call: Callable[[], object]) -> object:
    """What the call returns, or its error."""
    try:
        return call()
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}


def synchronisations(call: Call) -> int:
    """How often the host waits for the GPU during the call."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def steps(device: str) -> tuple[dict[str, Call], Call]:
    """Steps of the penalty by mode, set up, and what has to come before each of them."""
    groups = overhead.with_gradients(3, 300, 1000, device)
    found = {name: overhead.penalty(groups, overhead.MODES[name]) for name in MODES}
    lr = torch.tensor(1e-5, device=device)
    optimizer = torch.optim.AdamW(
        [p for group in groups.values() for p in group], lr=lr, capturable=device != "cpu"
    )
    overhead.balance(optimizer, groups, overhead.MODES["update"])
    found["update, AdamW with tensor lr"] = lambda: optimizer.step()
    renew = overhead.renewal(groups)
    interleaved(found, 1, device, prepare=renew)
    return found, renew


def host_times(
    n_groups: int, n_tensors: int, device: str, rounds: int = 30
) -> dict[str, list[float]]:
    """How long the host takes to launch a step, against clipping, the GPU being idle at the start."""
    groups = overhead.with_gradients(n_groups, n_tensors, 64, device)
    calls = {overhead.CLIP: clipping(groups)[overhead.CLIP]}
    calls |= {
        name: overhead.penalty(groups, overhead.MODES[name])
        for name in (*MODES, "update, defaults")
    }

    renew = overhead.renewal(groups)

    def prepare() -> None:
        renew()
        if device != "cpu":
            torch.cuda.synchronize()

    return ratios(
        interleaved(calls, rounds, "cpu", clock=perf_counter, prepare=prepare), overhead.CLIP
    )


def of_each_step(count: Callable[[Call], int], device: str) -> dict[str, object]:
    calls, renew = steps(device)
    found = {}
    for name, call in calls.items():
        renew()
        found[name] = attempt(partial(count, call))
    return found


def all_moments(device: str) -> dict:
    found = {
        name: attempt(partial(moments.measure_size, shape, device, dtype, moments.ROUNDS))
        for name, (shape, dtype) in moments.sizes(device).items()
    }
    return {
        "rounds": moments.ROUNDS,
        "sizes": found,
        "accuracy": attempt(partial(moments.accuracy, device)),
    }


def all_overhead(device: str) -> dict:
    calls = overhead.measurements(device)
    found = {part: attempt(calls[part]) for part in ("operations", "curves", "profile")}
    return {**found, "steps": [attempt(step) for step in overhead.steps(device)]}


def parts(device: str = "cuda") -> dict[str, Callable[[], object]]:
    """What is measured, by name."""
    return {
        "host_synchronisations": partial(of_each_step, synchronisations, device),
        "launches": partial(of_each_step, launches, device),
        "host_time": lambda: {
            "10,000 tensors": attempt(partial(host_times, 2, 10_000, device)),
            "256 groups": attempt(partial(host_times, 256, 512, device)),
        },
        "moments": partial(all_moments, device),
        "overhead": partial(all_overhead, device),
    }


def measure(calls: dict[str, Callable[[], object]], path: Path, device: str = "cuda") -> None:
    """Call each and write what it gives, one by one: a crash then costs no figure that is there already."""
    for name, call in calls.items():
        print(name, file=sys.stderr, flush=True)
        found = {**gpu_results(path), "environment": environment(device), name: attempt(call)}
        path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "parts", nargs="*", help=f"measure these again: {', '.join(parts())}; default all"
    )
    chosen = parser.parse_args().parts
    if not torch.cuda.is_available():
        sys.exit(
            "benchmarks.gpu must run where torch sees a CUDA device. Got none. Run it on a machine with a GPU."
        )
    calls = parts()
    measure({name: calls[name] for name in chosen or calls}, GPU)
    for path, report in (
        (moments_report.JSON, moments_report.report),
        (overhead_report.JSON, overhead_report.report),
    ):
        path.with_suffix(".md").write_text(report(json.loads(path.read_text()), gpu_results()))
    print(GPU.read_text())
