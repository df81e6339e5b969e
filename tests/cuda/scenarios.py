"""Steps on simulated devices: ``python -m tests.cuda.scenarios`` prints in JSON what they show.

In a process of its own, see :mod:`tests.cuda.simulated`.
"""

import json
import sys
from collections.abc import Callable, Mapping
from functools import cache
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch.optim import SGD, AdamW

from benchmarks.overhead.measure import Busy
from gradbalance import Recorder, attach, rules
from tests.cuda.simulated import CPU, Devices, put

NAMES = ("text", "audio", "visual")
STEPS = 8
SMALL = ((16, 16), (16,))
LARGE = ((256, 256), (256,))
MILLION = ((1000, 1000), (1000,))
LR = 0.01
GPU = torch.device("cuda", 0)
GPUS = (GPU, torch.device("cuda", 1))

# How much of a gradient is new at each step, and how long it is.
NEW = {"text": 0.3, "audio": 3.0, "visual": 1.0}
LENGTH = {"text": 4.0, "audio": 1.0, "visual": 0.2}


def adamw(parameters, device, **options):
    return AdamW(parameters, **{"lr": LR, **options})


def sgd(parameters, device, **options):
    return SGD(parameters, **{"lr": LR, **options})


def with_rate_on_the_host(parameters, device):
    return AdamW(parameters, lr=torch.tensor(LR), fused=True)


def tensor_by_tensor_with_rate_on_the_host(parameters, device):
    return AdamW(parameters, lr=torch.tensor(LR), foreach=False)


def sgd_with_rate_on_the_host(parameters, device):
    return SGD(parameters, lr=torch.tensor(LR))


def sgd_with_rate_on_the_device(parameters, device):
    return SGD(parameters, lr=put(torch.tensor(LR), device), momentum=0.9, foreach=True)


def with_rate_on_the_device(parameters, device):
    return AdamW(parameters, lr=put(torch.tensor(LR), device), capturable=device != CPU)


def fused(parameters, device):
    return AdamW(parameters, lr=LR, fused=True)


def tensor_by_tensor(parameters, device):
    return AdamW(parameters, lr=LR, foreach=False)


def capturable(parameters, device):
    return AdamW(parameters, lr=LR, capturable=device != CPU)


def floats(device):
    return {"text": 0.2, "audio": 0.9, "visual": 0.5}


def on_the_device(device):
    return {name: put(torch.tensor(error), device) for name, error in floats(device).items()}


def on_either(device):
    return {**floats(device), "audio": put(torch.tensor(0.9), device)}


def on_each_device(device):
    """Each where its branch is, as a head leaves it there, in half precision."""
    found = {}
    for m, (name, error) in enumerate(floats(device).items()):
        home = CPU if device == CPU else GPUS[m % len(GPUS)]
        found[name] = put(torch.tensor(error, dtype=torch.bfloat16), home)
    return found


class Scenario(NamedTuple):
    """What is trained, and how.

    Attributes:
        optimizer: Makes it from param_groups and the first device.
        options: Of the penalty.
        shapes: Of the parameters of each branch.
        devices: The branches are on them in turn.
        observed: Makes the errors that are observed before each step.
        is_absent: Whether the last branch has no gradient at one of two steps.
        dtype: Of the parameters.
        scales: Whether a GradScaler steps.
        records: Whether a Recorder listens.
        names: Of the branches that are groups.
    """

    optimizer: Callable[..., Any] = adamw
    options: Mapping[str, Any] = MappingProxyType({})
    shapes: Any = LARGE
    devices: Any = (GPU,)
    observed: Any = None
    is_absent: bool = False
    dtype: torch.dtype = torch.float32
    scales: bool = False
    records: bool = False
    names: tuple[str, ...] = NAMES


CONFLICTS = {"rule": rules.ConflictAware(threshold=1.2)}
IN_GRADIENT = {"apply_to": "gradient"}

