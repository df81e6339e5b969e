"""``python -m examples.mosi.ablation``: rows of settings times seeds, one JSON line a run, and a table of them."""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from examples.mosi.config import Config
from examples.mosi.text import prepare
from examples.mosi.train import train

ROWS: dict[str, dict[str, Any]] = {
    "text only": {"modalities": ("text",)},
    "balance off": {"balance": "off"},
    "balance norms": {"balance": "norms"},
    "balance errors": {"balance": "errors"},
    "balance paper": {"balance": "paper"},
}
COLUMNS = {
    "mae": "MAE",
    "corr": "Corr",
    "acc2_nonneg": "Acc-2 (≥ 0)",
    "acc2_nonzero": "Acc-2 (± only)",
    "acc7": "Acc-7",
    "dominance": "dominance before",
    "dominance_after": "after",
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.mosi.ablation", description=__doc__)
    parser.add_argument("--data", default="auto", help="as for python -m examples.mosi")
    parser.add_argument("--split", default="standard", choices=("standard", "poria"))
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 to this, this left out")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation.jsonl"), help="where the lines are appended")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dataset = prepare(Config(data=options.data, split=options.split))
    print(dataset.corpus.banner)
    done = {(line["row"], line["seed"]) for line in read(options.out)}
    jobs = [(row, seed) for seed in range(options.seeds) for row in ROWS if (row, seed) not in done]
    for row, seed in tqdm(jobs, desc="runs"):
        config = Config(data=options.data, split=options.split, seed=seed, **ROWS[row])
        started = time.perf_counter()
        result = outcome(train(config, dataset))
        append(options.out, {"row": row, "seed": seed, "seconds": time.perf_counter() - started} | result)
    print(table(read(options.out)))


def outcome(result: dict[str, Any]) -> dict[str, Any]:
    """The test metrics of a run, and how far one modality dominated on average over the epochs."""
    records = [line["balance"] for line in result["history"] if "balance" in line]
    values = {name: value for name, value in result.items() if name not in ("history", "banner")}
    for name in ("dominance", "dominance_after"):
        values |= {name: float(np.mean([record[name] for record in records]))} if records else {}
    return values | {"epochs": len(result["history"])}


def append(path: Path, line: dict[str, Any]) -> None:
    """One write of a whole line: a kill leaves the file with or without it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(file, (json.dumps(line) + "\n").encode())
    finally:
        os.close(file)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown: mean ± standard deviation over the seeds of each row, under the name of the data."""
    sources = sorted({line["data"] for line in lines})
    rows = [
        f"| {' and '.join(sources)} data | seeds | {' | '.join(COLUMNS.values())} |",
        "|---" * (len(COLUMNS) + 2) + "|",
    ]
    for row in dict.fromkeys(line["row"] for line in lines):
        runs = [line for line in lines if line["row"] == row]
        cells = [cell([run[name] for run in runs if name in run]) for name in COLUMNS]
        rows.append(f"| {row} | {len(runs)} | {' | '.join(cells)} |")
    return "\n".join(rows)


def cell(values: list[float]) -> str:
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=min(1, len(values) - 1)):.3f}" if values else "–"


if __name__ == "__main__":
    main()
