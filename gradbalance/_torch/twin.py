"""A twin of an optimizer: the same settings, and a few small parameters in place of its own."""

import copy
import random
import sys
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradbalance._torch.unwrap import parts

SIDE = 8  # of a toy
# Some steps are the rate times the size of the parameter. At a higher one the parameters would change so much that the
# steps do; at a lower one float32 could not tell the steps.
RATE = 2e-3
FAR = 100.0  # steps of a size like the rate: toys are that large, so that they change little in a trial


class Twin:
    """An optimizer that may be stepped for a trial while the true one stays as it is.

    Args:
        optimizer: The true one, whose inner optimizers get twins too.
        stepper: The same, or the one inside it whose steps are to be scaled.
        at_one: Whether the learning rate is that of the true one, 1 at least, instead of a low one.
        with_state: Whether the twin starts with the state of the parameters, which some set up at construction.

    Attributes:
        optimizer: The twin.
        stepper: The twin of the stepper.
        toys: Its parameters: for each kind of settings and each number of axes two, if there are two.
    """

    def __init__(self, optimizer: Optimizer, stepper: Optimizer, at_one: bool, with_state: bool) -> None:
        torch.manual_seed(0)
        random.seed(0)
        self._at_one, self._with_state = at_one, with_state
        self._memo: dict[int, Any] = {}
        chosen = _chosen(optimizer)
        for group in _groups(optimizer):
            for p in group["params"]:
                if id(p) not in self._memo:
                    self._memo[id(p)] = self._toy(p, self._rate(group))
        self.toys: list[Tensor] = [self._memo[key] for key in chosen]
        self._start = self.places()
        self.optimizer = self._copy(optimizer)
        self.stepper: Optimizer = self._memo[id(stepper)]
        self._cut(self.optimizer)
        for each in (self.stepper, self.optimizer):
            train = getattr(each, "train", None)
            if callable(train):  # schedule-free ones step in this mode alone
                train()

    def gradients(self, *, agreeing: bool) -> list[Tensor]:
        """The next gradient of each toy: always the same, or of any direction and size."""
        if agreeing:
            return [p.sign() for p in self._start]
        return [torch.randn_like(p) * 10.0 ** torch.randint(-2, 1, (), device=p.device) for p in self._start]

    def places(self) -> list[Tensor]:
        """A copy of the toys."""
        return [p.detach().clone() for p in self.toys]

    def step(self, gradients: list[Tensor], with_closure: bool) -> None:
        """A step with these gradients."""

        def closure() -> Tensor:
            with torch.enable_grad():
                # Wherever the toys are: a loss of 1, this gradient, and a Hessian of the identity.
                moves = [((p - p.detach()), g) for p, g in zip(self.toys, gradients, strict=True)]
                one = torch.ones((), device=self.toys[0].device)
                loss = sum(((m * g).sum() + 0.5 * m.square().sum() for m, g in moves), one)
                for p in self.toys:
                    p.grad = None
                torch.autograd.backward(loss, create_graph=True)
            return loss

        for p, g in zip(self.toys, gradients, strict=True):
            p.grad = g
        self.optimizer.step(*([closure] if with_closure else []))  # type: ignore[arg-type]

    def around_each_step(self, before: Callable[[], None], after: Callable[[], None]) -> None:
        """From now on: ``before`` when the gradients are there, after the closure, and ``after`` at the end."""
        step = self.stepper.step

        def wrapped(closure: Any = None, *args: Any, **kwargs: Any) -> Any:
            def closure_then_before() -> Any:
                loss = closure()
                before()
                return loss

            try:
                if callable(closure):
                    return step(closure_then_before, *args, **kwargs)
                before()
                return step(*args, **kwargs)
            finally:
                after()

        vars(self.stepper)["step"] = wrapped

    def keeps_copies(self) -> bool:
        """Whether the optimizer holds tensors that lie close to the first or last values of a toy."""
        toys = {p.data_ptr() for p in self.toys}  # and no views of them
        found = (t.detach() for t in _tensors(vars(self.optimizer), set(map(id, self.toys))))
        kept = [t for t in found if t.is_floating_point() and t.data_ptr() not in toys]
        pairs = zip(self.toys, self._start, strict=True)
        return any(_is_close(t, p.detach()) or _is_close(t, start) for p, start in pairs for t in kept)

    def _rate(self, group: Mapping[str, Any]) -> float:
        return max(1.0, float(group.get("lr") or 0.0)) if self._at_one else RATE

    def _toy(self, p: Tensor, rate: float) -> Tensor:
        shape = [min(size, SIDE) for size in p.shape]
        device = torch.device("cpu") if p.device.type == "meta" else p.device
        # Entries far from 0, with random signs: a copy of them in the state is known again.
        toy = (torch.rand(shape, device=device) + 1) * (torch.randint(0, 2, shape, device=device) * 2 - 1)
        toy.mul_(FAR * rate).requires_grad_()
        vars(toy).update(_marks(p))
        return toy

    def _copy(self, optimizer: Optimizer) -> Optimizer:
        twin: Optimizer = object.__new__(type(optimizer))
        own = {k: v for k, v in vars(optimizer).items() if k not in ("step", "__reduce_ex__")}
        hooks: dict[str, Any] = {k: OrderedDict() for k, v in own.items() if k.startswith("_optimizer_")}
        self._memo |= {id(optimizer): twin, id(own.get("state")): self._state(own.get("state", {}))}
        self._memo |= {id(part): self._copy(part) for part in parts(optimizer)}
        for module in own.values():
            if isinstance(module, nn.Module):  # of which a true copy may be large
                for t in chain(module.parameters(), module.buffers()):
                    self._memo.setdefault(id(t), self._toy(t, RATE))
        vars(twin).update({k: self._copied(v) for k, v in own.items() if k not in hooks} | hooks)
        return twin

    def _state(self, state: Mapping[Any, Any]) -> defaultdict[Any, Any]:
        """What is kept for no parameter; for the toys, if asked to, their part of what there is."""
        mine = defaultdict(dict, {k: copy.deepcopy(v) for k, v in state.items() if not isinstance(k, Tensor)})
        if self._with_state:
            for p, kept in state.items():
                toy = self._memo.get(id(p))
                if toy is not None:
                    mine[toy] = {k: self._copied(_part(v, p, toy)) for k, v in kept.items()}
        return mine

    def _copied(self, value: Any) -> Any:
        try:
            return copy.deepcopy(value, self._memo)
        except Exception:  # a process group, say
            return value

    def _cut(self, twin: Optimizer) -> None:
        """Leave the toys alone in it, without weight decay."""
        toys = set(map(id, self.toys))
        for group in twin.param_groups:
            rate = self._rate(group)
            group["params"] = [p for p in group["params"] if id(p) in toys]
            if isinstance(group.get("lr"), Tensor):
                group["lr"] = torch.full_like(group["lr"], rate)
            elif group.get("lr") is not None:
                group["lr"] = rate
            if group.get("weight_decay"):
                group["weight_decay"] = 0.0
        twin.param_groups[:] = [group for group in twin.param_groups if group["params"]]
        for part in parts(twin):
            self._cut(part)


