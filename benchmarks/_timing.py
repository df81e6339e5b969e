"""Seconds, bytes and launches: every call is timed in turn with its rivals, so that a ratio compares neighbours."""

import os
import platform
from collections.abc import Callable
from datetime import date
from time import process_time

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

Call = Callable[[], object]


def environment(device: str) -> dict:
    """What the figures depend on; the load is that of the machine before the run, 1 for one busy core."""
    cpu = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s)"
    return {
        "hardware": cpu if device == "cpu" else torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": date.today().isoformat(),
        "load": round(os.getloadavg()[0], 1),
    }


def seconds(call: Call, device: str, clock: Callable[[], float] = process_time) -> float:
    """On the CPU the time that this process computed, whatever else the machine had to do; on a GPU its own time.

    That is the time from its first operation to the end of its last one, with what it waited for the host in between.
    """
    if device == "cpu":
        start = clock()
        call()
        return clock() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def interleaved(
    calls: dict[str, Call],
    rounds: int,
    device: str,
    *,
    warm_up: int = 3,
    clock: Callable[[], float] = process_time,
    prepare: Call = lambda: None,
) -> dict[str, Tensor]:
    """Seconds of every round of every call, one after the other in each round; ``prepare`` comes before each."""

    def timed(call: Call) -> float:
        prepare()
        return seconds(call, device, clock)

    times = [[timed(call) for call in calls.values()] for _ in range(warm_up + rounds)][warm_up:]
    return dict(zip(calls, torch.tensor(times, dtype=torch.float64).T, strict=True))


def ratios(times: dict[str, Tensor], unit: str) -> dict[str, list[float]]:
    """Quartiles of the rounds' ratios to the call named ``unit``."""
    return {name: quartiles(t / times[unit]) for name, t in times.items()}


def quartiles(values: Tensor) -> list[float]:
    return torch.quantile(
        values.double(), torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    ).tolist()


def peak_memory(call: Call, device: str) -> int:
    """Most bytes allocated at once during the call, beyond those held before it."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        call()
    held = peak = 0
    events = (
        event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"
    )
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def launches(call: Call) -> int:
    """Kernels, copies and fills on the GPU."""
    torch.cuda.synchronize()  # or what was launched before would count
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        call()
        torch.cuda.synchronize()
    on_gpu = [
        event for event in trace.events() if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    return sum(not event.is_user_annotation for event in on_gpu)
