"""``python -m benchmarks.mosi.report``: a study as Markdown and as one HTML file, with figures and a verdict."""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.mosi.ablation import RESULTS, read
from benchmarks.mosi.compare import (
    BASELINE,
    FULL,
    Runs,
    bounds,
    by_row,
    collapsed,
    difference,
    interval,
    mean_over,
    metric,
    modalities,
    over_epochs,
    probe,
    verdict,
    whole_seeds,
)
from benchmarks.mosi.document import Block, Heading, Image, Paragraph, Table, markdown, page
from benchmarks.mosi.figures import draw
from benchmarks.mosi.rows import study
from examples.mosi.data import Corpus, load
from examples.mosi.run import write_text

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
]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mosi.report", description=__doc__)
    parser.add_argument("lines", type=Path, nargs="?", default=RESULTS / "standard.jsonl", help="those of the study")
    parser.add_argument("--data", default="auto", help="for the statistics of the data, where none are kept beside")
    options = parser.parse_args()
    lines = read(options.lines)
    if not lines:
        raise SystemExit(f"`lines` must hold runs. Got none in {options.lines}. Run python -m benchmarks.mosi.ablation")
    if BASELINE not in by_row(lines):
        raise SystemExit(
            f"`lines` must hold row {BASELINE}. Got none in {options.lines}. Run it too: --rows {BASELINE}"
        )
    if len(banners := {line["banner"] for line in lines}) > 1:
        raise SystemExit(f"`lines` must be of one data set and split. Got {sorted(banners)}. Give one study's file.")
    whole = whole_seeds(lines)
    if not whole:
        raise SystemExit(
            f"`lines` must hold a seed that every row has. Got none in {options.lines}. Let the study go on."
        )
    facts = statistics(options.lines.with_suffix(".data.json"), options.data, lines[0])
    blocks = report(whole, facts, options.lines)
    for suffix, text in ((".md", markdown(blocks)), (".html", page(blocks[0].text, blocks))):
        write_text(options.lines.with_suffix(suffix), text)
        print(options.lines.with_suffix(suffix))


def statistics(path: Path, data: str, line: dict[str, Any]) -> dict[str, Any]:
    """Of the data set of the lines: from the file beside them, or counted and kept there."""
    if not path.is_file():
        corpus = load(data, line["settings"]["split"])
        if corpus.banner != line["banner"]:
            raise SystemExit(f"`data` must be that of the lines: {line['banner']} Got {corpus.banner} Give its place.")
        write_text(path, json.dumps(counted(corpus), indent=1) + "\n")
    return json.loads(path.read_text(encoding="utf-8"))


def counted(corpus: Corpus) -> dict[str, Any]:
    mean = corpus.labels[corpus.split["train"]].mean()
    parts = {}
    for part, index in corpus.split.items():
        labels, words = corpus.labels[index], [len(corpus.words[i]) for i in index]
        parts[part] = {
            "utterances": len(index),
            "mean label": float(labels.mean()),
            "std": float(labels.std()),
            "negative": float((labels < 0).float().mean()),
            "zero": float((labels == 0).float().mean()),
            "positive": float((labels > 0).float().mean()),
            "words (median)": float(np.median(words)),
            "words (most)": max(words),
        }
    test = corpus.labels[corpus.split["test"]]
    features = {name: [feature.rows.shape[1], feature.per] for name, feature in corpus.features.items()}
    return {"parts": parts, "features": features, "constant_mae": float((test - mean).abs().mean())}


def report(lines: list[dict[str, Any]], facts: dict[str, Any], path: Path) -> list[Block]:
    found = by_row(lines)
    singles = tuple(facts["features"])
    rows = study(singles)
    runs = {name: found[name] for name in rows if name in found}
    images = draw(runs, lines[0]["data"], path.parent, path.stem)
    own = lines[0]["settings"]
    blocks: list[Block] = [
        Heading(f"The MOSI study, {lines[0]['data']} data, {own['split']} split", 1),
        Paragraph(f"**{lines[0]['banner']}**"),
        Paragraph(
            f"{len(lines)} runs: {len(runs)} rows of {len(runs[BASELINE])} seeds, {own['epochs']} epochs each, over a "
            f"{own['text']} `{own['text_encoder']}`. Tested is the epoch with the best validation MAE."
        ),
        Heading("Verdict"),
        *map(Paragraph, verdict(runs, facts["constant_mae"])),
        Heading("Results"),
        Paragraph("Mean ± standard deviation over the seeds, and the 95 % interval of the mean MAE."),
        results(runs, rows),
        Image(
            images["rows"], "Every seed (grey), mean and 95 % interval of each row; a modality alone may lie outside."
        ),
        Heading("Differences to the baseline, paired by seed"),
        Paragraph(
            f"Row minus {BASELINE} with the 95 % interval (Student) and Wilcoxon p. With n seeds "
            "no p is below 2 / 2^n. Collapsed: Corr below 0.3, or MAE above "
            f"{facts['constant_mae']:.3f}, that of the training mean."
        ),
        differences(runs, rows, facts["constant_mae"]),
        Heading("The paper's rows beside ours"),
        Paragraph("The paper's are one run each, with another encoder and other features: only the signs compare."),
        beside(runs, rows),
        Heading("Published results beside ours"),
        published(runs, lines[0]["settings"]["text_encoder"], singles),
        Heading("Gradients"),
        Paragraph(
            "Means over the epochs. Conflicts are those of the row's own rule: in rows with GM of the paper's (audio "
            "against timing or visual, by errors), in the others of the library's (A0 and its like only watch)."
        ),
        gradients(runs, rows),
        Image(images["norms"], "Gradient norm of each encoder, mean over an epoch."),
        Image(images["dominance"], "Largest norm over the mean of the others, median of an epoch."),
        Image(images["conflicts"], "Share of the steps in which a modality was in conflict with another."),
        Image(images["coefficients"], "Coefficients over all steps and seeds."),
        Heading("What joint training leaves of each encoder"),
        Paragraph(
            "MAE of a ridge on the frozen, pooled output of each encoder: trained alone, in the baseline, in the full "
            "model. Lost: baseline minus alone. Given back: baseline minus full. Paired by seed, with 95 % intervals."
        ),
        potentials(runs),
        Image(images["probes"], "The same as a figure: what each encoder lost to joint training."),
        Heading("Data"),
        Table(
            ["part", *next(iter(facts["parts"].values()))],
            [
                [part, *(f"{value:.3g}" if isinstance(value, float) else str(value) for value in values.values())]
                for part, values in facts["parts"].items()
            ],
        ),
        Paragraph(
            "Features: "
            + "; ".join(f"{n} {width} (one vector for each {per})" for n, (width, per) in facts["features"].items())
            + "."
        ),
    ]
    return blocks


