"""A trial of an optimizer on a twin with toy parameters: how its steps can be scaled, or that they cannot."""

import copy
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradbalance._torch.displacement import Displacement
from gradbalance._torch.learning_rates import LearningRates
from gradbalance._torch.unwrap import parts

# Their step is capped by a schedule of its own, which a trial of a few steps cannot see, or has no rate at all.
WITHOUT_RATE = (torch.optim.Adafactor, torch.optim.Rprop)
STEPS, FACTOR, TOLERANCE = 8, 0.5, 0.02
RATE, SIDE = 1e-2, 8  # of the twin: float32 must resolve its steps
MOST = 4  # parameters of each param_group


def way_to_scale(optimizer: Optimizer) -> LearningRates | Displacement:
    """How the steps of some parameters of the optimizer are scaled while those of the others stay as they are.

    The classes of torch are known. Any other optimizer is tried: on a twin with toy parameters its step is scaled by
    the learning rate, and if the parameters do not move as they should, by their displacement.

    Raises:
        ValueError: If neither works.
    """
    name = type(optimizer).__name__
    has_rate = all(group.get("lr") is not None for group in optimizer.param_groups)
    if is_torch(optimizer) and not isinstance(optimizer, torch.optim.ASGD):
        by_rate = has_rate and not isinstance(optimizer, WITHOUT_RATE)
        return LearningRates(optimizer) if by_rate else Displacement(optimizer)
    inner = parts(optimizer)
    if inner:  # what one of them does to its own parameters is scaled from outside
        for part in inner:
            way_to_scale(part)
        return Displacement(optimizer)
    try:
        plain, copied = _run(optimizer, None)
    except Exception as error:
        if not has_rate:
            raise ValueError(_refusal(name, f"which cannot be tried: {error}")) from error
        return LearningRates(optimizer)  # it may need its real parameters, or a compiler
    if has_rate and _as_expected(plain, optimizer, LearningRates):
        return LearningRates(optimizer)
    if copied:
        raise ValueError(_refusal(name, "whose step does not follow it and which keeps copies of the parameters"))
    if _as_expected(plain, optimizer, Displacement):
        return Displacement(optimizer)
    raise ValueError(_refusal(name, "in which the steps of some parameters change those of others"))


def is_torch(optimizer: Optimizer) -> bool:
    """Whether its class is one of torch's own."""
    return f"{type(optimizer).__module__}.".startswith("torch.optim.")


def _refusal(name: str, why: str) -> str:
    return (
        '`apply_to="update"` must have an optimizer whose step can be scaled for some parameters alone, by the '
        f"learning rate or after the fact. Got {name}, {why}. "
        'Use another optimizer, or `apply_to="gradient"` if its step is not the same for any scale of the gradient.'
    )


def _as_expected(plain: list[Tensor], optimizer: Optimizer, way: type[LearningRates] | type[Displacement]) -> bool:
    """Whether every other parameter moves by FACTOR as far as in a plain run, and the rest as before."""
    try:
        scaled, _ = _run(optimizer, way)
    except Exception:  # not every step takes several param_groups
        return False
    for i, (before, after) in enumerate(zip(plain, scaled, strict=True)):
        expected = before * (FACTOR if i % 2 == 0 else 1.0)
        if not (after - expected).norm() <= TOLERANCE * before.norm():
            return False
    return True


def _run(optimizer: Optimizer, kind: type[LearningRates] | type[Displacement] | None) -> tuple[list[Tensor], bool]:
    """Some steps of a twin with every other parameter scaled: how far each moved, and whether copies are kept."""
    with _undisturbed():
        twin = _twin(optimizer)
        toys = [p for group in twin.param_groups for p in group["params"]]
        start = [p.detach().clone() for p in toys]
        way = None if kind is None else kind(twin)
        for _ in range(STEPS):
            for p in toys:
                p.grad = torch.randn_like(p)
            if way is not None:
                way.divide({id(p): 0 for p in toys[::2]})
                way.begin(torch.full((1,), FACTOR, dtype=torch.float64, device=toys[0].device))
            try:
                twin.step()
            finally:
                if way is not None:
                    way.end()
        copied = any(
            t.shape == p.shape and bool((t - p).abs().max() < 0.25)
            for p in start
            for t in _tensors([*twin.state.values(), *twin.param_groups], skip=toys)
        )
        return [p.detach() - before for p, before in zip(toys, start, strict=True)], copied


def _twin(optimizer: Optimizer) -> Optimizer:
    """The same optimizer with small parameters in place of its own, wherever it keeps them, and no state."""
    twin: Optimizer = object.__new__(type(optimizer))
    memo: dict[int, Any] = {id(optimizer): twin, id(optimizer.state): defaultdict(dict)}
    for group in optimizer.param_groups:
        for p in group["params"]:
            shape = [min(size, SIDE) for size in p.shape]
            # Entries far from 0, with random signs: a copy of them in the state is known again.
            toy = (torch.rand(shape, device=p.device) + 1) * (torch.randint(0, 2, shape, device=p.device) * 2 - 1)
            memo[id(p)] = toy.requires_grad_()
    own = {k: v for k, v in vars(optimizer).items() if k not in ("step", "__reduce_ex__")}
    hooks: dict[str, Any] = {k: OrderedDict() for k, v in own.items() if k.startswith("_optimizer_")}
    vars(twin).update(copy.deepcopy({k: v for k, v in own.items() if k not in hooks}, memo) | hooks)
    for group in twin.param_groups:
        group["params"] = group["params"][:MOST]
        rate = group.get("lr")
        if isinstance(rate, Tensor):
            group["lr"] = torch.full_like(rate, RATE)
        elif rate is not None:
            group["lr"] = RATE
        if group.get("weight_decay"):
            group["weight_decay"] = 0.0
    return twin


def _tensors(values: Any, skip: list[Tensor]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            if all(value is not p for p in skip):
                yield value
        elif isinstance(value, Mapping):
            yield from _tensors(value.values(), skip)
        elif isinstance(value, list | tuple):
            yield from _tensors(value, skip)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """The same random numbers each time, those of the user as they were, and nothing compiled."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if "torch._dynamo" not in sys.modules:
            yield
            return
        with torch.compiler.set_stance("force_eager"):
            yield
