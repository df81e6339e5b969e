"""``python -m benchmarks.gpu`` measures all that needs a GPU, in about ten minutes.

Each part runs in a process of its own and writes ``PART.json`` in the folder as it ends. A part that fails, dies or takes too
long leaves its error there, and the others go on. The Triton kernels, which may leave a GPU unusable, come last.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from time import monotonic

from benchmarks._markdown import GPU, gpu_results

# What each is expected to take; it is stopped after twice as long.
SECONDS = {
    "environment": 30,
    "loop small": 60,
    "loop 100M": 90,
    "loop LoRA": 60,
    "host_synchronisations": 30,
    "launches": 30,
    "host_time": 60,
    "operations": 60,
    "moments": 90,
    "steps": 90,
    "compiled": 90,
    "triton": 60,
}
ON_A_GPU = ("host_synchronisations", "launches")  # what a CPU has none of
FAULT = "fault"  # a part that dies, to see that the others go on


def run(part: str, out: Path, seconds: float, options: list[str]) -> str | None:
    """Run one part; the error that it left, or None."""
    path = out / f"{part}.json"
    path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu.parts", part, str(path), *options]
    try:
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        error = f"took longer than {seconds:.0f} s"
    else:
        if path.exists():
            return json.loads(path.read_text()).get("error")
        lines = done.stderr.strip().splitlines() or ["nothing was said"]
        error = f"died with exit code {done.returncode}: {lines[-1]}"
    path.write_text(json.dumps({"error": error}) + "\n")
    return error


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"measure these: {', '.join(SECONDS)}")
    parser.add_argument("--out", type=Path, default=GPU, help="the folder; default %(default)s")
    parser.add_argument("--minutes", type=float, default=10, help="for all; default %(default)s")
    parser.add_argument(
        "--smoke", action="store_true", help="in miniature on the CPU, with one part that dies"
    )
    arguments = parser.parse_args()
    known = list(SECONDS)
    if arguments.smoke:
        known = [part for part in known if part not in ON_A_GPU]
        known.insert(1, FAULT)
        if arguments.out == GPU:
            parser.error("--smoke must have a folder of its own. Got none. Give it by --out.")
    unknown = [part for part in arguments.parts if part not in known]
    if unknown:
        parser.error(f"`parts` must be among {', '.join(known)}. Got {', '.join(unknown)}.")
    if not arguments.smoke:
        import torch

        if not torch.cuda.is_available():
            sys.exit(
                "benchmarks.gpu must run where torch sees a CUDA device. Got none. Run it on a machine with a GPU, or "
                "with --smoke."
            )
    arguments.out.mkdir(parents=True, exist_ok=True)
    chosen = [part for part in known if part in (arguments.parts or known)]
    options = ["--smoke"] if arguments.smoke else []
    end = monotonic() + 60 * arguments.minutes
    for part in chosen:
        start = monotonic()
        seconds = max(1.0, min(2 * SECONDS.get(part, 60), end - start))
        if arguments.smoke:
            seconds = 600.0  # however busy the machine is
        error = run(part, arguments.out, seconds, options)
        ended = error or "measured"
        print(f"{part}: {ended} ({monotonic() - start:.0f} s)", file=sys.stderr, flush=True)
    if arguments.out == GPU:
        from benchmarks.moments import report as moments
        from benchmarks.overhead import report as overhead

        for path, report in (
            (moments.JSON, moments.report),
            (overhead.JSON, overhead.report),
        ):
            shown = report(json.loads(path.read_text()), gpu_results())
            path.with_suffix(".md").write_text(shown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
