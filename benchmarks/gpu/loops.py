"""Whole training steps by the clock on the wall: what a user of a GPU will notice."""

from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from benchmarks._timing import peak_memory, quartiles
from benchmarks.overhead.measure import balance
from benchmarks.overhead.rivals import MAX_NORM, Branches
from benchmarks.overhead.small import TwoBranches
from gradbalance import Recorder, rules

# The options of the penalty; None without one.
VARIANTS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "clip_grad_norm_": None,
    "default": {},
    "every=4": {"every": 4},
    "gradient": {"apply_to": "gradient"},
    "Watch": {"rule": rules.Watch()},
    "recorded": {},
}
RANK = 8


class LoRA(nn.Module):
    """A frozen layer, and an update of low rank that trains."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Linear(layer.in_features, RANK, bias=False)
        self.up = nn.Linear(RANK, layer.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.up(self.down(x))


def with_lora(model: Branches) -> Branches:
    """The model with LoRA on each layer of its encoders."""
    for encoder in model.encoders.values():
        for block in encoder:
            block[0] = LoRA(block[0])
    return model


def small(is_smoke: bool) -> tuple[nn.Module, dict[str, nn.Module]]:
    model = TwoBranches(16 if is_smoke else 128)
    return model, {"a": model.a, "b": model.b}


def large(is_smoke: bool) -> tuple[nn.Module, dict[str, nn.Module]]:
    model = Branches("MLP", 0 if is_smoke else 100)
    return model, dict(model.encoders.items())


def lora(is_smoke: bool) -> tuple[nn.Module, dict[str, nn.Module]]:
    model = with_lora(Branches("MLP", 0 if is_smoke else 100))
    return model, dict(model.encoders.items())


MODELS: dict[str, Callable[[bool], tuple[nn.Module, dict[str, nn.Module]]]] = {
    "loop small": small,
    "loop 100M": large,
    "loop LoRA": lora,
}


def synchronise(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def seconds_of_a_step(step: Callable[[], object], steps: int, device: str) -> float:
    """The device is idle before and after, so that nothing is left out and nothing waits in between."""
    synchronise(device)
    start = perf_counter()
    for _ in range(steps):
        step()
    synchronise(device)
    return (perf_counter() - start) / steps


def measure_loop(name: str, device: str, is_smoke: bool) -> dict[str, Any]:
    """Time and peak memory of a step of each variant, in turn; all share the model and AdamW's state."""
    torch.manual_seed(0)
    model, groups = MODELS[name](is_smoke)
    model.move(device)
    trained = [p for p in model.parameters() if p.requires_grad]
    first: torch.optim.Optimizer | None = None
    steps: dict[str, Callable[[], object]] = {}
    recorders = []
    for variant, options in VARIANTS.items():
        optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=device != "cpu")
        if first is None:
            first = optimizer
        else:
            optimizer.state = first.state
        if options is not None:
            balance(optimizer, groups, options)
        if variant == "recorded":
            recorders.append(Recorder(optimizer))

        def step(optimizer: torch.optim.Optimizer, clips: bool) -> None:
            optimizer.zero_grad()
            model().backward()
            if clips:
                clip_grad_norm_(trained, MAX_NORM)
            optimizer.step()

        steps[variant] = partial(step, optimizer, variant == "clip_grad_norm_")

    rounds, length = (3, 2) if is_smoke else (15, 20)
    for step_of in steps.values():
        seconds_of_a_step(step_of, length, device)  # to warm up
    times: dict[str, list[float]] = {variant: [] for variant in steps}
    for _ in range(rounds):
        for variant, step_of in steps.items():
            times[variant].append(seconds_of_a_step(step_of, length, device))
    found = {
        variant: torch.tensor(values, dtype=torch.float64) for variant, values in times.items()
    }
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained": sum(p.numel() for p in trained),
        "step_us": {variant: [1e6 * t for t in quartiles(of)] for variant, of in found.items()},
        "ratios": {variant: quartiles(of / found["plain"]) for variant, of in found.items()},
        "peak_bytes": {variant: peak_memory(step_of, device) for variant, step_of in steps.items()},
    }
