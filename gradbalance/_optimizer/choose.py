"""How the steps of some parameters of an optimizer are scaled: by a table, by a trial, or a refusal."""

import copy
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from gradbalance._optimizer.scaling import Displacement, LearningRates, ParamGroup
from gradbalance._optimizer.unwrap import WRAPPED_AS, layers, unwrap

Scaling = LearningRates | Displacement

# Their step is capped, or decays by a schedule in which the learning rate stands.
NOT_BY_RATE = (torch.optim.Adafactor, torch.optim.Rprop)
# Their optimizers hand the step on as it is, and need more than parameters.
FRAMEWORKS = (
    "accelerate",
    "deepspeed",
    "gradbalance",
    "lightning",
    "lightning_fabric",
    "opacus",
    "pytorch_lightning",
    "torch",
)
STEPS = 24  # more than slow weights wait
FACTOR = 0.5
TOLERANCE = 0.02
AT_ONCE = 0.1  # the tolerance where the factor sets in later: averages follow slowly
RESOLVED = 1e-6  # of a parameter: the smallest displacement that float32 can tell
SIDE = 8  # of a trial parameter
# Some steps are the rate times the size of the parameter. At a higher rate the parameters would
# change so much that the steps do; at a lower one float32 could not tell the steps.
RATE = 2e-3
FAR = 100.0  # trial parameters are as large as that many steps, so that they change little
RANDOM = (
    *("bernoulli", "bernoulli_", "exponential_", "multinomial", "normal", "normal_", "rand"),
    *("rand_like", "randint", "randint_like", "randn", "randn_like", "random_", "randperm", "uniform_"),
)
# Keys of a param_group that are no settings of it, or not ones that a trial needs.
NO_SETTINGS = ("params", "param_names", "initial_lr", "name", "gradbalance")


def scaling_for(optimizer: object, apply_to: str) -> Scaling:
    """How the steps of some parameters are scaled while those of the others stay as they are.

    Args:
        optimizer: The optimizer, however wrapped.
        apply_to: ``"learning_rate"`` or ``"displacement"``, taken as it is; or ``"update"``: one of
            the two by a table for the classes of ``torch.optim``, and by a trial for any other:
            built anew on a few small parameters, its step is scaled in either way, and the
            parameters have to move as far as they should. Wrappers that are not a framework's
            are tried too.

    Raises:
        ValueError: If neither works, or if the trial fails.
    """
    _, stepper = unwrap(optimizer)
    if apply_to == "displacement":
        return Displacement(stepper)
    if apply_to == "learning_rate":
        if not _has_rate(stepper):
            raise ValueError(
                '`apply_to="learning_rate"` must have an optimizer with `lr` in its param_groups. '
                f'Got {type(stepper).__name__} without. Use `apply_to="displacement"`.'
            )
        return LearningRates(stepper)
    kind = _kind_for(stepper)
    wrappers = [layer for layer in layers(optimizer) if layer is not stepper and not _is_known(layer)]
    if wrappers:
        trial = _tried([*wrappers, stepper])
        if not (trial.moves and trial.follows(kind)):
            inner = type(stepper).__name__
            raise _refusal(wrappers[0], f"which changes what the steps of {inner} do")
    return kind(stepper)


def _kind_for(optimizer: Optimizer) -> type[Scaling]:
    """The scaling for an optimizer around which there is no other."""
    if isinstance(optimizer, torch.optim.ASGD):
        why = "which follows its learning rate a step late and keeps averages of the parameters"
        raise _refusal(optimizer, why, GRADIENT)
    if f"{type(optimizer).__module__}.".startswith("torch.optim."):
        by_rate = _has_rate(optimizer) and not isinstance(optimizer, NOT_BY_RATE)
        return LearningRates if by_rate else Displacement
    trial = _tried([optimizer])
    if not trial.moves:
        raise _refusal(optimizer, "whose `step()` hardly moves parameters")
    if _has_rate(optimizer) and trial.follows(LearningRates):
        return Displacement if _is_capped(optimizer, trial) else LearningRates
    if not trial.keeps_copies and trial.follows(Displacement):
        return Displacement
    why = "which does not follow it and keeps copies of the parameters"
    if not trial.keeps_copies:
        why = "in which the steps of some parameters change those of others"
    raise _refusal(optimizer, why, GRADIENT if trial.follows(None) else OTHER)