# The default rule and options.
DEFAULT = {
    "AdamW": Scenario(),
    "AdamW, small tensors": Scenario(shapes=SMALL),
    "AdamW, fused": Scenario(fused),
    "AdamW, capturable": Scenario(capturable),
    "AdamW, tensor by tensor": Scenario(tensor_by_tensor),
    "AdamW, learning rate on the host": Scenario(with_rate_on_the_host),
    "AdamW, learning rate on the device": Scenario(with_rate_on_the_device),
    "AdamW, a million entries": Scenario(shapes=MILLION),
    "AdamW, tensor by tensor, learning rate on the host": Scenario(
        tensor_by_tensor_with_rate_on_the_host
    ),
    "SGD": Scenario(sgd),
    "SGD, learning rate on the host": Scenario(sgd_with_rate_on_the_host),
    "SGD, small tensors": Scenario(sgd, shapes=SMALL),
}
SCENARIOS = {
    **DEFAULT,
    "gradients scaled": Scenario(sgd, IN_GRADIENT),
    # torch reads such a rate itself, once for each param_group.
    "SGD, learning rate on the device": Scenario(sgd_with_rate_on_the_device),
    "updates rescaled": Scenario(adamw, {"apply_to": "displacement"}),
    "clipped": Scenario(adamw, {"max_norm": 1.0}),
    "scaled and clipped": Scenario(sgd, {**IN_GRADIENT, "max_norm": 1.0}),
    "noisy": Scenario(adamw, {"noise": 0.5}),
    "noisy and clipped": Scenario(adamw, {"noise": 0.5, "max_norm": 1.0}),
    "measured at every second step": Scenario(adamw, {"every": 2}),
    "GradScaler, fused, measured at every second step": Scenario(fused, {"every": 2}, scales=True),
    "clipped, measured at every second step": Scenario(adamw, {"every": 2, "max_norm": 1.0}),
    "inside a window": Scenario(adamw, {"window": (2, 6)}),
    "errors in floats": Scenario(adamw, CONFLICTS, observed=floats),
    "errors on the device": Scenario(adamw, CONFLICTS, observed=on_the_device),
    "errors on either": Scenario(adamw, CONFLICTS, observed=on_either),
    "conflicts without errors": Scenario(adamw, CONFLICTS),
    "watched": Scenario(adamw, {"rule": rules.Watch(rules.Useful())}),
    "one group, watched and recorded": Scenario(
        adamw, {"rule": rules.Watch()}, records=True, names=NAMES[:1]
    ),
    "by hand": Scenario(adamw, {"rule": rules.ByHand(text=0.5)}),
    "the rule of the benchmarks": Scenario(adamw, {"rule": Busy()}),
    "a function for a rule": Scenario(adamw, {"rule": lambda m: m.shares.min() / m.shares}),
    "recorded": Scenario(records=True),
    "a branch absent at times": Scenario(is_absent=True),
    "not the current device": Scenario(devices=GPUS[1:]),
    "two devices": Scenario(devices=GPUS),
    "two devices, clipped": Scenario(sgd, {**IN_GRADIENT, "max_norm": 1.0}, devices=GPUS),
    "two devices, errors in floats": Scenario(adamw, CONFLICTS, observed=floats, devices=GPUS),
    "two devices, errors on each": Scenario(
        adamw, CONFLICTS, observed=on_each_device, devices=GPUS
    ),
    "two devices, learning rate on the host": Scenario(with_rate_on_the_host, devices=GPUS),
    "two devices, gradients scaled": Scenario(sgd, IN_GRADIENT, devices=GPUS),
    "two devices, updates rescaled": Scenario(adamw, {"apply_to": "displacement"}, devices=GPUS),
    "two devices, one absent at times": Scenario(
        is_absent=True, devices=(GPUS[0], GPUS[0], GPUS[1])
    ),
    "two devices, watched and recorded": Scenario(
        adamw, {"rule": rules.Watch(rules.Useful())}, devices=GPUS, records=True
    ),
    "bfloat16": Scenario(dtype=torch.bfloat16),
    "bfloat16, gradients scaled": Scenario(sgd, IN_GRADIENT, dtype=torch.bfloat16),
    "bfloat16, scaled and clipped": Scenario(
        sgd, {**IN_GRADIENT, "max_norm": 1.0}, dtype=torch.bfloat16
    ),
    "float16, scaled and clipped": Scenario(
        sgd, {**IN_GRADIENT, "max_norm": 1.0}, dtype=torch.float16
    ),
    "GradScaler": Scenario(scales=True),
    "GradScaler, fused and clipped": Scenario(fused, {"max_norm": 1.0}, scales=True),
}


AT_ONCE = [*DEFAULT, *(name for name in SCENARIOS if "measured at" in name)]


@cache
def gradient(name, i, shape, step):
    """Of the i-th parameter of a branch, on the host: in part the same at each step."""
    seed = 10 * NAMES.index(name) + i
    generator = torch.Generator().manual_seed(seed)
    same = torch.randn(shape, generator=generator)
    generator.manual_seed(seed + 1000 * (step + 1))
    new = torch.randn(shape, generator=generator)
    return LENGTH[name] * (same + NEW[name] * new)


