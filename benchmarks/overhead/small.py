"""Small models, where a step is short and what the penalty adds is felt: two branches, whole training steps."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks._timing import Call, interleaved, quartiles, ratios
from gradbalance import Recorder, attach

WIDTHS = (32, 128, 512)
STEPS = 10  # between two looks at the clock
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": partial(torch.optim.SGD, lr=1e-4, momentum=0.9),
    "AdamW": partial(torch.optim.AdamW, lr=1e-5),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "every=4": {"every": 4},
    "gradient": {"apply_to": "gradient"},
}


class TwoBranches(nn.Module):
    """Two encoders of two layers, a joint head, and a batch of 64."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inputs, self.target = torch.randn(2, 64, 64), torch.randint(10, (64,))
        layers = [
            nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
            for _ in "ab"
        ]
        self.a, self.b = layers
        self.head = nn.Linear(2 * width, 10)

    def move(self, device: str) -> "TwoBranches":
        self.inputs, self.target = self.inputs.to(device), self.target.to(device)
        return self.to(device)

    def forward(self) -> Tensor:
        return cross_entropy(
            self.head(torch.cat([self.a(self.inputs[0]), self.b(self.inputs[1])], 1)), self.target
        )


class Operators(TorchDispatchMode):
    """Counts what is dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.names.append(str(operator))
        return operator(*args, **(kwargs or {}))


def operators(optimizer: str, width: int = 32, **options: Any) -> list[str]:
    """What one counted step of the penalty dispatches, the optimizer's own step left out."""
    torch.manual_seed(0)
    model = TwoBranches(width)
    plain = OPTIMIZERS[optimizer](model.parameters())
    penalty = attach(plain, {"a": model.a, "b": model.b}, **options)
    for _ in range(3):  # until every mean is known
        model.zero_grad()
        model().backward()
        with Operators() as counted:
            penalty._engine.before_step()
        penalty._engine.after_step()
    return counted.names


def training(
    width: int,
    optimizer: str,
    options: dict[str, Any] | None,
    clip: bool = False,
    records: bool = False,
) -> Call:
    """Some whole training steps of a model of its own."""
    torch.manual_seed(0)
    model = TwoBranches(width)
    plain = OPTIMIZERS[optimizer](model.parameters())
    if options is not None:
        attach(plain, {"a": model.a, "b": model.b}, **options)
    if records:
        Recorder(plain)  # which the penalty keeps

    def steps() -> None:
        for _ in range(STEPS):
            plain.zero_grad()
            model().backward()
            if clip:
                clip_grad_norm_(model.parameters(), 1.0)
            plain.step()

    return steps


def measure_small(rounds: int) -> dict[str, Any]:
    """Ratios to the plain optimizer's step, and the operators of a step of the penalty."""
    rows = []
    for name in OPTIMIZERS:
        variants = {k: v for k, v in VARIANTS.items() if name == "SGD" or k != "gradient"}
        for width in WIDTHS:
            calls = {
                "plain": training(width, name, None),
                "clip_grad_norm_": training(width, name, None, clip=True),
            }
            calls |= {
                variant: training(width, name, options) for variant, options in variants.items()
            }
            calls["recorded"] = training(width, name, {}, records=True)
            times = interleaved(calls, rounds, "cpu")
            us = [1e6 * t / STEPS for t in quartiles(times["plain"])]
            rows.append(
                {
                    "optimizer": name,
                    "width": width,
                    "plain_us": us,
                    "ratios": ratios(times, "plain"),
                    "recorded": ratios(times, "default")["recorded"],
                }
            )
    modes: dict[str, dict[str, Any]] = {
        "update": {"optimizer": "AdamW"},
        "gradient": {"optimizer": "SGD"},
    }
    modes["gradient"]["apply_to"] = "gradient"
    counts = {
        mode: [operators(**of, width=width) for width in (32, 512)] for mode, of in modes.items()
    }
    return {"rows": rows, "operators": counts}