def _is_capped(optimizer: Optimizer, trial: "_Trial") -> bool:
    """Whether at a learning rate of 1 only the finished update can be scaled.

    Then the step has a cap or a rate of its own, which a few steps at a low rate do not show.
    """
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    high = _tried([optimizer], rate=max(1.0, *rates), agreeing=True)
    if trial.keeps_copies or high.keeps_copies or high.follows(LearningRates):
        return False
    return trial.follows(Displacement) and high.follows(Displacement)


OTHER = "Use another optimizer."
GRADIENT = 'Use `apply_to="gradient"`, or another optimizer.'
BY_CHOICE = (
    'Use `apply_to="learning_rate"` if its steps are proportional to the learning rate, '
    'else `apply_to="displacement"`.'
)


def _refusal(optimizer: object, why: str, advice: str = OTHER) -> ValueError:
    return ValueError(
        '`apply_to="update"` must have an optimizer whose step can be scaled for some parameters '
        "alone, by the learning rate or by rescaling the finished update. "
        f"Got {type(optimizer).__name__}, {why}. {advice}"
    )


def _has_rate(optimizer: Optimizer) -> bool:
    return all(group.get("lr") is not None for group in optimizer.param_groups)


def _is_known(layer: object) -> bool:
    return type(layer).__module__.split(".")[0] in FRAMEWORKS


def _tried(chain: list[Any], rate: float = RATE, agreeing: bool = False) -> "_Trial":
    try:
        return _Trial(chain, rate, agreeing)
    except Exception as error:
        why = f"of which a trial on small parameters fails: {error!r}"
        raise _refusal(chain[0], why, BY_CHOICE) from error


