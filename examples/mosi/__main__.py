"""``python -m examples.mosi``: train, test, and leave a run folder; under torchrun on several processes."""

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from examples.mosi.config import Config, flags
from examples.mosi.run import stored_config
from examples.mosi.train import train


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.mosi", description=__doc__)
    parser.add_argument(
        "--out",
        type=Path,
        help="new folder of the run (default: runs/mosi-<balance>-<seed>-<time>)",
    )
    parser.add_argument(
        "--resume", type=Path, metavar="RUN", help="go on with the run in this folder"
    )
    flags(parser)
    given = vars(parser.parse_args())
    out, resume = given.pop("out"), given.pop("resume")
    try:
        config = settings(given, resume)
        if out and resume:
            raise ValueError(
                f"`out` must not be given with `resume`. Got {out}. The run goes on in {resume}."
            )
        out = (
            resume
            or out
            or Path(f"runs/mosi-{config.balance}-{config.seed}-{datetime.now():%Y%m%d-%H%M%S}")
        )
        if config.text == "frozen":
            torch.set_num_threads(1)  # steps of milliseconds, in which threads wait for each other
        with processes(config.device) as first:
            result = train(config, out=out, resume=resume is not None, bars=first)
        if first:
            print(table(result, config), f"Run folder: {out}", sep="\n")
    except KeyboardInterrupt:
        saved = out is not None and (out / "checkpoint.pt").is_file()
        again = (
            f"Go on with: python -m examples.mosi --resume {out}"
            if saved
            else "Nothing had been trained yet."
        )
        print(f"\nInterrupted. {again}", file=sys.stderr)
        return 130
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        parser.exit(2, f"error: {error}\n")
    return 0


def settings(given: dict, resume: Path | None) -> Config:
    if resume is None:
        return Config(**given)
    config = stored_config(resume)
    for name, value in given.items():
        value = tuple(value) if isinstance(value, list) else value
        if value != getattr(config, name) and name != "device":
            raise ValueError(
                f"`{name}` must be that of the run in {resume}: {getattr(config, name)!r}. Got {value!r}. "
                "Leave the flag out, or start a new run."
            )
    return Config(**vars(config) | given)


@contextmanager
def processes(device: str) -> Iterator[bool]:
    """Joins the processes of torchrun, if there are any; yields whether this is the one that writes."""
    if "LOCAL_RANK" not in os.environ:
        yield True
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield dist.get_rank() == 0
    finally:
        dist.destroy_process_group()


def table(result: dict[str, Any], config: Config) -> str:
    """The test metrics under the name of the data that they are from, and how the modalities were balanced."""
    names = [name for name, value in result.items() if isinstance(value, float)]
    records = [line["balance"] for line in result["history"] if "balance" in line]
    balance = config.balance if records else "none, with one modality"
    lines = [
        result["banner"],
        f"balance: {balance}; seed {config.seed}; epoch {result['best_epoch']} is the best of {len(result['history'])}",
        "  ".join(f"{name:>12}" for name in names),
        "  ".join(f"{result[name]:12.3f}" for name in names),
    ]
    if records:
        before, after = (
            sum(line[key] for line in records) / len(records)
            for key in ("dominance", "dominance_after")
        )
        lines.append(
            f"dominance of the largest gradient norm: {before:.2f} before, {after:.2f} after balancing"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
