"""``python -m benchmarks.mosi.report``: a study as Markdown, with a figure and a verdict."""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.mosi.ablation import RESULTS, read
from benchmarks.mosi.compare import BASELINE, TEXT, by_row, verdict
from benchmarks.mosi.document import Block, Heading, Image, Paragraph, Table, markdown
from benchmarks.mosi.figures import draw
from benchmarks.mosi.rows import study
from benchmarks.mosi.tables import (
    at_mean,
    beside,
    differences,
    gradients,
    potentials,
    published,
    results,
    trained,
)
from examples.mosi.data import Corpus, load
from examples.mosi.run import write_text

DEFAULT = RESULTS / "standard-all-mpnet-base-v2-top.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mosi.report", description=__doc__)
    parser.add_argument("lines", type=Path, nargs="?", default=DEFAULT, help="those of the study")
    parser.add_argument(
        "--data", default="auto", help="for the statistics of the data, where none are kept beside"
    )
    options = parser.parse_args()
    lines = read(options.lines)
    if not lines:
        raise SystemExit(
            f"`lines` must hold runs. Got none in {options.lines}. Run python -m benchmarks.mosi.ablation"
        )
    if len(banners := {line["banner"] for line in lines}) > 1:
        raise SystemExit(
            f"`lines` must be of one data set and split. Got {sorted(banners)}. Give one study's file."
        )
    facts = statistics(options.lines.with_suffix(".data.json"), options.data, lines[0])
    blocks = report(lines, facts, options.lines)
    write_text(options.lines.with_suffix(".md"), markdown(blocks))
    print(options.lines.with_suffix(".md"))


def statistics(path: Path, data: str, line: dict[str, Any]) -> dict[str, Any]:
    """Of the data set of the lines: from the file beside them, or counted and kept there."""
    if not path.is_file():
        corpus = load(data, line["settings"]["split"])
        if corpus.banner != line["banner"]:
            raise SystemExit(
                f"`data` must be that of the lines: {line['banner']} Got {corpus.banner} Give its place."
            )
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
    features = {
        name: [feature.rows.shape[1], feature.per] for name, feature in corpus.features.items()
    }
    return {"parts": parts, "features": features, "constant_mae": float((test - mean).abs().mean())}


def report(lines: list[dict[str, Any]], facts: dict[str, Any], path: Path) -> list[Block]:
    found = by_row(lines)
    singles = tuple(facts["features"])
    rows = study(singles)
    runs = {name: found[name] for name in rows if name in found}
    image = path.with_name(f"{path.stem}-rows.png")
    draw(runs, singles, lines[0]["data"], image)
    own = lines[0]["settings"]
    blocks: list[Block] = [
        Heading(f"The MOSI study, {lines[0]['data']} data, {own['split']} split", 1),
        Paragraph(f"**{lines[0]['banner']}**"),
        Paragraph(
            f"{len(lines)} runs: {len(runs)} rows of up to {max(map(len, runs.values()))} seeds, {own['epochs']} "
            f"epochs each, over `{own['text_encoder']}`, {trained(own)}; "
            f"{np.median([line['cpu_seconds'] for line in lines]):.0f} s of one core a run (median). Tested is the "
            f"epoch with the best validation MAE, by the mean prediction over {own['draws']} draws of the latent noise."
        ),
        Heading("Verdict"),
        *map(Paragraph, verdict(runs, facts["constant_mae"])),
        Heading("Results"),
        Paragraph(
            "Mean ± standard deviation over the seeds, and the 95 % interval of the mean MAE."
        ),
        results(runs, rows),
        Image(
            image,
            "Every seed (grey), mean and 95 % interval of each row; a modality alone may lie outside.",
        ),
        *(
            block
            for reference, title in ((BASELINE, "the baseline"), (TEXT, "text alone"))
            if reference in runs
            for block in (
                Heading(f"Differences to {title}, paired by seed"),
                Paragraph(
                    f"Row minus {title} over the seeds that both have, with the 95 % interval (Student) and "
                    "Wilcoxon p. With n seeds no p is below 2 / 2^n. Collapsed: Corr below 0.3, or MAE above "
                    f"{facts['constant_mae']:.3f}, that of the training mean."
                ),
                differences(runs, rows, facts["constant_mae"], reference),
            )
        ),
        *at_mean(runs, rows),
        Heading("The paper's rows beside ours"),
        Paragraph(
            "The paper's are one run each, with another encoder and other features: only the signs compare."
        ),
        beside(runs, rows),
        Heading("Published results beside ours"),
        published(runs, lines[0]["settings"]["text_encoder"], singles),
        Heading("Gradients"),
        Paragraph(
            "Means over the epochs. Conflicts are those of the row's own rule: in rows with GM of the paper's (audio "
            "against timing or visual, by errors), in the others of the library's (rows without balancing only watch)."
        ),
        gradients(runs, rows),
        Heading("What joint training leaves of each encoder"),
        Paragraph(
            "MAE of a ridge on the frozen, pooled output of each encoder: trained alone, in the baseline, in the full "
            "model. Lost: baseline minus alone. Given back: baseline minus full. Paired by seed, with 95 % intervals."
        ),
        potentials(runs),
        Heading("Data"),
        Table(
            ["part", *next(iter(facts["parts"].values()))],
            [
                [
                    part,
                    *(
                        f"{value:.3g}" if isinstance(value, float) else str(value)
                        for value in values.values()
                    ),
                ]
                for part, values in facts["parts"].items()
            ],
        ),
        Paragraph(
            "Features: "
            + "; ".join(
                f"{n} {width} (one vector for each {per})"
                for n, (width, per) in facts["features"].items()
            )
            + "."
        ),
    ]
    return blocks


if __name__ == "__main__":
    main()
