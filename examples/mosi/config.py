"""All settings of a run, each also a flag of ``python -m examples.mosi``; nothing heavy is imported here."""

import argparse
import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SHARE, WIDTH = (0, 1), (1, 65_536)
WEIGHT = (0, 1e6)  # of a loss or a rate: far beyond it float32 overflows


def setting(default: Any, help: str, *, within: tuple | None = None, **flag: Any) -> Any:
    return field(default=default, metadata={"help": help, "within": within, **flag})


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
    seed: int = setting(0, "of weights, batches, dropout and noise", within=(0, 2**31 - 1))
    epochs: int = setting(4, "at most", within=(1, 10_000))
    patience: int = setting(
        10,
        "epochs without a better validation MAE before the training stops",
        within=(1, 10_000),
    )
    batch_size: int = setting(32, "utterances a step and process", within=(1, 10**6))
    text: str = setting(
        "top",
        "the encoder's states computed once, its top layers trained, or all of it",
        choices=("frozen", "top", "finetune"),
    )
    text_encoder: str = setting("minilm", "minilm, a local folder, or a name on the hub")
    text_layers: int = setting(
        0, "top layers that are trained with --text top; 0: all", within=(0, 1000)
    )
    text_pool: int = setting(
        1, "last layers whose mean is taken with --text frozen", within=(1, 1000)
    )
    precision: str = setting(
        "float32", "of a text encoder that is trained", choices=("float32", "bf16")
    )
    balance: str = setting(
        "default",
        "which rule of the penalty; default: the library's",
        choices=("off", "default", "errors", "paper"),
    )
    penalty: dict[str, Any] = field(
        default_factory=dict
    )  # further options of ConflictAwarePenalty, for studies
    lr: float = setting(1e-3, "peak learning rate of AdamW", within=WEIGHT)
    text_lr: float = setting(
        0.0,
        "the same for a trained text encoder; 0: 1e-4 at a width of 384, 5e-5 at 768",
        within=WEIGHT,
    )
    weight_decay: float = setting(1e-2, "of AdamW", within=WEIGHT)
    warmup: float = setting(0.1, "share of the steps before the peak", within=SHARE)
    max_norm: float = setting(
        1.0, "at which the gradient is clipped; 0 leaves it as it is", within=WEIGHT
    )
    dropout: float = setting(
        0.1, "everywhere but in the text encoder, which has its own", within=(0, 0.99)
    )
    hidden: int = setting(64, "width of the encoders' hidden layer", within=WIDTH)
    fused: int = setting(64, "width of the gated fusion", within=WIDTH)
    latent: int = setting(0, "width of z; 0: that of the modality", within=(0, WIDTH[1]))
    ame: bool = setting(
        True, "adaptive modality encoders; otherwise z = mu", action=argparse.BooleanOptionalAction
    )
    draws: int = setting(
        16, "of the latent noise, whose mean prediction is evaluated", within=(1, 10_000)
    )
    gate: bool = setting(
        True, "gated fusion; otherwise the mean", action=argparse.BooleanOptionalAction
    )
    beta: float = setting(0.1, "weight of the fused modalities beside the text", within=WEIGHT)
    task: str = setting("l1", "loss of the prediction and of the heads", choices=("l1", "mse"))
    recon: float = setting(
        0.1,
        "weight of the reconstruction loss; 0 leaves it out, as for the next three",
        within=WEIGHT,
    )
    uni: float = setting(0.1, "weight of the heads' losses", within=WEIGHT)
    div: float = setting(0.01, "weight of the diversity loss", within=WEIGHT)
    stat: float = setting(0.1, "weight of the statistical loss", within=WEIGHT)
    device: str = setting(
        "cpu", "cpu, cuda, or auto: cuda where there is one", choices=("cpu", "cuda", "auto")
    )

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            check(item, getattr(self, item.name))
        object.__setattr__(self, "modalities", tuple(self.modalities))
        if self.balance in ("errors", "paper") and not self.uni:
            raise ValueError(
                f"`uni` must be positive with balance={self.balance!r}: the errors are those of the heads. Got 0. "
                'Give a weight, or balance="default".'
            )

    def others(self, known: Iterable[str]) -> list[str]:
        """The non-text modalities that are asked for, out of those that the data has."""
        known = ["text", *known]
        for name in self.modalities:
            if name not in known:
                hint = (
                    " It leaks into the standard split: use `--split poria`, or the data of the paper, mosi.pkl "
                    "(python -m examples.mosi.download)."
                    if name == "visual"
                    else ""
                )
                raise ValueError(
                    f"`modalities` must be among {known}. Got {name!r}.{hint} Choose others."
                )
        chosen = [name for name in known[1:] if not self.modalities or name in self.modalities]
        if self.balance == "paper" and len(chosen) < 2:
            text = ["text"] if not self.modalities or "text" in self.modalities else []
            raise ValueError(
                '`modalities` must hold two beside text with balance="paper", which compares these alone. '
                f'Got {sorted(chosen + text)}. Add one, or take balance="default".'
            )
        return chosen


