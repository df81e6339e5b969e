"""``python -m benchmarks.moments`` writes ``benchmarks/results/moments.*``."""

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch

from benchmarks._markdown import gpu_results
from benchmarks._timing import environment
from benchmarks.moments.measure import RIVALS, ROUNDS, accuracy, measure_size, sizes
from benchmarks.moments.report import JSON, plot, report

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    measured = {**environment("cpu"), "rounds": rounds, "sizes": {}, "accuracy": accuracy("cpu")}
    # A process for each size: a heap that another size has grown is faster, for what allocates most the most.
    with ProcessPoolExecutor(
        1, get_context("spawn"), torch.set_num_threads, (1,), max_tasks_per_child=1
    ) as pool:
        for name, (shape, dtype) in sizes("cpu").items():
            measured["sizes"][name] = pool.submit(
                measure_size, shape, "cpu", dtype, rounds
            ).result()
    shown = report(measured, gpu_results())
    JSON.write_text(json.dumps(measured, indent=1) + "\n")
    JSON.with_suffix(".md").write_text(shown)
    plot(measured, RIVALS[0], JSON.with_suffix(".png"))
    print(shown)
