"""Every optimizer that the packages list, and what each needs to be built, by the names that they give it."""

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

Make = Callable[[nn.Module], Optimizer]

PACKAGES = (
    "torch.optim",
    "pytorch_optimizer",
    "timm",
    "heavyball",
    "schedulefree",
    "prodigyopt",
    "dadaptation",
    "torchao.optim",
)
RATE = 1e-3  # where there is no default
# Built from a flag in each of the param_groups: matrices by Muon, the rest by AdamW.
FLAGGED = ("adago", "adamuon", "distributedmuon", "muon", "muonclip", "normuon")
DISTRIBUTED = ("demo", "distributedmuon")
OF_MODEL = ("adalomo", "adammini", "lomo")
NEEDED: dict[str, dict[str, Any]] = {
    "bsam": {"num_data": 1000},
    "ranger21": {"num_iterations": 100},
    "lbfgs": {"lr": 1.0},
    "sara": {"lr": RATE},
}
LOOKAHEADS = (
    "lookahead_adamw",
    "lookahead_lamb",
    "lookahead_sgd",
)  # a prefix of timm's for any of its names


def listed(package: str) -> Iterator[tuple[str, Make]]:
    """The optimizers of a package: the name of each, and how it is built from a model."""
    yield from {"pytorch_optimizer": _pytorch_optimizer, "timm": _timm}.get(
        package, partial(_classes, package)
    )()


def _classes(package: str) -> Iterator[tuple[str, Make]]:
    module = _imported(package)
    for name, cls in vars(module).items():
        if not (inspect.isclass(cls) and issubclass(cls, Optimizer)) or cls is Optimizer:
            continue
        match name:
            case "SplitOpt":
                yield name, partial(_split, module)
            case "CPUOffloadOptimizer":
                yield name, lambda model, cls=cls: cls(model.parameters(), torch.optim.AdamW)
            case _ if (
                "defaults" not in inspect.signature(cls).parameters
            ):  # else it is the base of others
                yield name, partial(_plain, cls, {})


def _pytorch_optimizer() -> Iterator[tuple[str, Make]]:
    module = _imported("pytorch_optimizer")
    for name in module.get_supported_optimizers():
        cls = module.load_optimizer(name)
        if name in DISTRIBUTED:
            cls = partial(_alone, cls)
        if name in FLAGGED:
            yield name, partial(_flagged, cls)
        elif name in OF_MODEL:
            decay = {"weight_decay": 0.0} if name == "adammini" else {}
            yield name, lambda model, cls=cls, decay=decay: cls(model, **decay)
        elif name == "magma":
            yield (
                name,
                lambda model, cls=cls: cls(torch.optim.AdamW(model.parameters(), weight_decay=0.0)),
            )
        else:
            yield name, partial(_plain, cls, NEEDED.get(name, {}))
    adamw = partial(torch.optim.AdamW, weight_decay=0.0)
    for name in (
        "Lookahead",
        "OrthoGrad",
        "PCGrad",
        "SafeFP16Optimizer",
        "ScheduleFreeWrapper",
        "TRAC",
    ):
        yield name, partial(_around, getattr(module, name), adamw)
    for name in ("FriendlySAM", "GSAM", "LookSAM", "SAM", "WSAM"):
        yield name, partial(_sharp, getattr(module, name))


def _timm() -> Iterator[tuple[str, Make]]:
    module = _imported("timm.optim")
    for name in (*module.list_optimizers(), *LOOKAHEADS):
        yield (
            name,
            lambda model, name=name: module.create_optimizer_v2(
                model, opt=name, lr=RATE, weight_decay=0.0
            ),
        )


def _imported(package: str) -> ModuleType:
    module = __import__(package, fromlist=["_"])
    if package == "heavyball":
        module.utils.compile_mode = None  # minutes for each
    return module


def _plain(cls: type[Optimizer], needed: dict[str, Any], model: nn.Module) -> Optimizer:
    options = dict(needed)
    parameters = inspect.signature(cls.args[0] if isinstance(cls, partial) else cls).parameters
    options |= {
        name: 0.0 for name in ("weight_decay", "weight_decouple_rate") if name in parameters
    }
    if "lr" in parameters and parameters["lr"].default is inspect.Parameter.empty:
        options.setdefault("lr", RATE)
    return cls(model.parameters(), **options)


def _alone(cls: type[Optimizer], *args: Any, **options: Any) -> Optimizer:
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(
            "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
        )
    return cls(*args, **options)


def _flagged(cls: type[Optimizer], model: nn.Module) -> Optimizer:
    of = {flag: [p for p in model.parameters() if (p.dim() == 2) == flag] for flag in (True, False)}
    groups = [{"params": of[flag], "use_muon": flag, "weight_decay": 0.0} for flag in of]
    return cls(groups)


def _split(module: ModuleType, model: nn.Module) -> Optimizer:
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    return module.SplitOpt(
        [
            {"params": matrices, "optimizer": module.Muon},
            {"params": vectors, "optimizer": module.AdamW},
        ]
    )


def _around(cls: type[Optimizer], inner: Callable[..., Optimizer], model: nn.Module) -> Optimizer:
    return cls(inner(model.parameters()))


def _sharp(cls: type[Optimizer], model: nn.Module) -> Optimizer:
    if cls.__name__ == "GSAM":
        inner = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
        return cls(
            model.parameters(),
            base_optimizer=inner,
            model=model,
            rho_scheduler=SimpleNamespace(step=lambda: 0.05),
        )
    if cls.__name__ == "WSAM":
        return cls(model, model.parameters(), torch.optim.AdamW, lr=RATE, weight_decay=0.0)
    return cls(model.parameters(), torch.optim.AdamW, lr=RATE, weight_decay=0.0)
