"""How long does ``import gradbalance`` take beside ``import torch``?

Run ``python -m benchmarks.import_time [runs]``. Each run is a fresh process that times first one import, then the
other, so that whatever else the machine does weighs on both.
"""

import statistics
import subprocess
import sys

TIMED = """
from time import perf_counter
start = perf_counter()
import torch
middle = perf_counter()
import gradbalance
print(middle - start, perf_counter() - middle)
"""


def main(runs: int = 30) -> None:
    pairs = []
    for _ in range(runs + 1):
        done = subprocess.run(
            [sys.executable, "-c", TIMED], capture_output=True, text=True, check=True
        )
        torch, ours = map(float, done.stdout.split())
        pairs.append((torch, ours))
    del pairs[0]  # it fills the caches of the file system
    torch, ours = (statistics.median(times) for times in zip(*pairs, strict=True))
    low, ratio, high = statistics.quantiles([(torch + ours) / torch for torch, ours in pairs])
    print(
        f"import torch: {torch:.3f} s, then import gradbalance: {1000 * ours:.1f} ms (medians of {runs} runs)"
    )
    print(f"both over torch alone: {ratio:.4f} (quartiles {low:.4f} to {high:.4f})")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
