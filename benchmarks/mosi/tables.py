"""The tables of the report."""

from typing import Any

import numpy as np

from benchmarks.mosi.compare import (
    BASELINE,
    DEFAULT,
    FULL,
    LOSSES,
    TEXT,
    Runs,
    bounds,
    collapsed,
    difference,
    interval,
    mean_over,
    metric,
    modalities,
    over_epochs,
    probe,
)
from benchmarks.mosi.document import Block, Heading, Paragraph, Table
from benchmarks.mosi.rows import title

METRICS = {
    "mae": "MAE",
    "corr": "Corr",
    "acc2_nonzero": "Acc-2 (zeros dropped)",
    "f1_nonzero": "F1",
    "acc2_nonneg": "Acc-2 (≥ 0)",
    "acc7": "Acc-7",
}
# Encoder, features, Acc-2 in % (zeros dropped), MAE, Corr, as quoted in Table 1 of arXiv 2605.28575.
PUBLISHED = [
    ("arXiv 2605.28575", "DeBERTa-v3-base, fine-tuned", "MAG-BERT pickle", 89.31, 0.638, 0.864),
    ("ITHP", "DeBERTa-v3-base, fine-tuned", "MAG-BERT pickle", 88.7, 0.643, 0.852),
    ("MAG", "BERT-base, fine-tuned", "MAG-BERT pickle", 84.2, 0.712, 0.796),
    ("Self-MM", "BERT-base, fine-tuned", "MAG-BERT pickle", 84.0, 0.713, 0.798),
    ("MMIM", "BERT-base, fine-tuned", "MAG-BERT pickle", 84.1, 0.700, 0.800),
    ("UniMSE", "T5, fine-tuned", "not named", 85.9, 0.691, 0.809),
    ("MIB", "not named", "not named", 85.3, 0.711, 0.798),
    # arXiv 2308.00264, with the context of each utterance, mean of three seeds.
    ("MMML", "RoBERTa-large, fine-tuned", "raw audio", None, 0.557, 0.882),
]


def label(name: str, rows: dict) -> list[str]:
    """A row in words, and under which name the paper has it."""
    row = rows[name]
    return [row.title, name if row.published else ""]


def results(runs: Runs, rows: dict) -> Table:
    lines = []
    for name, own in runs.items():
        values = {key: np.array([line[key] for line in own.values()]) for key in METRICS}
        low, high = interval(values["mae"])
        cells = [
            f"{v.mean():.3f} ± {v.std(ddof=1) if len(v) > 1 else 0:.3f}" for v in values.values()
        ]
        lines.append([*label(name, rows), str(len(own)), cells[0], bounds(low, high), *cells[1:]])
    return Table(
        ["row", "paper", "seeds", "MAE", "95 % interval", *list(METRICS.values())[1:]], lines
    )


def trained(own: dict[str, Any]) -> str:
    """What of the text encoder is trained, and how."""
    if own["text"] == "frozen":
        return "frozen"
    some = own["text"] == "top" and own["text_layers"]  # 0: all
    return f"{f'its top {some} layers' if some else 'all its layers'} trained in {own['precision']}"


def at_mean(runs: Runs, rows: dict) -> list[Block]:
    """The same trained models evaluated at the mean latent, where they were not trained; nothing if not measured."""
    lines = []
    for name, own in runs.items():
        found = {seed: line for seed, line in own.items() if "mae_at_mean" in line}
        if found:
            pairs = {seed: line | {"mae": line["mae_at_mean"]} for seed, line in found.items()}
            gap = difference(found, pairs, metric("mae"))
            cells = [f"{mean_over(found, metric(key)):.3f}" for key in ("mae_at_mean", "mae")]
            lines.append([name, rows[name].title, str(len(found)), *cells, gap.told()])
    head = [
        "row",
        "paper",
        "seeds",
        "MAE at the mean latent",
        "MAE of the mean prediction",
        "change",
    ]
    told = (
        "AME trains on noisy latents. The same models, evaluated at the mean latent, as this study once was, and by "
        "the mean of their predictions over draws of the noise."
    )
    return (
        [Heading("What the evaluation does"), Paragraph(told), Table(head, lines)] if lines else []
    )


