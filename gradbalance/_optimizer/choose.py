"""How the steps of some parameters are scaled: by a table, by a trial, or a refusal."""

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from gradbalance._optimizer.hooks import StepHooks
from gradbalance._optimizer.scaling import Displacement, LearningRates, ParamGroup
from gradbalance._optimizer.unwrap import held_by, layers, unwrap

Scaling = LearningRates | Displacement

# Their step is capped, or decays by a schedule in which the learning rate stands.
NOT_BY_RATE = (torch.optim.Adafactor, torch.optim.Rprop)
# Their wrappers hand the step on as it is, and need more than parameters.
FRAMEWORKS = (
    *("accelerate", "deepspeed", "gradbalance", "lightning", "lightning_fabric", "opacus"),
    *("pytorch_lightning", "torch"),
)
STEPS = 24  # more than slow weights wait
FACTORS = (0.5, 1.0)  # of half of the trial parameters, and of the others
TOLERANCE = 0.04  # of the displacement of scaled parameters: schedule-free RAdam is 3 % off
LATE_TOLERANCE = 0.1  # where the factor sets in later: averages follow slowly
OTHERS_TOLERANCE = 1e-3  # of parameters that are not scaled
RESOLVED = 1e-6  # the smallest displacement that float32 can tell, of a parameter
SIDE = 8  # of a trial parameter
# Some steps are the rate times the size of the parameter. At a higher rate the parameters would
# change so much that the steps do; at a lower one float32 could not tell the steps.
RATE = 2e-3
FAR = 100.0  # trial parameters are as large as that many steps, so that they change little
RANDOM = (
    *("bernoulli", "bernoulli_", "exponential_", "multinomial", "normal", "normal_", "rand"),
    *("rand_like", "randint", "randint_like", "randn", "randn_like", "random_", "randperm"),
    *("uniform_",),
)
NO_SETTINGS = ("params", "param_names", "initial_lr", "name", "gradbalance")
PLAIN = (bool, int, float, str, tuple, type(None))

OTHER = "Use another optimizer."
GRADIENT = 'Use `apply_to="gradient"`, or another optimizer.'
CHOICE = (
    'Use `apply_to="learning_rate"` if its steps are proportional to the learning rate, '
    'else `apply_to="displacement"`.'
)


def scaling_for(optimizer: object, apply_to: str) -> Scaling:
    """How the steps of some parameters are scaled while those of the others stay as they are.

    Args:
        optimizer: The optimizer, however wrapped.
        apply_to: ``"learning_rate"`` or ``"displacement"``, without a trial; or ``"update"``: one
            of the two by a table for the classes of ``torch.optim``, and by a trial for others.

    Raises:
        ValueError: If neither works, or if the trial fails.
    """
    _, stepper = unwrap(optimizer)
    if apply_to == "displacement":
        return _checked(Displacement, stepper)
    if apply_to == "learning_rate":
        if not _has_rate(stepper):
            raise ValueError(
                '`apply_to="learning_rate"` must have an `lr` in all `param_groups`. '
                f'Got {type(stepper).__name__} without. Use `apply_to="displacement"`.'
            )
        return LearningRates(stepper)
    kind = _kind_for(stepper)
    wrappers = []
    for layer in layers(optimizer):
        package, *_ = type(layer).__module__.split(".")
        if layer is not stepper and package not in FRAMEWORKS:
            wrappers.append(layer)
    if wrappers:
        trial = _tried(*wrappers, stepper)
        if not trial.moves or not trial.follows(kind):
            why = f"which changes what the steps of {type(stepper).__name__} do"
            # Both choices scale the step of the inner optimizer, which a wrapper may normalise.
            helps = kind is LearningRates and trial.follows(Displacement)
            raise _refusal(wrappers[0], why, 'Use `apply_to="displacement"`.' if helps else OTHER)
    return _checked(kind, stepper)