def _groups(optimizer: Optimizer) -> Iterator[dict[str, Any]]:
    """The ``param_groups`` of the optimizer and of those inside it."""
    yield from optimizer.param_groups
    for part in parts(optimizer):
        yield from _groups(part)


def _chosen(optimizer: Optimizer) -> Iterable[int]:
    """By ``id``, two parameters of each kind of settings and each number of axes, one kind after the other."""
    of_kind: dict[Any, list[int]] = defaultdict(list)
    for group in _groups(optimizer):
        settings = repr({k: v for k, v in group.items() if k not in ("params", "lr", "initial_lr", "name")})
        for p in group["params"]:
            found = of_kind[settings, p.dim(), repr(_marks(p))]
            if len(found) < 2:
                found.append(id(p))
    return dict.fromkeys(chain.from_iterable(of_kind.values()))


def _part(value: Any, p: Tensor, toy: Tensor) -> Any:
    """Of a tensor like a parameter what there is for its toy: the toy, if it is a copy of the parameter."""
    if not isinstance(value, Tensor) or value.shape != p.shape:
        return value
    if value.dtype == p.dtype and torch.equal(value, p):
        return toy.detach().clone()
    return value[tuple(map(slice, toy.shape))]


def _marks(p: Tensor) -> dict[str, Any]:
    """What an optimizer or a model has noted on a parameter."""
    return {k: v for k, v in vars(p).items() if isinstance(v, bool | int | float | str | None)}


def _is_close(t: Tensor, p: Tensor) -> bool:
    return t.shape == p.shape and bool((t - p).abs().max() < 0.25 * p.abs().min())


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """The tensors in a value, in what it holds, and so on, those of ``seen`` left out."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | Optimizer):
        for item in (value if isinstance(value, Mapping) else vars(value)).values():
            yield from _tensors(item, seen)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from _tensors(item, seen)


@contextmanager
def undisturbed() -> Iterator[None]:
    """The random numbers of the user stay as they were, nothing is compiled, and no one is warned."""
    state = random.getstate()
    with warnings.catch_warnings(action="ignore"), torch.random.fork_rng():
        try:
            if "torch._dynamo" in sys.modules:
                with torch.compiler.set_stance("force_eager"):
                    yield
            else:
                yield
        finally:
            random.setstate(state)
