"""One part of ``benchmarks.gpu``: ``python -m benchmarks.gpu.parts PART FILE`` writes what it measures to the file."""

import argparse
import json
import os
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter

import torch

from benchmarks._timing import Call, environment, interleaved, launches, ratios
from benchmarks.gpu.loops import MODELS, measure_loop
from benchmarks.moments import measure as moments
from benchmarks.overhead import measure as overhead
from benchmarks.overhead.rivals import clipping

MODES = ("update", "gradient", "gradient + max_norm")
ROUNDS = 20


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


def moments_of(rivals: tuple[tuple[str, ...], ...], device: str, is_smoke: bool) -> dict:
    """Time and memory of some of the ways to take moments, at every size."""
    sizes = {"8 x 4": ((8, 4), torch.float32)} if is_smoke else moments.sizes(device)
    rounds = 1 if is_smoke else ROUNDS
    found = {
        name: attempt(partial(moments.measure_size, shape, device, dtype, rounds, rivals))
        for name, (shape, dtype) in sizes.items()
    }
    return {"rounds": rounds, "sizes": found}


def operations(device: str, is_smoke: bool) -> dict:
    """The penalty beside clipping, the kernels and the memory, and how it grows."""
    numel, rounds = (30, 2) if is_smoke else (220_000, 25)
    found = overhead.measure_operations(3, 30 if is_smoke else 300, numel, device, rounds, True)
    curves = {} if is_smoke else overhead.curves(10**8)
    found["curves"] = {
        name: [overhead.measure_operations(*at, device, 10, False) for at in points]
        for name, points in curves.items()
    }
    return found


def whole_steps(device: str, is_smoke: bool) -> list[object]:
    """Whole steps beside other ways to balance, of models of 10 M parameters and of 60 M."""
    if is_smoke:
        return [attempt(lambda: overhead.measure_step("MLP", 0, "SGD", device, 2, False))]
    return [attempt(step) for step in overhead.steps(device)]


def parts(device: str, is_smoke: bool) -> dict[str, Callable[[], object]]:
    """What is measured, by name."""
    tensors, groups = (8, 4) if is_smoke else (10_000, 256)
    rounds = 2 if is_smoke else 30
    found: dict[str, Callable[[], object]] = {
        name: partial(measure_loop, name, device, is_smoke) for name in MODELS
    }
    found |= {
        "environment": partial(environment, device),
        "host_synchronisations": partial(of_each_step, synchronisations, device),
        "launches": partial(of_each_step, launches, device),
        "host_time": lambda: {
            "10,000 tensors": attempt(partial(host_times, 2, tensors, device, rounds)),
            "256 groups": attempt(partial(host_times, groups, 2 * groups, device, rounds)),
        },
        "operations": partial(operations, device, is_smoke),
        "steps": lambda: {"steps": whole_steps(device, is_smoke)},
        "fault": os.abort,
    }
    for part, rivals in (
        ("moments", moments.EAGER),
        ("compiled", moments.COMPILED),
        ("triton", moments.FUSED),
    ):
        found[part] = partial(moments_of, rivals, device, is_smoke)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part")
    parser.add_argument("path", type=Path)
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    device = "cpu" if arguments.smoke else "cuda"
    if arguments.smoke:
        torch.set_num_threads(1)
    measured = attempt(parts(device, arguments.smoke)[arguments.part])
    # Whole or not at all, should it be killed.
    written = arguments.path.with_suffix(".part")
    written.write_text(json.dumps(measured, indent=1) + "\n")
    written.replace(arguments.path)
