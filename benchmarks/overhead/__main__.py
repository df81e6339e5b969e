"""``python -m benchmarks.overhead`` writes ``benchmarks/results/overhead.*``."""

import argparse
import json

import torch

from benchmarks._markdown import gpu_results
from benchmarks._timing import environment
from benchmarks.overhead.measure import measurements
from benchmarks.overhead.report import JSON, plot, report

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "parts", nargs="*", help=f"measure these again: {', '.join(measurements())}; default all"
    )
    parser.add_argument(
        "--quick", action="store_true", help="small sizes, few rounds, nothing written"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    calls = measurements("cpu", arguments.quick)
    measured = {
        "environment": environment("cpu"),
        **{part: calls[part]() for part in arguments.parts or calls},
    }
    if arguments.parts:
        measured = {**json.loads(JSON.read_text()), **measured}
    shown = report(measured, gpu_results())
    if not arguments.quick:
        JSON.write_text(json.dumps(measured, indent=1) + "\n")
        JSON.with_suffix(".md").write_text(shown)
        plot(measured, JSON.with_suffix(".png"))
    print(shown)