def differences(runs: Runs, rows: dict, constant: float, reference: str) -> Table:
    lines = []
    for name, own in runs.items():
        falls = sum(collapsed(line, constant) for line in own.values())
        cells = []
        for key in ("mae", "corr", "acc2_nonzero"):
            gap = difference(own, runs[reference], metric(key))
            cells += [gap.told(), "–" if np.isnan(gap.p) else f"{gap.p:.3f}"]
        lines.append(
            [
                *label(name, rows),
                *(["–"] * 6 if name == reference else cells),
                f"{falls} of {len(own)}",
            ]
        )
    return Table(["row", "paper", "MAE", "p", "Corr", "p", "Acc-2", "p", "collapsed"], lines)


def beside(runs: Runs, rows: dict) -> Table:
    lines = []
    for name, row in rows.items():
        if row.published and name in runs:
            acc, f1, mae, corr = row.published
            ours = [
                mean_over(runs[name], metric(key))
                for key in ("acc2_nonzero", "f1_nonzero", "mae", "corr")
            ]
            cells = [
                f"{100 * ours[0]:.2f}",
                f"{100 * ours[1]:.2f}",
                f"{ours[2]:.4f}",
                f"{ours[3]:.4f}",
            ]
            lines.append(
                [*label(name, rows), f"{acc:.2f}", f"{f1:.2f}", f"{mae:.4f}", f"{corr:.4f}", *cells]
            )
    ours = [f"our {title}" for title in ("Acc-2", "F1", "MAE", "Corr")]
    return Table(["row", "paper", "paper Acc-2", "F1", "MAE", "Corr", *ours], lines)


def published(runs: Runs, encoder: str, singles: tuple[str, ...]) -> Table:
    lines = [
        [name, encoder, features, f"{acc:.2f}" if acc else "–", f"{mae:.3f}", f"{corr:.3f}"]
        for name, encoder, features, acc, mae, corr in PUBLISHED
    ]
    for name in (TEXT, BASELINE, FULL, LOSSES, DEFAULT):
        if name in runs:
            acc, mae, corr = (
                mean_over(runs[name], metric(key)) for key in ("acc2_nonzero", "mae", "corr")
            )
            cells = [f"{100 * acc:.2f}", f"{mae:.3f}", f"{corr:.3f}"]
            how = trained(next(iter(runs[name].values()))["settings"])
            lines.append([f"ours, {title(name)}", f"{encoder}, {how}", ", ".join(singles), *cells])
    return Table(["system", "text encoder", "other features", "Acc-2", "MAE", "Corr"], lines)


def gradients(runs: Runs, rows: dict) -> Table:
    balanced = {
        name: own for name, own in runs.items() if "norms" in next(iter(own.values()))["history"][0]
    }
    firsts = [next(iter(own.values()))["history"][0]["norms"] for own in balanced.values()]
    names = list(dict.fromkeys(name for norms in firsts for name in norms))
    keys = {
        "norms": "norm",
        "coherences": "coherence",
        "coefficients": "coefficient",
        "conflicts": "in conflict",
    }
    paths = [(key, name) for key in keys for name in names] + [("dominance",), ("dominance_after",)]
    head = [
        "row",
        "paper",
        *(f"{title}: {name}" for title in keys.values() for name in names),
        "dominance before",
        "after",
    ]
    lines = []
    for row, own in balanced.items():
        values = [
            mean_over(own, lambda line, path=path: over_epochs(line, *path)) for path in paths
        ]
        lines.append(
            [
                *label(row, rows),
                *("–" if np.isnan(value) else f"{value:.3g}" for value in values),
            ]
        )
    return Table(head, lines)


def potentials(runs: Runs) -> Table:
    lines = []
    for name, single in modalities(runs).items():
        three = (single, BASELINE, FULL)
        cells = [
            f"{mean_over(runs[row], probe(name)):.3f}" if row in runs else "–" for row in three
        ]
        gaps = [
            difference(runs[BASELINE], runs.get(other, {}), probe(name)).told()
            for other in (single, FULL)
        ]
        lines.append([name, *cells, *gaps])
    return Table(["encoder", "alone", title(BASELINE), title(FULL), "lost", "given back"], lines)
