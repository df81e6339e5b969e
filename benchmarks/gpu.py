"""Everything that needs a GPU, in one command: ``python -m benchmarks.gpu`` writes ``results/gpu.json``.

The moments, the overhead of the penalty, its kernel launches, host time and host synchronisations, and whether a step
in gradient mode runs in a CUDA graph.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import torch

from benchmarks import moments, overhead
from benchmarks._overhead_rivals import Branches, clipping
from benchmarks._timing import Call, environment, interleaved, launches, ratios
from gradbalance import attach

RESULTS = Path(__file__).parent / "results"
MODES = ("update", "gradient", "gradient + max_norm")


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
    optimizer = torch.optim.AdamW([p for group in groups.values() for p in group], lr=lr, capturable=device != "cpu")
    attach(optimizer, groups, **overhead.MODES["update"])
    found["update, AdamW with tensor lr"] = optimizer.step
    renew = overhead.renewal(groups)
    interleaved(found, 1, device, prepare=renew)
    return found, renew


def host_times(n_groups: int, n_tensors: int, device: str, rounds: int = 30) -> dict[str, list[float]]:
    """How long the host takes to launch a step, against clipping, the GPU being idle at the start."""
    groups = overhead.with_gradients(n_groups, n_tensors, 64, device)
    calls = {overhead.CLIP: clipping(groups)[overhead.CLIP]}
    calls |= {name: overhead.penalty(groups, overhead.MODES[name]) for name in (*MODES, "update, defaults")}

    def clock() -> float:
        now = perf_counter()
        if device != "cpu":
            torch.cuda.synchronize()  # after the time is taken, so that every call starts with an empty queue
        return now

    return ratios(interleaved(calls, rounds, "cpu", clock=clock, prepare=overhead.renewal(groups)), overhead.CLIP)


def trained(device: str, run: Callable[[Call], Call], n_steps: int = 4) -> list[torch.Tensor]:
    """The parameters after training in gradient mode, ``run`` making of a step what is called each time."""
    torch.manual_seed(0)
    model = Branches("MLP", 10).move(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, capturable=device != "cpu")
    attach(optimizer, model.groups(), apply_to="gradient", threshold=1.0, max_norm=1.0, agreement=None)

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        model().backward()
        optimizer.step()

    step_again = run(step)
    for _ in range(n_steps):
        step_again()
    return [p.detach() for p in model.parameters()]


def warmed_up(step: Call) -> Call:
    for _ in range(3):
        step()
    return step


def captured(step: Call) -> Call:
    """The replay of the step's CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        warmed_up(step)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def graph_difference(device: str, run: Callable[[Call], Call] = captured) -> float:
    """Largest difference between parameters trained step by step and by replaying one graph."""
    pairs = zip(trained(device, warmed_up), trained(device, run), strict=True)
    return max(float((eager - replayed).abs().max()) for eager, replayed in pairs)


def measure(device: str = "cuda") -> dict:
    """Everything, ready for JSON."""
    calls, renew = steps(device)

    def each(count: Callable[[Call], int]) -> dict[str, int]:
        found = {}
        for name, call in calls.items():
            renew()
            found[name] = count(call)
        return found

    return {
        "environment": environment(device),
        "host_synchronisations": each(synchronisations),
        "launches": each(launches),
        "host_time": {"10,000 tensors": host_times(2, 10_000, device), "256 groups": host_times(256, 512, device)},
        "graph_difference": graph_difference(device),
        "moments": moments.measure(device),
        "overhead": overhead.measure(device, overhead.PARTS[:-1]),
    }


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu must run where torch sees a CUDA device. Got none. Run it on a machine with a GPU.")
    found = json.dumps(measure(), indent=1)
    (RESULTS / "gpu.json").write_text(found + "\n")
    print(found)