def results(runs: Runs, rows: dict) -> Table:
    lines = []
    for name, own in runs.items():
        values = {key: np.array([line[key] for line in own.values()]) for key in METRICS}
        low, high = interval(values["mae"])
        cells = [f"{v.mean():.3f} ± {v.std(ddof=1) if len(v) > 1 else 0:.3f}" for v in values.values()]
        lines.append([name, rows[name].title, str(len(own)), cells[0], bounds(low, high), *cells[1:]])
    return Table(["row", "", "seeds", "MAE", "95 % interval", *list(METRICS.values())[1:]], lines)


def differences(runs: Runs, rows: dict, constant: float) -> Table:
    lines = []
    for name, own in runs.items():
        falls = sum(collapsed(line, constant) for line in own.values())
        cells = []
        for key in ("mae", "corr", "acc2_nonzero"):
            gap = difference(own, runs.get(BASELINE, {}), metric(key))
            cells += [gap.told(), f"{gap.p:.3f}"]
        lines.append([name, rows[name].title, *(["–"] * 6 if name == BASELINE else cells), f"{falls} of {len(own)}"])
    return Table(["row", "", "MAE", "p", "Corr", "p", "Acc-2", "p", "collapsed"], lines)


def beside(runs: Runs, rows: dict) -> Table:
    lines = []
    for name, row in rows.items():
        if row.published and name in runs:
            acc, f1, mae, corr = row.published
            ours = [mean_over(runs[name], metric(key)) for key in ("acc2_nonzero", "f1_nonzero", "mae", "corr")]
            cells = [f"{100 * ours[0]:.2f}", f"{100 * ours[1]:.2f}", f"{ours[2]:.4f}", f"{ours[3]:.4f}"]
            lines.append([name, row.title, f"{acc:.2f}", f"{f1:.2f}", f"{mae:.4f}", f"{corr:.4f}", *cells])
    ours = [f"our {title}" for title in ("Acc-2", "F1", "MAE", "Corr")]
    return Table(["row", "", "paper Acc-2", "F1", "MAE", "Corr", *ours], lines)


def published(runs: Runs, encoder: str, singles: tuple[str, ...]) -> Table:
    lines = [
        [name, encoder, features, f"{acc:.2f}", f"{mae:.3f}", f"{corr:.3f}"]
        for name, encoder, features, acc, mae, corr in PUBLISHED
    ]
    for name in (BASELINE, FULL):
        if name in runs:
            acc, mae, corr = (mean_over(runs[name], metric(key)) for key in ("acc2_nonzero", "mae", "corr"))
            cells = [f"{100 * acc:.2f}", f"{mae:.3f}", f"{corr:.3f}"]
            frozen = next(iter(runs[name].values()))["settings"]["text"]
            lines.append([f"ours, {name}", f"{encoder}, {frozen}", ", ".join(singles), *cells])
    return Table(["system", "text encoder", "other features", "Acc-2", "MAE", "Corr"], lines)


def gradients(runs: Runs, rows: dict) -> Table:
    balanced = {name: own for name, own in runs.items() if "norms" in next(iter(own.values()))["history"][0]}
    names = list(next(iter(next(iter(balanced.values())).values()))["history"][0]["norms"])
    keys = [("norms", "norm"), ("coefficients", "coefficient"), ("conflicts", "in conflict")]
    head = ["row", "", *(f"{title}: {name}" for _, title in keys for name in names), "dominance before", "after"]
    lines = []
    for row, own in balanced.items():
        values = [
            mean_over(own, lambda line, k=key, n=name: over_epochs(line, k, n)) for key, _ in keys for name in names
        ]
        values += [mean_over(own, lambda line, k=key: over_epochs(line, k)) for key in ("dominance", "dominance_after")]
        lines.append([row, rows[row].title, *(f"{value:.3g}" for value in values)])
    return Table(head, lines)


def potentials(runs: Runs) -> Table:
    lines = []
    for name, single in modalities(runs).items():
        cells = [f"{mean_over(runs[row], probe(name)):.3f}" for row in (single, BASELINE, FULL) if row in runs]
        for one, other in ((BASELINE, single), (BASELINE, FULL)):
            gap = difference(runs[one], runs.get(other, {}), probe(name))
            cells.append(gap.told())
        lines.append([name, *cells])
    return Table(["encoder", "alone", BASELINE, FULL, "lost", "given back"], lines)


if __name__ == "__main__":
    main()
