"""All settings of a run, each also a flag of ``python -m examples.mosi``."""

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

TEXT = ("frozen", "top", "finetune")
BALANCE = ("off", "default", "errors", "paper")


def setting(default: Any, help: str, **flag: Any) -> Any:
    return field(default=default, metadata={"help": help, **flag})


@dataclass(frozen=True)
class Config:
    data: str = setting(
        "auto", "folder or file of the data, 'simulated', or 'auto': where it is usually found"
    )
    split: str = setting(
        "standard",
        "standard, or poria (with leaking visual features)",
        choices=("standard", "poria"),
    )
    modalities: tuple[str, ...] = setting(
        (), "text and others, e.g. text audio; default: all", nargs="+"
    )
    seed: int = setting(0, "of weights, batches, dropout and noise")
    epochs: int = setting(4, "at most")
    patience: int = setting(10, "epochs without a better validation MAE before the training stops")
    batch_size: int = setting(32, "utterances a step and process")
    text: str = setting(
        "top",
        "the encoder's states computed once, its top layers trained, or all of it",
        choices=TEXT,
    )
    text_encoder: str = setting("minilm", "minilm, a local folder, or a name on the hub")
    text_layers: int = setting(0, "top layers that are trained with --text top; 0: all")
    text_pool: int = setting(1, "last layers whose mean is taken with --text frozen")
    precision: str = setting(
        "float32", "of a text encoder that is trained", choices=("float32", "bf16")
    )
    balance: str = setting(
        "default", "which rule of the penalty; default: the library's", choices=BALANCE
    )
    penalty: dict[str, Any] = field(
        default_factory=dict
    )  # further options of ConflictAwarePenalty, for studies
    lr: float = setting(1e-3, "peak learning rate of AdamW")
    text_lr: float = setting(
        0.0, "the same for a trained text encoder; 0: 1e-4 at a width of 384, 5e-5 at 768"
    )
    weight_decay: float = setting(1e-2, "of AdamW")
    warmup: float = setting(0.1, "share of the steps before the peak")
    max_norm: float = setting(1.0, "at which the gradient is clipped; 0 leaves it as it is")
    dropout: float = setting(0.1, "everywhere but in the text encoder, which has its own")
    hidden: int = setting(64, "width of the encoders' hidden layer")
    fused: int = setting(64, "width of the gated fusion")
    latent: int = setting(0, "width of z; 0: that of the modality")
    ame: bool = setting(
        True, "adaptive modality encoders; otherwise z = mu", action=argparse.BooleanOptionalAction
    )
    draws: int = setting(16, "of the latent noise, whose mean prediction is evaluated")
    gate: bool = setting(
        True, "gated fusion; otherwise the mean", action=argparse.BooleanOptionalAction
    )
    beta: float = setting(0.1, "weight of the fused modalities beside the text")
    task: str = setting("l1", "loss of the prediction and of the heads", choices=("l1", "mse"))
    recon: float = setting(
        0.1, "weight of the reconstruction loss; 0 leaves it out, as for the next three"
    )
    uni: float = setting(0.1, "weight of the heads' losses")
    div: float = setting(0.01, "weight of the diversity loss")
    stat: float = setting(0.1, "weight of the statistical loss")
    device: str = setting("cpu", "cpu or cuda")

    def __post_init__(self) -> None:
        object.__setattr__(self, "modalities", tuple(self.modalities))
        for item in dataclasses.fields(self):
            choices, value = item.metadata.get("choices"), getattr(self, item.name)
            if choices and value not in choices:
                raise ValueError(
                    f"`{item.name}` must be one of {choices}. Got {value!r}. Choose one of them."
                )
            if isinstance(value, float) and not 0 <= value < float("inf"):
                raise ValueError(
                    f"`{item.name}` must be finite and at least 0. Got {value}. Give a weight or a rate."
                )
        for name in ("epochs", "patience", "batch_size", "text_pool", "draws"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"`{name}` must be at least 1. Got {getattr(self, name)}. Give a positive number."
                )
        if (
            self.precision == "bf16"
            and self.device == "cuda"
            and not torch.cuda.is_bf16_supported()
        ):
            raise ValueError(
                '`precision` must be "float32" on this GPU. Got "bf16", which it lacks. Leave it out.'
            )
        if self.balance in ("errors", "paper") and not self.uni:
            raise ValueError(
                f"`uni` must be positive with balance={self.balance!r}: the errors are those of the heads. Got 0. "
                'Give a weight, or balance="default".'
            )


def flags(parser: argparse.ArgumentParser) -> None:
    """One flag for each setting; a flag that is not given leaves no trace in the namespace."""
    for item in dataclasses.fields(Config):
        if item.metadata:
            options = dict(item.metadata)
            options["help"] += f" (default: {item.default})" if item.default != () else ""
            if "action" not in options:
                options["type"] = str if isinstance(item.default, tuple) else type(item.default)
            parser.add_argument(
                f"--{item.name.replace('_', '-')}", default=argparse.SUPPRESS, **options
            )


def differing(one: Config, other: Config, ignore: Sequence[str] = ()) -> list[str]:
    """Names of the settings in which two configurations differ."""
    names = [item.name for item in dataclasses.fields(Config) if item.name not in ignore]
    return [name for name in names if getattr(one, name) != getattr(other, name)]
