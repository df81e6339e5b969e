"""Every optimizer of torch that the contract is checked on: all classes of torch.optim in their variants."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch

from tests.old_torch import has_torch

MODES = ("update", "gradient")
# On the gradients of Adam and most others a constant factor cancels: the penalty warns of it, these tests know it.
cancels = pytest.mark.filterwarnings(
    "ignore:.apply_to=.gradient.. does nothing lasting:UserWarning"
)
# Neither follows a learning rate: the finished update is rescaled instead.
BY_DISPLACEMENT = (torch.optim.Adafactor, torch.optim.Rprop)
# By nature refused in update mode: what a step does to some parameters depends on how far others went.
GRADIENT_ONLY = (torch.optim.ASGD,)
# One at a time, on top of the defaults, wherever the class has such an argument.
VARIANTS = {
    "foreach": True,
    "fused": True,
    "amsgrad": True,
    "maximize": True,
    "centered": True,
    "decoupled_weight_decay": True,
    "weight_decay": 0.1,
    "momentum": 0.9,
}


@dataclass(frozen=True)
class Case:
    """An optimizer: how to make it, and what its own nature asks of the loop around it."""

    name: str
    make: Callable
    variant: bool = False  # of another case, from which most promises could not tell it
    modes: tuple[str, ...] = MODES
    by_rate: bool = True  # else by displacement
    bias: bool = True  # Muon takes matrices alone
    # Its step keeps averages weighted by the learning rate, so that only a constant coefficient has a plain twin.
    averages: bool = False
    closure_alone: bool = False  # SAM evaluates a closure at every step
    copies: bool = True  # whether a copy of the plain optimizer can step
    grows: bool = True  # whether the plain optimizer can step after add_param_group

    def __str__(self) -> str:
        return self.name


def _torch_cases():
    for name in torch.optim.__all__:
        cls = getattr(torch.optim, name)
        if not (inspect.isclass(cls) and issubclass(cls, torch.optim.Optimizer)):
            continue
        if cls in (torch.optim.Optimizer, torch.optim.LBFGS, torch.optim.SparseAdam):
            continue  # abstract; refused; for sparse gradients alone: each has tests of its own
        nature = {
            "modes": ("gradient",) if cls in GRADIENT_ONLY else MODES,
            "by_rate": cls not in BY_DISPLACEMENT,
            "bias": name != "Muon",
            "grows": name != "Adagrad" or has_torch("Adagrad after add_param_group"),
        }
        yield Case(name, partial(cls, lr=0.02), **nature)
        parameters = inspect.signature(cls.__init__).parameters
        for option, value in VARIANTS.items():
            if option in parameters:
                yield Case(
                    f"{name}-{option}",
                    partial(cls, lr=0.02, **{option: value}),
                    variant=True,
                    **nature,
                )


TORCH = list(_torch_cases())
# One of each kind: scaled by the learning rate, by rescaling the finished update, and in the gradient alone.
REPRESENTATIVES = [("AdamW", "update"), ("Rprop", "update"), ("ASGD", "gradient")]