def _checked(kind: type[Scaling], optimizer: Optimizer) -> Scaling:
    is_differentiable = any(group.get("differentiable") for group in optimizer.param_groups)
    if kind is Displacement and is_differentiable:
        raise ValueError(
            "`optimizer` must not be differentiable where its finished update is rescaled. "
            f"Got {type(optimizer).__name__} with `differentiable=True`. {GRADIENT}"
        )
    return kind(optimizer)


def _kind_for(optimizer: Optimizer) -> type[Scaling]:
    """The scaling for an optimizer around which there is no other."""
    if isinstance(optimizer, torch.optim.ASGD):
        why = "which follows its learning rate a step late and keeps averages of the parameters"
        raise _refusal(optimizer, why, GRADIENT)
    if f"{type(optimizer).__module__}.".startswith("torch.optim."):
        by_rate = _has_rate(optimizer) and not isinstance(optimizer, NOT_BY_RATE)
        return LearningRates if by_rate else Displacement
    trial = _tried(optimizer)
    if not trial.moves:
        raise _refusal(optimizer, "whose `step()` hardly moves parameters", OTHER)
    if _has_rate(optimizer) and trial.follows(LearningRates):
        # A cap or a schedule of its own shows at a high rate, where all gradients agree.
        high = _tried(optimizer, rate=1.0)
        copies = trial.keeps_copies or high.keeps_copies
        if copies or high.follows(LearningRates) or not high.follows(Displacement):
            return LearningRates
    if not trial.keeps_copies and trial.follows(Displacement):
        return Displacement
    why = "which does not follow it and keeps copies of the parameters"
    if not trial.keeps_copies:
        why = "in which the steps of some parameters change those of others"
    raise _refusal(optimizer, why, GRADIENT if trial.follows(None) else OTHER)


def _has_rate(optimizer: Optimizer) -> bool:
    return all(group.get("lr") is not None for group in optimizer.param_groups)


def _refusal(optimizer: object, why: str, advice: str) -> ValueError:
    return ValueError(
        '`apply_to="update"` must have an optimizer whose step can be scaled for some parameters '
        "alone, by the learning rate or by rescaling the finished update. "
        f"Got {type(optimizer).__name__}, {why}. {advice}"
    )


def _tried(*chain: object, rate: float = RATE) -> "_Trial":
    try:
        return _Trial(chain, rate)
    except Exception as error:
        why = f"which fails in a trial on small parameters: {error!r}"
        raise _refusal(chain[0], why, CHOICE) from error


