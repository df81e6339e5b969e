"""What a bug report needs: versions and, of an optimizer with a penalty on it, its groups and rule.

On the command line ``python -m gradbalance.report`` prints the versions.
"""

import platform
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import torch
from torch.optim import Optimizer

from gradbalance._optimizer.unwrap import layers, unwrap
from gradbalance.penalty import Penalty, penalty_of

__all__ = ["report"]


def report(optimizer: Optimizer | Penalty | None = None) -> str:
    r"""The versions and, of an optimizer, its class, groups, rule and options, as text.

    It holds no file name and no value of a parameter.

    Args:
        optimizer: With a penalty on it or without, or what ``attach`` returns. None: the versions
            alone.

    Raises:
        TypeError: If ``optimizer`` is not an optimizer.

    Example:
        >>> from gradbalance import attach, rules
        >>> text, audio = torch.nn.Linear(4, 1), torch.nn.Linear(9, 1)
        >>> optimizer = torch.optim.AdamW([*text.parameters(), *audio.parameters()])
        >>> penalty = attach(optimizer, {"text": text, "audio": audio}, rules.ByHand(text=0.5))
        >>> print(report(optimizer).partition("\n\n")[2])
        optimizer    torch.optim.adamw.AdamW
        param_groups 1
        group        text: 2 tensors, 5 trainable entries
        group        audio: 2 tensors, 10 trainable entries
        rule         ByHand(text=0.5)
        scaled       the update, by learning rate
        options      the defaults
    """
    rows = _versions()
    if optimizer is not None:
        rows += [("", ""), *_rows_of(optimizer)]
    return "\n".join(f"{name:12} {value}".rstrip() for name, value in rows)


def _versions() -> list[tuple[str, str]]:
    try:
        own = version("gradbalance")
    except PackageNotFoundError:
        own = "not installed, imported from a checkout"
    cuda = "none"
    if torch.version.cuda is not None:
        devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        cuda = f"{torch.version.cuda}, {', '.join(devices) or 'no device'}"
    return [
        ("gradbalance", own),
        ("python", platform.python_version()),
        ("torch", str(torch.__version__)),
        ("numpy", np.__version__),
        ("platform", platform.platform()),
        ("CUDA", cuda),
    ]


def _rows_of(optimizer: Optimizer | Penalty) -> list[tuple[str, str]]:
    penalty = optimizer if isinstance(optimizer, Penalty) else penalty_of(optimizer)
    if penalty is None:
        classes, param_groups = layers(optimizer), unwrap(optimizer)[0].param_groups
    else:
        reader, stepper = penalty._reader(), penalty._stepper()
        if reader is None or stepper is None:
            return [("optimizer", "gone: nothing but the penalty is left")]
        outside = [] if isinstance(optimizer, Penalty) else layers(optimizer)
        classes = [layer for layer in outside if layer is not stepper] + [stepper]
        param_groups = reader.param_groups
    rows = [("optimizer", " around ".join(_class(each) for each in classes))]
    rows.append(("param_groups", str(len(param_groups))))
    if penalty is None:
        return [*rows, ("penalty", "none")]
    tensors = dict.fromkeys(penalty.names, 0)
    for positions in penalty._engine.membership.positions(param_groups):
        for m in positions:
            if m is not None:
                tensors[penalty.names[m]] += 1
    for name, size in penalty._engine.membership.sizes(param_groups).items():
        rows.append(("group", f"{name}: {tensors[name]} tensors, {size:,} trainable entries"))
    options = penalty._options
    scaled = "nothing"
    if options.apply_to == "gradient":
        scaled = "the gradient"
    elif penalty._engine.scaling is not None:
        scaled = f"the update, by {penalty._engine.scaling.name}"
    rows.append(("rule", repr(options.rule)))
    rows.append(("scaled", scaled))
    rows.append(("options", ", ".join(options.changed()) or "the defaults"))
    return rows


def _class(instance: object) -> str:
    return f"{type(instance).__module__}.{type(instance).__qualname__}"


if __name__ == "__main__":
    print(report())  # noqa: T201