def train(scenario, options, devices, simulation=None):
    """What the steps show: waits, operators, and coefficients where there is a penalty.

    Args:
        scenario: What is trained.
        options: Of the penalty; None without one.
        devices: The branches are on them in turn.
        simulation: Of the devices, if any.
    """
    branches = {}
    for m, name in enumerate(NAMES):
        device = devices[m % len(devices)]
        starts = [torch.full(shape, 0.1, dtype=scenario.dtype) for shape in scenario.shapes]
        branches[name] = [torch.nn.Parameter(put(start, device)) for start in starts]
    # A param_group for each branch, as the penalty would split a common one.
    param_groups = [{"params": members} for members in branches.values()]
    optimizer = scenario.optimizer(param_groups, devices[0])
    groups = {name: branches[name] for name in scenario.names}
    penalty = None if options is None else attach(optimizer, groups, **options)
    recorder = Recorder(penalty) if penalty and scenario.records else None
    scaler = None
    scale = 1.0
    if scenario.scales:
        scaler = torch.amp.GradScaler(devices[0].type, init_scale=8.0)
        scaler.scale(put(torch.ones(()), devices[0]))
        scale = 8.0

    shown = []
    for step in range(STEPS):
        for name, members in branches.items():
            for i, p in enumerate(members):
                new = (scale * gradient(name, i, p.shape, step)).to(scenario.dtype)
                p.grad = put(new, p.device)
        if scenario.is_absent and step % 2:
            for p in branches[NAMES[-1]]:
                p.grad = None
        if simulation is not None:
            simulation.next_step()
        if penalty and scenario.observed:
            penalty.observe(**scenario.observed(devices[0]))
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        seen = {"coefficients": None}
        if penalty is not None:
            seen["coefficients"] = penalty.balance.coefficients.tolist()
        if simulation is not None:
            seen["waits"] = list(simulation.waits)
            seen["operators"] = list(simulation.operators)
        shown.append(seen)
    if recorder is not None:
        recorder.close()
    return shown


def transfer(simulation, is_late):
    """A copy to pinned memory; the host waits for its event in the same step or in the next."""
    pinned = torch.empty(2, pin_memory=True)
    pinned.copy_(torch.ones(2, device="cuda"), non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(GPU))
    if is_late:
        simulation.next_step()
    early = pinned.tolist()
    event.synchronize()
    return {"early": repr(early), "waited": pinned.tolist()}


def ones(*shape):
    return torch.ones(shape, device="cuda")


WAITING = {
    "item": lambda s: ones().item(),
    "bool": lambda s: bool(ones()),
    "float": lambda s: float(ones()),
    "tolist": lambda s: ones(2).tolist(),
    "cpu": lambda s: ones(2).cpu(),
    "copy_ to pageable memory": lambda s: torch.empty(2).copy_(ones(2), non_blocking=True),
    "a tensor from a number": lambda s: torch.tensor(1.0, device="cuda"),
    "to a device": lambda s: torch.ones(2).to("cuda"),
    "a mask": lambda s: ones(2)[ones(2) > 0],
    "nonzero": lambda s: ones(2).nonzero(),
    "equal": lambda s: torch.equal(ones(2), ones(2)),
    "synchronize": lambda s: torch.cuda.synchronize(),
    "a stream": lambda s: torch.cuda.current_stream().synchronize(),
    "an event of this step": lambda s: transfer(s, is_late=False),
}
FREE = {
    "full": lambda s: torch.full((), 1.0, device="cuda"),
    "arithmetic": lambda s: (ones(2) + 1).sum(),
    "a scalar of the host": lambda s: ones(2) * torch.tensor(2.0),
    "to the host": lambda s: ones(2).to("cpu", non_blocking=True),
    "to another device": lambda s: ones(2).to("cuda:1"),
    "from pinned memory": lambda s: torch.ones(2).pin_memory().to("cuda", non_blocking=True),
    "an event of the step before": lambda s: transfer(s, is_late=True),
}


def main():
    shown: dict[str, Any] = {"waits": {}, "transfer": {}, "trained": {}}
    with Devices() as simulation:
        for name, call in {**WAITING, **FREE}.items():
            simulation.next_step()
            call(simulation)
            shown["waits"][name] = list(simulation.waits)
        shown["transfer"] = transfer(simulation, is_late=True)
        for name, scenario in SCENARIOS.items():
            runs = {"plain": None, "late": scenario.options}
            if name in AT_ONCE:
                runs["at once"] = {**scenario.options, "late": False}
            shown["trained"][name] = {
                run: train(scenario, options, scenario.devices, simulation)
                for run, options in runs.items()
            }
    for name, scenario in SCENARIOS.items():
        late = {**scenario.options, "late": True}
        shown["trained"][name]["on the CPU"] = train(scenario, late, [CPU])
    json.dump(shown, sys.stdout)


if __name__ == "__main__":
    main()
