"""``python -m benchmarks.mosi.ablation``: every row of the study times seeds, one JSON line a run, each run once.

Kill it anywhere and start it again: finished runs stay, the others are done. Seeds are the outer loop, so that the rows
have equally many at any time.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from benchmarks.mosi.noise import with_noise
from benchmarks.mosi.probe import diagnostics
from benchmarks.mosi.rows import config, study
from examples.mosi.config import PRESETS, Config
from examples.mosi.data import Dataset, load
from examples.mosi.text import prepare, text_of
from examples.mosi.train import train

RESULTS = Path(__file__).parent / "results"
MPNET = Path("~/.cache/gradbalance/encoders/all-mpnet-base-v2").expanduser()
STUDIES = {
    "default": {},  # the example as it comes
    "frozen": {
        "text": "frozen",
        "epochs": 6,
        "lr": 2e-3,
        "batch_size": 64,
        "max_norm": 0.0,
        "dropout": 0.3,
        "beta": 1.0,
    },
    "top": {
        "text": "top",
        "text_encoder": str(MPNET),
        "text_layers": 12,
        "text_lr": 3e-5,
        "epochs": 4,
        "dropout": 0.1,
        "precision": "bf16",
        "draws": 32,
    },
    "finetune": PRESETS["paper"],  # the paper's own settings and data, for a GPU
}


class Job(NamedTuple):
    row: str
    config: Config


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mosi.ablation", description=__doc__)
    parser.add_argument("--data", default="auto", help="as for python -m examples.mosi")
    parser.add_argument("--split", default="standard", choices=("standard", "poria"))
    parser.add_argument(
        "--text", default="frozen", choices=STUDIES, help="which study: see STUDIES in this file"
    )
    parser.add_argument(
        "--text-encoder", default=argparse.SUPPRESS, help="another encoder than that of the study"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--rows", nargs="+", default=[], help="names of rows, such as A0 A6; default: all"
    )
    parser.add_argument("--seeds", type=int, default=10, help="how many")
    parser.add_argument("--first-seed", type=int, default=0, help="the first of them")
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each")
    parser.add_argument(
        "--out", type=Path, help="where the lines are appended (default: in results)"
    )
    parser.add_argument(
        "--smoke", action="store_true", help="2 rows, 2 seeds, simulated data, nothing left behind"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.smoke:
        with tempfile.TemporaryDirectory() as folder:
            smoke(Path(folder) / "lines.jsonl", options.workers)
        return
    common = STUDIES[options.text] | {
        name: getattr(options, name) for name in ("data", "split", "device")
    }
    common |= {"text_encoder": options.text_encoder} if "text_encoder" in options else {}
    dataset = prepare(Config(**common))  # also fills the cache of states before any worker reads it
    print(dataset.corpus.banner)
    rows = study(tuple(dataset.widths))
    if unknown := set(options.rows) - rows.keys():
        raise SystemExit(
            f"`rows` must be among {list(rows)}. Got {sorted(unknown)}. Choose others."
        )
    names = options.rows or list(rows)
    jobs = [
        Job(name, config(rows[name], **common, seed=seed))
        for seed in range(options.first_seed, options.first_seed + options.seeds)
        for name in names
    ]
    name = f"{options.split}-{Path(jobs[0].config.text_encoder).name}-{options.text}.jsonl"
    out = options.out or RESULTS / name
    run(jobs, out, options.workers)
    print(f"{len(read(out))} lines in {out}; now: python -m benchmarks.mosi.report {out}")


def smoke(out: Path, workers: int) -> None:
    data = "simulated:8"
    rows = study(tuple(load(data).features))
    common = {"data": data, "epochs": 2, "text": "frozen"}
    jobs = [
        Job(name, config(rows[name], **common, seed=seed))
        for seed in (0, 1)
        for name in ("A0", "A6")
    ]
    run(jobs, out, workers)
    for line in read(out):
        print(
            f"{line['row']} seed {line['seed']}: {line['data']} data, MAE {line['mae']:.3f}, {line['seconds']:.1f} s"
        )


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
    # A worker that the system kills is an error here; a multiprocessing.Pool would wait for ever.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, begin) as pool:
        for done in as_completed([pool.submit(work, job) for job in jobs]):
            yield done.result()


def begin() -> None:
    """Sets up a worker: it has one thread, and ends with its parent even if that is killed."""
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


@cache
def dataset_of(data: str, split: str, noise: bool, *text: str | int) -> Dataset:
    own = Config(data=data, split=split, **dict(zip(TEXT, text, strict=True)))
    corpus = load(data, split)
    return Dataset(with_noise(corpus) if noise else corpus, *text_of(corpus, own))


TEXT = ("text", "text_encoder", "text_layers", "text_pool")  # what the data set depends on


def work(job: Job) -> dict[str, Any]:
    """One run as a line: test metrics, probes, and the balance of each epoch."""
    started = time.perf_counter(), time.process_time()
    own = job.config
    text = [getattr(own, name) for name in TEXT]
    result = train(
        own, dataset_of(own.data, own.split, "noise" in own.modalities, *text), also=diagnostics
    )
    history = [
        {"valid_mae": line["valid"]["mae"], "train_task": line["train"]["task"]}
        | line.get("balance", {})
        for line in result.pop("history")
    ]
    seconds = {
        "seconds": time.perf_counter() - started[0],
        "cpu_seconds": time.process_time() - started[1],
    }
    encoder = {name: getattr(own, name) for name in (*TEXT[:3], "precision")} | {
        "text_encoder": Path(own.text_encoder).name
    }
    line = {"row": job.row, "seed": own.seed} | encoder | result | seconds
    return short(line | {"history": history, "settings": settings(own)})


def settings(own: Config) -> dict[str, Any]:
    """All that a run depends on beside its seed, as it comes back from JSON; but not where data and encoder lie."""
    kept = {k: v for k, v in vars(own).items() if k not in ("data", "device", "seed")}
    return json.loads(json.dumps(kept | {"text_encoder": Path(own.text_encoder).name}))


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
        os.write(file, (json.dumps(line, separators=(",", ":")) + "\n").encode())
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
    return [
        json.loads(line)
        for line in path.read_bytes().splitlines(keepends=True)
        if line.endswith(b"\n")
    ]


if __name__ == "__main__":
    main()