class _Trial:
    """Runs of an optimizer built anew on small parameters, plain and with every other one scaled.

    Args:
        chain: The optimizer that steps, last, and what is wrapped around it.
        rate: The learning rate, for all ``param_groups``.
        agreeing: Whether all gradients of a parameter agree, instead of any gradients.

    Attributes:
        moves: Whether each trial parameter moves by as much as float32 can tell.
        keeps_copies: Whether the optimizer holds tensors close to a trial parameter.
    """

    def __init__(self, chain: list[Any], rate: float, agreeing: bool) -> None:
        self._chain, self._rate, self._agreeing = chain, rate, agreeing
        try:
            self._with_closure = False
            self._plain, optimizer = self._run(None, STEPS)
        except Exception:  # some steps need a closure
            self._with_closure = True
            self._plain, optimizer = self._run(None, STEPS)
        start, *_, end = self._plain
        self.moves = all(
            bool((q - p).norm() > RESOLVED * p.norm()) for p, q in zip(start, end, strict=True)
        )
        self.keeps_copies = _keeps_copies(optimizer, [*start, *end])

    def follows(self, kind: type[Scaling] | None) -> bool:
        """Whether scaled parameters move FACTOR as far as in the plain run, and others as before.

        Args:
            kind: How they are scaled; None for their gradients.
        """
        late = self.keeps_copies or self._follows_from(STEPS // 2, kind, AT_ONCE)
        return late and self._follows_from(0, kind, TOLERANCE)

    def _follows_from(self, first: int, kind: type[Scaling] | None, tolerance: float) -> bool:
        try:
            scaled, _ = self._run(kind, first)
        except Exception:  # not every step takes several param_groups
            return False
        places = zip(self._plain[first], self._plain[-1], scaled[-1], strict=True)
        for i, (start, plain, end) in enumerate(places):
            moved = plain - start
            expected = moved * (FACTOR if i % 2 == 0 else 1.0)
            if not (end - start - expected).norm() <= tolerance * moved.norm():
                return False
        return True

    def _run(
        self, kind: type[Scaling] | None, first: int
    ) -> tuple[list[list[Tensor]], Optimizer]:
        """Where the parameters are before each step and at the end; scaled from ``first`` on."""
        generator = torch.Generator().manual_seed(0)
        with _OwnRandomNumbers(), torch.enable_grad():
            optimizer, stepper, parameters = self._built(generator)
            places = [_copies(parameters)]
            for step in range(STEPS):
                gradients = [self._gradient(p, generator) for p in places[0]]
                if step >= first and kind is None:
                    gradients[::2] = [g * FACTOR for g in gradients[::2]]
                if step == first and kind is not None:
                    scaling = kind(stepper)
                    scaling.divide({id(p): i % 2 for i, p in enumerate(parameters)})
                    _scale_each_step(stepper, scaling)
                self._step(optimizer, parameters, gradients)
                places.append(_copies(parameters))
        return places, optimizer

    def _built(self, generator: torch.Generator) -> tuple[Any, Optimizer, list[Tensor]]:
        """The optimizer, the one inside it that steps, and their parameters."""
        *wrappers, stepper = self._chain
        param_groups = _trial_groups(stepper.param_groups, self._rate, generator)
        optimizer = type(stepper)(param_groups, **_options(stepper, self._rate))
        for wrapper in reversed(wrappers):
            optimizer = _around(wrapper, optimizer, param_groups, self._rate)
        inner = unwrap(optimizer)[1]
        for each in (inner, optimizer):
            train = getattr(each, "train", None)
            if callable(train):  # schedule-free ones step in this mode alone
                train()
        return optimizer, inner, [p for group in param_groups for p in group["params"]]

    def _gradient(self, start: Tensor, generator: torch.Generator) -> Tensor:
        """The next gradient of a parameter: always the same, or of any direction and size."""
        if self._agreeing:
            return start.sign()
        size = 10.0 ** torch.randint(-2, 1, (), generator=generator, device="cpu")
        draw = torch.randn(start.shape, generator=generator, device="cpu", dtype=start.dtype)
        return (size * draw).to(start.device)

    def _step(self, optimizer: Any, parameters: list[Tensor], gradients: list[Tensor]) -> None:
        def closure() -> Tensor:
            # Wherever the parameters are: a loss of 1, this gradient, the identity as Hessian.
            loss = torch.ones((), device=parameters[0].device)
            for p, g in zip(parameters, gradients, strict=True):
                move = p - p.detach()
                loss = loss + (move * g).sum() + 0.5 * move.square().sum()
            grads = torch.autograd.grad(loss, parameters, create_graph=True)
            for p, g in zip(parameters, grads, strict=True):
                p.grad = g
            return loss

        for p, g in zip(parameters, gradients, strict=True):
            p.grad = g
        if self._with_closure:
            optimizer.step(torch.enable_grad()(closure))
        else:
            optimizer.step()


class _OwnRandomNumbers(TorchFunctionMode):
    """Random numbers of this thread come from generators of the trial: each run draws the same."""

    def __init__(self) -> None:
        super().__init__()
        self._generators: dict[torch.device, torch.Generator] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(func, "__name__", "") in RANDOM and kwargs.get("generator") is None:
            of_tensor = args[0].device if isinstance(args[0], Tensor) else torch.get_default_device()
            device = torch.device(kwargs.get("device") or of_tensor)
            if device not in self._generators:
                self._generators[device] = torch.Generator(device).manual_seed(0)
            kwargs["generator"] = self._generators[device]
        return func(*args, **kwargs)


def _trial_groups(
    param_groups: list[ParamGroup], rate: float, generator: torch.Generator
) -> list[ParamGroup]:
    """For each kind of settings a param_group, with two parameters of each kind of parameter."""
    trial_groups: dict[str, ParamGroup] = {}
    kinds = set()
    for param_group in param_groups:
        settings = _for_trial({k: v for k, v in param_group.items() if k not in NO_SETTINGS}, rate)
        key = repr(settings)
        trial_group = trial_groups.setdefault(key, {**settings, "params": []})
        for p in param_group["params"]:
            marks = {k: v for k, v in vars(p).items() if isinstance(v, PLAIN)}
            kind = (key, p.dim(), repr(marks))
            if p.numel() > 0 and kind not in kinds:
                kinds.add(kind)
                for _ in range(2):
                    trial_group["params"].append(_trial_parameter(p, marks, rate, generator))
    return [group for group in trial_groups.values() if group["params"]]


def _trial_parameter(
    p: Tensor, marks: dict[str, Any], rate: float, generator: torch.Generator
) -> Tensor:
    """Entries far from 0 and of any sign, so that a copy of them is known again."""
    shape = [min(size, SIDE) for size in p.shape]
    signs = torch.randint(0, 2, shape, generator=generator, device="cpu") * 2.0 - 1.0
    sizes = torch.rand(shape, generator=generator, device="cpu", dtype=torch.float32) + 1.0
    device = "cpu" if p.device.type == "meta" else p.device
    trial = nn.Parameter((FAR * rate * sizes * signs.float()).to(device))
    vars(trial).update(marks)
    return trial


PLAIN = bool | int | float | str | tuple | None


def _for_trial(settings: Mapping[str, Any], rate: float) -> dict[str, Any]:
    """Settings with the learning rate of the trial, and without weight decay."""
    own = copy.deepcopy(dict(settings))
    lr = own.get("lr")
    if lr is not None:
        own["lr"] = torch.full_like(lr, rate) if isinstance(lr, Tensor) else rate
    if own.get("weight_decay"):
        own["weight_decay"] = 0.0
    return own


def _options(optimizer: Any, rate: float) -> dict[str, Any]:
    """What its constructor takes besides the parameters, as far as it is in ``defaults``."""
    settings = {k: v for k, v in vars(optimizer).items() if isinstance(v, PLAIN)}
    settings |= getattr(optimizer, "defaults", {})
    _, *names = inspect.signature(type(optimizer)).parameters
    return _for_trial({name: settings[name] for name in names if name in settings}, rate)


def _around(wrapper: Any, inner: Any, param_groups: list[ParamGroup], rate: float) -> Any:
    """The wrapper built anew around an optimizer."""
    options = _options(wrapper, rate)
    first, *names = inspect.signature(type(wrapper)).parameters
    if first not in ("params", "parameters", "param_groups"):
        return type(wrapper)(inner, **options)
    # As SAM, which builds the inner one itself.
    (name,) = set(names) & set(WRAPPED_AS)
    return type(wrapper)(param_groups, **{**options, name: type(inner)})


def _scale_each_step(stepper: Optimizer, scaling: Scaling) -> None:
    step = stepper.step

    def scaled(closure: Any = None, *args: Any, **kwargs: Any) -> Any:
        def closure_then_begin() -> Any:
            loss = closure()
            scaling.begin((FACTOR, 1.0))
            return loss

        if callable(closure):
            result = step(closure_then_begin, *args, **kwargs)
        else:
            scaling.begin((FACTOR, 1.0))
            result = step(*args, **kwargs)
        scaling.end()
        return result

    vars(stepper)["step"] = scaled


def _copies(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().clone() for t in tensors]


def _keeps_copies(optimizer: Any, places: list[Tensor]) -> bool:
    """Whether it holds tensors that lie close to the first or last values of a parameter."""
    parameters = {p for group in unwrap(optimizer)[0].param_groups for p in group["params"]}
    for t in _tensors(vars(optimizer), set(map(id, parameters))):
        is_view = t.data_ptr() in {p.data_ptr() for p in parameters}
        if t.is_floating_point() and not is_view:
            for place in places:
                if t.shape == place.shape and (t - place).abs().max() < 0.25 * place.abs().min():
                    return True
    return False


def _tensors(value: object, seen: set[int]) -> Iterator[Tensor]:
    """The tensors in a value, in what it holds, and so on, those of ``seen`` left out."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value.detach()
    elif isinstance(value, Optimizer):
        yield from _tensors(vars(value), seen)
    elif isinstance(value, Mapping | list | tuple | set):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item, seen)
