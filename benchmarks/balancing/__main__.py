"""Does balancing help, and where? ``python -m benchmarks.balancing`` trains what is missing and writes the report.

Every run is one line of ``results/runs.jsonl``, written when it ends; stop it at any time and start it again. The
learning rate of a testbed and optimizer is the best without balancing, on validation and with a seed of its own, and
all rules share it; a rule with a knob has a few tries more. The rule was designed on other seeds than these.
"""

import argparse
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from benchmarks.balancing.grid import PARTS, measure
from benchmarks.balancing.report import write
from benchmarks.balancing.runs import Results

FOLDER = Path(__file__).parent

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument(
        "--report", action="store_true", help="only write the tables and the figures"
    )
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    kept = Results(FOLDER / "results" / "runs.jsonl", FOLDER / "results" / "landed.jsonl")
    if not arguments.report:
        context = get_context("spawn")
        with ProcessPoolExecutor(arguments.workers, context, torch.set_num_threads, (1,)) as pool:
            for part in PARTS:
                measure(kept, part, pool.map)
    write(kept, FOLDER)
