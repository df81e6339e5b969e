"""The rows of the study: those of Table 2 of arXiv 2605.28575, under its names, and ours."""

from typing import Any, NamedTuple

from examples.mosi.config import Config


class Row(NamedTuple):
    title: str
    settings: dict[str, Any]
    published: tuple[float, float, float, float] | None = (
        None  # Acc-2, F1, MAE, Corr of the paper's one run
    )


NO_GE, NO_CP = {"noise": 0.0}, {"eta": 1.0}


def parts(
    *, ame: bool = False, sl: bool = False, balance: str = "off", **penalty: Any
) -> dict[str, Any]:
    """Settings with the parts named; GM is balance="paper". The other auxiliary losses are in every row [R]."""
    leave_out = {} if sl else {"stat": 0.0}
    return {"ame": ame, "balance": balance, "penalty": penalty} | leave_out


def study(singles: tuple[str, ...]) -> dict[str, Row]:
    """All rows, the most wanted first, for data with the non-text modalities `singles`."""
    full = {"ame": True, "sl": True, "balance": "paper"}
    ours = {"ame": True, "sl": True}
    noisy = {"modalities": ("text", *singles, "noise")}
    return {
        "A0": Row("baseline", parts(), published=(85.34, 85.38, 0.6773, 0.8295)),
        "A6": Row("full: AME+GM+GE+CP+SL", parts(**full), published=(89.31, 89.23, 0.6379, 0.8644)),
        "C2": Row("AME+SL", parts(**ours), published=(84.89, 84.96, 0.7362, 0.8104)),
        "L": Row("AME+SL, the library's default rule", parts(**ours, balance="default")),
        # It has nothing beside the text, so that beta means nothing there.
        "T": Row("text alone", {"modalities": ("text",), "balance": "off", "beta": 1.0}),
        "X": Row("AME+SL, the text encoder at twice its rate", parts(**ours) | {"text_lr": 2e-4}),
        "U": Row("full, on the update", parts(**full, apply_to="update")),
        "E": Row("AME+SL, rule of the observed errors", parts(**ours, balance="errors")),
        "Z": Row("full, centred", parts(**full, centred=True)),
        "A5": Row(
            "+AME+GM+GE+SL (full - CP)",
            parts(**full, **NO_CP),
            published=(79.24, 79.32, 1.1268, 0.7292),
        ),
        "A1": Row("+AME", parts(ame=True), published=(86.87, 86.84, 0.6771, 0.8314)),
        "A2": Row(
            "+AME+GM",
            parts(ame=True, balance="paper", **NO_GE, **NO_CP),
            published=(86.41, 86.39, 0.6653, 0.8538),
        ),
        "A3": Row(
            "+AME+GM+GE",
            parts(ame=True, balance="paper", **NO_CP),
            published=(87.48, 87.48, 0.6613, 0.8511),
        ),
        "A4": Row(
            "+AME+GM+GE+CP",
            parts(ame=True, balance="paper"),
            published=(87.63, 87.64, 0.6560, 0.8478),
        ),
        "B2": Row(
            "GM", parts(balance="paper", **NO_GE, **NO_CP), published=(87.18, 87.11, 0.6690, 0.8379)
        ),
        "B3": Row("SL", parts(sl=True), published=(88.09, 88.07, 0.6599, 0.8523)),
        "B4": Row(
            "GM+GE", parts(balance="paper", **NO_CP), published=(88.24, 88.22, 0.6938, 0.8329)
        ),
        "B5": Row(
            "GM+CP", parts(balance="paper", **NO_GE), published=(86.87, 86.83, 0.6808, 0.8411)
        ),
        "C1": Row(
            "GM+GE+CP, no AME", parts(balance="paper"), published=(83.05, 83.11, 0.8646, 0.7523)
        ),
        "C5": Row("full - GE", parts(**full, **NO_GE), published=(87.48, 87.37, 0.6478, 0.8538)),
        "NC2": Row("AME+SL and a modality of noise", parts(**ours) | noisy),
        "N": Row("the same, the library's default rule", parts(**ours, balance="default") | noisy),
    } | {name: Row(f"{name} alone", {"modalities": (name,), "balance": "off"}) for name in singles}


def config(row: Row, **common: Any) -> Config:
    """The settings of a study, with the row's own."""
    return Config(**{**common, **row.settings})


def title(name: str) -> str:
    """A row in words."""
    rows = study(())
    return rows[name].title if name in rows else f"{name} alone"