class _Trial:
    """Runs of an optimizer that is built anew: as it is, and with half of the parameters scaled.

    Args:
        chain: The optimizer that steps, last, and the wrappers around it.
        rate: The learning rate. At 1 the gradients of a parameter are always the same.

    Attributes:
        moves: Whether each parameter moves by as much as float32 can tell.
        keeps_copies: Whether the optimizer holds tensors that are close to a parameter.
    """

    def __init__(self, chain: tuple[Any, ...], rate: float) -> None:
        self._chain = chain
        self._rate = rate
        self._with_closure = False
        self.keeps_copies = False
        try:
            self._plain = self._run(None, STEPS)
        except Exception as error:
            self._with_closure = True  # some steps need one
            try:
                self._plain = self._run(None, STEPS)
            except Exception:
                if "closure" in str(error):
                    raise
                raise error from None
        ends = zip(self._plain[0], self._plain[-1], strict=True)
        self.moves = all(bool((q - p).norm() > RESOLVED * p.norm()) for p, q in ends)

    def follows(self, kind: type[Scaling] | None) -> bool:
        """Whether each parameter moves its factor times as far as in the plain run.

        Args:
            kind: How they are scaled; None for their gradients.
        """
        late = self.keeps_copies or self._follows_from(STEPS // 2, kind, LATE_TOLERANCE)
        return late and self._follows_from(0, kind, TOLERANCE)

    def _follows_from(self, first: int, kind: type[Scaling] | None, tolerance: float) -> bool:
        try:
            scaled = self._run(kind, first)
        except Exception:  # not every step takes several param_groups
            return False
        places = zip(self._factors, self._plain[first], self._plain[-1], scaled[-1], strict=True)
        for factor, start, plain, end in places:
            moved = plain - start
            allowed = OTHERS_TOLERANCE if factor == 1.0 else tolerance
            if not (end - start - factor * moved).norm() <= allowed * moved.norm():
                return False
        return True

    def _run(self, kind: type[Scaling] | None, first: int) -> list[list[Tensor]]:
        """Where the parameters are before each step and at the end; scaled from ``first`` on."""
        *wrappers, original = self._chain
        generator = torch.Generator().manual_seed(0)
        param_groups = _trial_groups(original.param_groups, self._rate, generator)
        parameters = []
        group_of = {}
        for param_group in param_groups:
            for i, p in enumerate(param_group["params"]):
                parameters.append(p)
                group_of[id(p)] = 2 * i // len(param_group["params"])
        self._factors = [FACTORS[m] for m in group_of.values()]
        with _OwnRandomNumbers(parameters[0].device), torch.enable_grad():
            optimizer = type(original)(param_groups, **_options(original, self._rate))
            for wrapper in reversed(wrappers):
                optimizer = _around(wrapper, optimizer, param_groups, self._rate)
            stepper = unwrap(optimizer)[1]
            if type(stepper) is not type(original):
                raise TypeError(f"built anew it steps by {type(stepper).__name__}")
            for each in (stepper, optimizer):
                train = getattr(each, "train", None)
                if callable(train):  # schedule-free ones step in this mode alone
                    train()
            scaling = (kind or Displacement)(stepper)
            scaling.divide(group_of)
            places: list[list[Tensor]] = []

            def before_step() -> None:
                if kind is not None and len(places) > first:
                    scaling.begin(FACTORS)

            StepHooks(stepper, self, [before_step], scaling.end)
            for _ in range(STEPS):
                places.append(_copies(parameters))
                gradients = []
                for start, factor in zip(places[0], self._factors, strict=True):
                    gradient = self._gradient(start, generator)
                    if kind is None and len(places) > first:
                        gradient = factor * gradient
                    gradients.append(gradient)
                self._step(optimizer, parameters, gradients)
            places.append(_copies(parameters))
        if kind is None:
            self.keeps_copies |= _keeps_copies(optimizer, parameters, [*places[0], *places[-1]])
        return places

    def _gradient(self, start: Tensor, generator: torch.Generator) -> Tensor:
        """The next gradient of a parameter: always the same, or of any direction and size."""
        if self._rate == 1.0:
            return start.sign()
        size = 10.0 ** torch.randint(-2, 1, (), generator=generator, device="cpu")
        gradient = torch.randn(start.shape, generator=generator, device="cpu", dtype=start.dtype)
        return (size * gradient).to(start.device)

    def _step(self, optimizer: Any, parameters: list[Tensor], gradients: list[Tensor]) -> None:
        def closure() -> Tensor:
            # Wherever the parameters are: a loss of 1, these gradients, the identity as Hessian.
            loss = torch.ones((), device=parameters[0].device)
            for p, g in zip(parameters, gradients, strict=True):
                move = p - p.detach()
                loss = loss + (move * g).sum() + 0.5 * move.square().sum()
            graphs = torch.autograd.grad(loss, parameters, create_graph=True)
            for p, g in zip(parameters, graphs, strict=True):
                p.grad = g
            return loss

        for p, g in zip(parameters, gradients, strict=True):
            p.grad = g
        if self._with_closure:
            optimizer.step(torch.enable_grad()(closure))
        else:
            optimizer.step()


class _OwnRandomNumbers(TorchFunctionMode):
    """What this thread draws comes from a generator of the trial, the same in each run."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._generator = torch.Generator(device).manual_seed(0)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", None) in RANDOM and not kwargs.get("generator"):
            kwargs = {**kwargs, "generator": self._generator}
        return func(*args, **kwargs)


def _trial_groups(
    param_groups: list[ParamGroup], rate: float, generator: torch.Generator
) -> list[ParamGroup]:
    """For each kind of settings a param_group, with each kind of parameter in it twice."""
    settings_of: dict[str, ParamGroup] = {}
    originals: dict[str, dict[str, Tensor]] = {}
    for param_group in param_groups:
        settings = {k: v for k, v in param_group.items() if k not in NO_SETTINGS}
        settings = _for_trial(settings, rate)
        settings_of[repr(settings)] = settings
        for p in param_group["params"]:
            if p.numel() > 0:
                kind = f"{p.dim()} {_plain_attributes(p)}"
                originals.setdefault(repr(settings), {}).setdefault(kind, p)
    trial_groups = []
    for key, kinds in originals.items():
        trial_group = {**settings_of[key], "params": []}
        for p in (*kinds.values(), *kinds.values()):
            trial_group["params"].append(_trial_parameter(p, rate, generator))
        trial_groups.append(trial_group)
    return trial_groups


def _trial_parameter(p: Tensor, rate: float, generator: torch.Generator) -> Tensor:
    """Entries far from 0 and of any sign, so that a copy of them is known again."""
    shape = [min(size, SIDE) for size in p.shape]
    sizes = torch.rand(shape, generator=generator, device="cpu", dtype=torch.float32) + 1.0
    signs = torch.randint(0, 2, shape, generator=generator, device="cpu") * 2 - 1
    device = "cpu" if p.device.type == "meta" else p.device
    trial = nn.Parameter((FAR * rate * sizes * signs).to(device))
    vars(trial).update(_plain_attributes(p))
    return trial


def _plain_attributes(owner: object) -> dict[str, Any]:
    return {name: value for name, value in vars(owner).items() if isinstance(value, PLAIN)}


def _copies(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().clone() for t in tensors]


def _for_trial(settings: Mapping[str, Any], rate: float) -> dict[str, Any]:
    """A copy of settings with the learning rate of the trial, and without weight decay."""
    copied = copy.deepcopy(dict(settings))
    if isinstance(copied.get("lr"), Tensor):
        copied["lr"] = torch.full_like(copied["lr"], rate)
    elif copied.get("lr") is not None:
        copied["lr"] = rate
    if copied.get("weight_decay"):
        copied["weight_decay"] = 0.0
    return copied


def _options(optimizer: object, rate: float) -> dict[str, Any]:
    """The arguments of its constructor that are in its ``defaults`` or attributes."""
    settings = {**_plain_attributes(optimizer), **getattr(optimizer, "defaults", {})}
    _, *names = inspect.signature(type(optimizer)).parameters
    return _for_trial({name: settings[name] for name in names if name in settings}, rate)


def _around(wrapper: object, inner: object, param_groups: list[ParamGroup], rate: float) -> Any:
    """The wrapper built anew around an optimizer."""
    make: Any = type(wrapper)
    options = _options(wrapper, rate)
    first, *names = inspect.signature(make).parameters
    if first not in ("params", "parameters", "param_groups"):
        return make(inner, **options)
    # As SAM, which builds the inner one itself.
    for name in names:
        if "optimizer" in name:
            options[name] = type(inner)
    return make(param_groups, **options)


def _keeps_copies(optimizer: object, parameters: list[Tensor], values: list[Tensor]) -> bool:
    """Whether it holds tensors close to values that a parameter had. Views do not count."""
    memory = {p.data_ptr() for p in parameters}
    for leaf in tree_leaves([vars(each) for each in (optimizer, *held_by(optimizer))]):
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            continue
        for value in values:
            if leaf.shape != value.shape or leaf.data_ptr() in memory:
                continue
            if (leaf.detach() - value).abs().max() < 0.25 * value.abs().min():
                return True
    return False
