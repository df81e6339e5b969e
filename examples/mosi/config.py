"""All settings of a run, each also a flag of ``python -m examples.mosi``; nothing heavy is imported here."""

import argparse
import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

COUNT, WIDEST = (1, 10_000), 65_536
WEIGHT = (0, 1e6)  # of a loss or a rate: far beyond it float32 overflows
BOOL = argparse.BooleanOptionalAction


def setting(default: Any, help: str, choices: tuple = (), within: tuple = (), **flag: Any) -> Any:
    choice = {"choices": choices} if choices else {}
    return field(default=default, metadata={"help": help, "within": within, **choice, **flag})


@dataclass(frozen=True)
class Config:
    data: str = setting("auto", "a folder or file, simulated, or auto: where data usually is")
    split: str = setting(
        "standard", "or poria, with leaking visual features", ("standard", "poria")
    )
    modalities: tuple[str, ...] = setting((), "text and others; default: all", nargs="+")
    seed: int = setting(0, "of weights, batches, dropout and noise", within=(0, 2**31 - 1))
    epochs: int = setting(4, "at most", within=COUNT)
    patience: int = setting(
        10, "epochs without a better validation MAE until it ends", within=COUNT
    )
    batch_size: int = setting(32, "utterances a step and process", within=COUNT)
    text: str = setting(
        "top",
        "the encoder's states computed once, its top layers trained, or all of it",
        ("frozen", "top", "finetune"),
    )
    text_encoder: str = setting("minilm", "minilm, a local folder, or a name on the hub")
    text_layers: int = setting(0, "layers trained with --text top; 0: all", within=(0, 1000))
    text_pool: int = setting(1, "last layers averaged with --text frozen", within=(1, 1000))
    precision: str = setting("float32", "of a text encoder that is trained", ("float32", "bf16"))
    balance: str = setting(
        "default",
        "which rule of the penalty; default: the library's",
        ("off", "default", "errors", "paper"),
    )
    # Further options of ConflictAwarePenalty, for studies.
    penalty: dict[str, Any] = field(default_factory=dict)
    lr: float = setting(1e-3, "peak learning rate of AdamW", within=WEIGHT)
    text_lr: float = setting(
        0.0, "of a trained text encoder; 0: 1e-4 at a width of 384, 5e-5 at 768", within=WEIGHT
    )
    weight_decay: float = setting(1e-2, "of AdamW", within=WEIGHT)
    warmup: float = setting(0.1, "share of the steps before the peak", within=(0, 1))
    max_norm: float = setting(1.0, "at which gradients are clipped; 0: they are not", within=WEIGHT)
    dropout: float = setting(0.1, "but in the text encoder, which has its own", within=(0, 0.99))
    hidden: int = setting(64, "width of the encoders' hidden layer", within=(1, WIDEST))
    fused: int = setting(64, "width of the gated fusion", within=(1, WIDEST))
    latent: int = setting(0, "width of z; 0: that of the modality", within=(0, WIDEST))
    ame: bool = setting(True, "adaptive modality encoders; otherwise z = mu", action=BOOL)
    draws: int = setting(16, "of latent noise, whose mean prediction is evaluated", within=COUNT)
    gate: bool = setting(True, "gated fusion; otherwise the mean", action=BOOL)
    beta: float = setting(0.1, "weight of the fused modalities beside the text", within=WEIGHT)
    task: str = setting("l1", "loss of the prediction and of the heads", ("l1", "mse"))
    recon: float = setting(0.1, "weight of the reconstruction loss; 0: left out", within=WEIGHT)
    uni: float = setting(0.1, "weight of the heads' losses", within=WEIGHT)
    div: float = setting(0.01, "weight of the diversity loss", within=WEIGHT)
    stat: float = setting(0.1, "weight of the statistical loss", within=WEIGHT)
    device: str = setting("cpu", "auto: cuda where there is one", ("cpu", "cuda", "auto"))

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


KINDS = {str: "a string", int: "an integer", float: "a number", bool: "true or false"}


def check(item: dataclasses.Field, value: Any) -> None:
    """Refuses a value of another kind, or outside the choices or the range of a setting."""
    name, kind = item.name, KINDS.get(item.type)
    if name == "modalities":
        good = isinstance(value, list | tuple) and all(isinstance(each, str) for each in value)
        kind = "a list of names"
    elif name == "penalty":
        good, kind = isinstance(value, dict), "a dict"
    else:
        good = isinstance(value, (int, float) if item.type is float else item.type)
        good = good and (item.type is bool or not isinstance(value, bool))
    if not good:
        raise ValueError(f"`{name}` must be {kind}. Got {value!r}. Correct it.")
    choices = item.metadata.get("choices")
    if choices and value not in choices:
        raise ValueError(f"`{name}` must be one of {choices}. Got {value!r}. Choose one of them.")
    least, most = item.metadata.get("within") or (None, None)
    if most is not None and not least <= value <= most:
        raise ValueError(
            f"`{name}` must be from {least:g} to {most:g}. Got {value}. Choose one in between."
        )


# What the paper states [P]: encoder, optimizer, batches, epochs and the penalty. It tells of no clipping, and its data
# has the visual features of mosi.pkl. The rest is as it is by default.
PAPER = {"text": "finetune", "text_encoder": "microsoft/deberta-v3-base", "balance": "paper"}
PAPER |= {"epochs": 30, "patience": 30, "batch_size": 8, "lr": 1e-5, "text_lr": 1e-5, "warmup": 0.1}
PAPER |= {"max_norm": 0.0, "beta": 1.0, "task": "mse", "modalities": ("text", "audio", "visual")}
PRESETS = {"paper": PAPER}


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
