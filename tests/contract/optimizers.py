"""Every optimizer that the contract is checked on: all classes of torch.optim in their variants, and third parties."""

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch

with warnings.catch_warnings():
    # bitsandbytes registers its kernels with a deprecated call when it is first imported.
    warnings.simplefilter("ignore")
    import bitsandbytes
import pytorch_optimizer
import schedulefree

MODES = ("update", "gradient")
# By nature refused in update mode: the step is not proportional to the learning rate.
GRADIENT_ONLY = (torch.optim.Rprop, torch.optim.ASGD)
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
    modes: tuple[str, ...] = MODES
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
        modes = ("gradient",) if cls in GRADIENT_ONLY else MODES
        bias = cls is not torch.optim.Muon
        yield Case(name, partial(cls, lr=0.02), modes, bias)
        parameters = inspect.signature(cls.__init__).parameters
        for option, value in VARIANTS.items():
            if option in parameters:
                yield Case(f"{name}-{option}", partial(cls, lr=0.02, **{option: value}), modes, bias)


def _in_train_mode(cls, params, **options):
    optimizer = cls(params, **options)
    optimizer.train()
    return optimizer


def _lookahead(params, **options):
    return pytorch_optimizer.Lookahead(torch.optim.AdamW(params, lr=0.02), k=2, **options)


TORCH = list(_torch_cases())
THIRD_PARTY = [
    *(
        Case(f"schedulefree-{cls.__name__}", partial(_in_train_mode, cls, lr=0.02), averages=True)
        for cls in (schedulefree.SGDScheduleFree, schedulefree.AdamWScheduleFree, schedulefree.RAdamScheduleFree)
    ),
    *(
        Case(f"bitsandbytes-{cls.__name__}", partial(cls, lr=0.02), copies=False)
        for cls in (bitsandbytes.optim.AdamW, bitsandbytes.optim.Lion)
    ),
    Case("bitsandbytes-AdamW8bit", partial(bitsandbytes.optim.AdamW8bit, lr=0.02, min_8bit_size=0), copies=False),
    Case("pytorch_optimizer-Lookahead", _lookahead, copies=False),
    Case(
        "pytorch_optimizer-SAM",
        lambda params: pytorch_optimizer.SAM(params, torch.optim.AdamW, lr=0.02),
        closure_alone=True,
        copies=False,
        grows=False,
    ),
]
EVERY = [*TORCH, *THIRD_PARTY]
# One per class, where the variants of a class could not differ.
CLASSES = [case for case in TORCH if "-" not in case.name] + THIRD_PARTY


def each(cases, modes=MODES):
    """Parametrize a test over the cases and the modes that each takes."""
    return pytest.mark.parametrize(
        ("case", "mode"),
        [pytest.param(c, m, id=f"{c}-{m}") for c in cases for m in c.modes if m in modes],
    )
