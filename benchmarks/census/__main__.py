"""Try every optimizer that eight packages list: ``python -m benchmarks.census [NAME ...]``.

Each runs in a process of its own with a time limit, 40 steps on fixed gradients, plain and with one of two branches
slowed to half. ``pip install pytorch_optimizer timm heavyball schedulefree prodigyopt dadaptation torchao`` first.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # else each process imports it at its first step

from benchmarks.census.optimizers import PACKAGES, Make, listed
from benchmarks.census.report import table, versions
from benchmarks.census.run import Verdict, verdict

RESULTS = Path(__file__).parent / "results.md"


def _try(make: Make, pipe: Any) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        pipe.send(verdict(make))


def tried(make: Make, limit: float) -> Verdict:
    """The verdict of one optimizer, from a process of its own."""
    context = multiprocessing.get_context("fork")  # the packages take seconds to import
    mine, its = context.Pipe(duplex=False)
    process = context.Process(target=_try, args=(make, its))
    process.start()
    its.close()
    try:
        return (
            mine.recv()
            if mine.poll(limit)
            else Verdict("plain run fails", note=f"more than {limit:.0f} s")
        )
    except EOFError:
        return Verdict("plain run fails", note="the process died")
    finally:
        process.kill()
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "names", nargs="*", help="of packages or optimizers, as timm or timm/lamb; default: all"
    )
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for one optimizer")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="the table, written when all are tried"
    )
    arguments = parser.parse_args()
    rows: list[tuple[str, str, Verdict]] = []
    warnings.simplefilter("ignore")
    for package in PACKAGES:
        if arguments.names and not any(name.split("/")[0] == package for name in arguments.names):
            continue
        for name, make in listed(package):
            if not arguments.names or {package, f"{package}/{name}"} & set(arguments.names):
                found = tried(make, arguments.limit)
                rows.append((package, name, found))
                print(json.dumps([package, name, *found]), flush=True)
    report = table(rows)
    if not arguments.names:
        arguments.out.write_text(f"{report}\n{versions(PACKAGES)}")
    print(report.split("\n## ")[0])
    sys.exit(any(found.outcome == "SILENT" for *_, found in rows))


if __name__ == "__main__":
    main()
