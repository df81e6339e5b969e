"""What is trained and by which optimizer: the model, AdamW, the penalty, the learning rate."""

import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from examples.mosi.config import Config
from examples.mosi.data import Dataset, check_present
from examples.mosi.draw import Draw
from examples.mosi.model import Adapter, Model, Transformer
from examples.mosi.text import transformer
from examples.mosi.top import top
from gradbalance import PAPER, ConflictAwarePenalty, rules


def others(config: Config, dataset: Dataset) -> list[str]:
    """The non-text modalities that the configuration asks for."""
    known = ["text", *dataset.widths]
    for name in config.modalities:
        if name not in known:
            hint = (
                " It leaks into the standard split: use `--split poria`."
                if name == "visual"
                else ""
            )
            raise ValueError(
                f"`modalities` must be among {known}. Got {name!r}.{hint} Choose others."
            )
    names = [name for name in known[1:] if not config.modalities or name in config.modalities]
    check_present(dataset.corpus, names)
    return names


def build(config: Config, dataset: Dataset, names: list[str], draw: Draw) -> Model:
    text, width = None, config.fused
    if not config.modalities or "text" in config.modalities:
        if config.text == "frozen":
            width = dataset.tokens.rows.shape[1]
            text = Adapter(width, config.hidden, config.dropout, draw)
        else:
            encoder = transformer(config.text_encoder)
            width = encoder.config.hidden_size
            if config.text == "top":
                encoder = top(encoder, config.text_layers)
                check_width(dataset, width, config.text_encoder)
            text = Transformer(encoder, draw, config.precision)
    return Model(config, text, width, {name: dataset.widths[name] for name in names}, draw)


def check_width(dataset: Dataset, width: int, encoder: str) -> None:
    stored = tuple(dataset.tokens.rows.shape[1:])
    if stored != (width,):
        raise ValueError(
            f"`dataset` must hold states of the {width} features of {encoder}. Got a shape of {stored} each. "
            "Prepare it with the same settings."
        )


def optimizer_of(
    model: Model, config: Config, steps: int, noise: torch.Generator
) -> torch.optim.Optimizer:
    """AdamW, under the penalty if there is more than one modality to balance."""
    slow = trainable(model.text) if isinstance(model.text, Transformer) else []
    fast = [p for p in trainable(model) if all(p is not q for q in slow)]
    slow_lr = config.text_lr or 1e-4 * 384 / model.width
    parts = [{"params": fast, "lr": config.lr}] + [{"params": slow, "lr": slow_lr}] * bool(slow)
    optimizer = torch.optim.AdamW(parts, weight_decay=config.weight_decay, fused=True)
    groups = {name: trainable(module) for name, module in model.groups().items()}
    beside_text = [name for name in groups if name != "text"]
    if config.balance == "paper" and len(beside_text) < 2:
        raise ValueError(
            '`modalities` must hold two beside text with balance="paper", which compares these alone. '
            f"Got {sorted(groups)}. Add a modality, or balance in another way."
        )
    if len(groups) < 2:
        return optimizer  # nothing to balance
    options = balancing(config, steps, beside_text) | {"max_norm": config.max_norm or None}
    with warnings.catch_warnings():
        # The paper's penalty acts under AdamW through its noise and its changes alone, which is what is studied.
        warnings.filterwarnings("ignore", '`apply_to="gradient"` does nothing lasting')
        return ConflictAwarePenalty(optimizer, groups, generator=noise, **options)


def balancing(config: Config, steps: int, beside_text: list[str]) -> dict[str, Any]:
    """The options of the penalty that `balance` and `penalty` stand for."""
    options: dict[str, Any] = {
        "off": {
            "rule": rules.Watch()
        },  # the plain optimizer, bit for bit, with the norms on record
        "default": {},
        "errors": {"rule": rules.ConflictAware(centred=True)},
        # The paper's window is the first 25 of 30 epochs. Text takes no part in it, and gets no noise.
        "paper": PAPER
        | {
            "window": (0, round(steps * config.epochs * 25 / 30)),
            "noise": dict.fromkeys(beside_text, PAPER["noise"]),
        },
    }[config.balance]
    of_rule = {
        name: value for name, value in config.penalty.items() if hasattr(options.get("rule"), name)
    }
    if of_rule:
        options = options | {"rule": replace(options["rule"], **of_rule)}
    return options | {name: value for name, value in config.penalty.items() if name not in of_rule}


def trainable(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def ramp(step: int, *, config: Config, total: int) -> float:
    """Linear warm-up, then linear decay to 0."""
    warm = max(1, round(config.warmup * total))
    return min((step + 1) / warm, max(0.0, (total - step) / max(1, total - warm)))