def check(item: dataclasses.Field, value: Any) -> None:
    """Refuses a value of another kind, or outside the choices or the range of a setting."""
    name, choices, within = (
        item.name,
        item.metadata.get("choices"),
        item.metadata.get("within"),
    )
    if name == "modalities":
        good = isinstance(value, list | tuple) and all(isinstance(each, str) for each in value)
        kind = "a list of names"
    elif name == "penalty":
        good, kind = isinstance(value, dict), "a dict"
    else:
        kinds = (int, float) if item.type is float else item.type
        good = isinstance(value, kinds) and (item.type is bool or not isinstance(value, bool))
        kind = {str: "a string", int: "an integer", float: "a number", bool: "true or false"}[
            item.type
        ]
    if not good:
        raise ValueError(f"`{name}` must be {kind}. Got {value!r}. Correct it.")
    if choices and value not in choices:
        raise ValueError(f"`{name}` must be one of {choices}. Got {value!r}. Choose one of them.")
    if within and not within[0] <= value <= within[1]:
        least, most = within
        raise ValueError(
            f"`{name}` must be from {least:g} to {most:g}. Got {value}. Choose one in between."
        )


# What the paper states [P]: encoder, optimizer, batches, epochs and the penalty. It tells of no clipping, and its data
# has the visual features of mosi.pkl. The rest is as it is by default.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "modalities": ("text", "audio", "visual"),
        "text": "finetune",
        "text_encoder": "microsoft/deberta-v3-base",
        "balance": "paper",
        "epochs": 30,
        "patience": 30,
        "batch_size": 8,
        "lr": 1e-5,
        "text_lr": 1e-5,
        "warmup": 0.1,
        "max_norm": 0.0,
        "beta": 1.0,
        "task": "mse",
    }
}


def flags(parser: argparse.ArgumentParser) -> None:
    """One flag for each setting; a flag that is not given leaves no trace in the namespace."""
    for item in dataclasses.fields(Config):
        if item.metadata:
            options = {key: value for key, value in item.metadata.items() if key != "within"}
            options["help"] += f" (default: {item.default})" if item.default != () else ""
            if "action" not in options:
                options["type"] = str if isinstance(item.default, tuple) else type(item.default)
            parser.add_argument(
                f"--{item.name.replace('_', '-')}", default=argparse.SUPPRESS, **options
            )


def read_settings(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings in a file such as the config.json of a run, and what it says of the run beside them."""
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        record = described.pop("run", {})
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(
            f"`{path}` must be a JSON object of settings, as the config.json of a run is. Got {error}. Give such a file."
        ) from error
    known = [item.name for item in dataclasses.fields(Config)]
    unknown = [name for name in described if name not in known]
    if unknown:
        raise ValueError(
            f"`{path}` must hold settings of this example. Got {unknown[0]!r}, among {len(described)}. "
            f"They are {', '.join(known)}."
        )
    return described, record


def differing(one: Config, other: Config) -> list[str]:
    """Names of the settings in which two configurations differ, other than the device."""
    names = [item.name for item in dataclasses.fields(Config) if item.name != "device"]
    return [name for name in names if getattr(one, name) != getattr(other, name)]
