"""``python -m examples.mosi.ablation``: every row of the study times seeds, one JSON line a run, each run once.

Kill it anywhere and start it again: finished runs stay, the others are done. Seeds are the outer loop, so that the rows
have equally many at any time.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from examples.mosi.config import Config
from examples.mosi.data import Dataset, load
from examples.mosi.rows import config, study
from examples.mosi.search import search
from examples.mosi.text import prepare
from examples.mosi.train import train

RESULTS = Path(__file__).parent / "results"
STUDY = {"epochs": 6, "lr": 2e-3}  # shorter and steeper than a single run, to afford the seeds


class Job(NamedTuple):
    row: str
    config: Config


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.mosi.ablation", description=__doc__)
    parser.add_argument("--data", default="auto", help="as for python -m examples.mosi")
    parser.add_argument("--split", default="standard", choices=("standard", "poria"))
    parser.add_argument("--text", default="frozen", choices=("frozen", "finetune"))
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--rows", nargs="+", default=[], help="names of rows, such as A0 A6; default: all")
    parser.add_argument("--seeds", type=int, default=10, help="seeds 0 to this, this left out")
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--out", type=Path, help="where the lines are appended (default: results/<split>.jsonl)")
    parser.add_argument("--settings", type=Path, default=RESULTS / "search.json", help="the record of --search")
    parser.add_argument("--search", type=int, metavar="TRIALS", help="tune baseline and full model, then end")
    parser.add_argument("--smoke", action="store_true", help="2 rows, 2 seeds, simulated data, nothing left behind")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.smoke:
        with tempfile.TemporaryDirectory() as folder:
            smoke(Path(folder) / "lines.jsonl", options.workers)
        return
    common = {name: getattr(options, name) for name in ("data", "split", "text", "device")}
    dataset = prepare(Config(**common))  # also fills the cache of states before any worker reads it
    print(dataset.corpus.banner)
    rows = study(tuple(dataset.widths))
    if options.search:
        search(rows, partial(train, dataset=dataset), options.settings, options.search, common)
        return
    if unknown := set(options.rows) - rows.keys():
        raise SystemExit(f"`rows` must be among {list(rows)}. Got {sorted(unknown)}. Choose others.")
    tuned = json.loads(options.settings.read_text())["best"] if options.settings.is_file() else {}
    names = options.rows or list(rows)
    jobs = [
        Job(name, config(rows[name], tuned, **STUDY, **common, seed=seed))
        for seed in range(options.seeds)
        for name in names
    ]
    out = options.out or RESULTS / f"{options.split}.jsonl"
    run(jobs, out, options.workers)
    print(f"{len(read(out))} lines in {out}; now: python -m examples.mosi.report {out}")


def smoke(out: Path, workers: int) -> None:
    data = "simulated:8"
    rows = study(tuple(load(data).features))
    common = {"data": data, "epochs": 2}
    jobs = [Job(name, config(rows[name], {}, **common, seed=seed)) for seed in (0, 1) for name in ("A0", "A6")]
    run(jobs, out, workers)
    for line in read(out):
        print(f"{line['row']} seed {line['seed']}: {line['data']} data, MAE {line['mae']:.3f}, {line['seconds']:.1f} s")


def run(jobs: list[Job], out: Path, workers: int) -> None:
    """Does the jobs that `out` does not hold yet; a line is appended when its run is done."""
    repair(out)
    done = {(line["row"], line["seed"]): line["settings"] for line in read(out)}
    for job in jobs:
        if done.get((job.row, job.config.seed), settings(job.config)) != settings(job.config):
            raise SystemExit(
                f"`out` must hold runs of the same settings. Got other ones of row {job.row}, seed {job.config.seed}, "
                f"in {out}. Give another file."
            )
    waiting = [job for job in jobs if (job.row, job.config.seed) not in done]
    with tqdm(total=len(jobs), initial=len(jobs) - len(waiting), desc="runs", unit="run") as bar:
        for line in finished(waiting, workers):
            append(out, line)
            bar.set_postfix_str(f"{line['row']} seed {line['seed']}: MAE {line['mae']:.3f}")
            bar.update()


def finished(jobs: list[Job], workers: int) -> Iterator[dict[str, Any]]:
    if workers == 1:
        yield from map(work, jobs)
        return
    with multiprocessing.get_context("spawn").Pool(workers, torch.set_num_threads, (1,)) as pool:
        yield from pool.imap_unordered(work, jobs)


@cache
def dataset_of(data: str, split: str, text: str, encoder: str) -> Dataset:
    return prepare(Config(data=data, split=split, text=text, text_encoder=encoder))


def work(job: Job) -> dict[str, Any]:
    """One run as a line: test metrics, probes, and the balance of each epoch."""
    started = time.perf_counter(), time.process_time()
    own = job.config
    result = train(own, dataset_of(own.data, own.split, own.text, own.text_encoder), probe=True)
    history = [
        {"valid_mae": line["valid"]["mae"], "train_task": line["train"]["task"]} | line.get("balance", {})
        for line in result.pop("history")
    ]
    seconds = {"seconds": time.perf_counter() - started[0], "cpu_seconds": time.process_time() - started[1]}
    line = {"row": job.row, "seed": own.seed} | result | seconds | {"history": history, "settings": settings(own)}
    return short(line)


def settings(own: Config) -> dict[str, Any]:
    """All that a run depends on beside its seed, as it comes back from JSON; where the data lies is no part of it."""
    return json.loads(json.dumps({k: v for k, v in vars(own).items() if k not in ("data", "device", "seed")}))


def short(value: Any) -> Any:
    """Five digits are enough for a report, and halve the file."""
    if isinstance(value, dict):
        return {key: short(inner) for key, inner in value.items() if key != "settings"} | (
            {"settings": value["settings"]} if "settings" in value else {}
        )
    if isinstance(value, list):
        return [short(inner) for inner in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def append(path: Path, line: dict[str, Any]) -> None:
    """One write of a whole line: a kill leaves the file with or without it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(file, (json.dumps(line) + "\n").encode())
        os.fsync(file)
    finally:
        os.close(file)


def repair(path: Path) -> None:
    """Drops the half line that a full disk or a power cut can leave: its run is done again."""
    if path.exists():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(path, whole)


def read(path: Path) -> list[dict[str, Any]]:
    """The whole lines; one that is being written is left out."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


if __name__ == "__main__":
    main()
