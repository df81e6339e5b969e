"""``python -m examples.mosi``: train, test, and leave a run folder; under torchrun on several processes."""

import argparse
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from examples.mosi.config import PRESETS, Config, flags, read_settings

# torch and what needs it are imported in the functions, after the first line is on the screen.


def main() -> int:
    given, options = parse()
    first, out = os.environ.get("RANK", "0") == "0", options.resume or options.out
    try:
        config, seeds = settings(given, options)
        kind = "seeds" if seeds else config.seed
        out = out or Path(f"runs/mosi-{config.balance}-{kind}-{datetime.now():%Y%m%d-%H%M%S-%f}")
        if first:
            print(f"{opening(config, seeds, options.threads)}\nTo {out}. Loading ...", flush=True)
        with processes(config, options.threads):
            results = list(runs(config, out, seeds, options, bars=first))
        if first:
            print(summary(results, seeds, out) if seeds else table(results[0], config))
            print(after(out, seeds))
    except KeyboardInterrupt:
        print(f"\nInterrupted. {again(out)}", file=sys.stderr)
        return 130
    except (ValueError, FloatingPointError, FileNotFoundError) as error:
        return refuse(str(error))
    except OSError as error:  # a disk that is full
        return refuse(f"{error} {again(out)}")
    except ModuleNotFoundError as error:
        return refuse(f'{error}. Install what the example needs: pip install -e ".[mosi]"')
    return 0


def parse(arguments: list[str] | None = None) -> tuple[dict[str, Any], argparse.Namespace]:
    """The settings that are given as flags, and the other options."""
    parser = argparse.ArgumentParser(prog="python -m examples.mosi", description=__doc__)
    add = parser.add_argument
    add(
        "--out",
        type=Path,
        help="new folder of the run (default: runs/mosi-<balance>-<seed>-<time>)",
    )
    add("--resume", type=Path, metavar="RUN", help="go on with the run, or seeds, in this folder")
    add("--seeds", type=int, nargs="+", metavar="SEED", help="a run of each, and a table of all")
    add("--config", type=Path, metavar="FILE", help="settings, such as the config.json of a run")
    add("--preset", choices=PRESETS, help="the paper's own settings; needs its data, mosi.pkl")
    add("--threads", type=int, default=1, help="of the CPU, in each process (default: 1)")
    add("--keep-checkpoint", action="store_true", help="keep it when the run is finished")
    add("--log", action="store_true", help="write to TensorBoard too, in the folder of the run")
    own = [action.dest for action in parser._actions if action.dest != "help"]
    flags(parser)
    given = vars(parser.parse_args(arguments))
    return given, argparse.Namespace(**{name: given.pop(name) for name in own})


def refuse(message: str) -> int:
    print("error:", " ".join(message.split()), file=sys.stderr)
    return 2


def again(out: Path | None) -> str:
    saved = out is not None and any(out.glob("**/checkpoint.pt"))
    if saved:
        return f"Go on with: python -m examples.mosi --resume {out}"
    return "Nothing had been trained yet."


def settings(given: dict[str, Any], options: argparse.Namespace) -> tuple[Config, list[int]]:
    """The configuration, from flags over a file over a preset, or that of the run that goes on; and the seeds."""
    if options.threads < 1:
        raise ValueError(f"`threads` must be at least 1. Got {options.threads}. Leave it out.")
    if options.resume is None:
        base = PRESETS[options.preset] if options.preset else {}
        stored = read_settings(options.config)[0] if options.config else {}
        seeds = list(dict.fromkeys(options.seeds or ()))
        if seeds and "seed" in given:
            raise ValueError(
                f"`seed` must not be given with `seeds`. Got {given['seed']}. Name it there."
            )
        own = base | stored | given
        configs = [Config(**own | {"seed": seed}) for seed in seeds]  # each is checked
        return (configs or [Config(**own)])[0], seeds
    for name in ("out", "seeds", "config", "preset"):
        if getattr(options, name):
            raise ValueError(
                f"`{name}` must not be given with `resume`. Got {getattr(options, name)}. "
                f"The run goes on in {options.resume}."
            )
    from examples.mosi.run import stored_config

    config, record = stored_config(options.resume)
    for name, value in given.items():
        value = tuple(value) if isinstance(value, list) else value
        if value != getattr(config, name) and name != "device":
            raise ValueError(
                f"`{name}` must be that of the run in {options.resume}: {getattr(config, name)!r}. Got {value!r}. "
                "Leave the flag out, or start a new run."
            )
    return Config(**vars(config) | given), record.get("seeds", [])


def opening(config: Config, seeds: list[int], threads: int) -> str:
    named = f"seeds {' '.join(map(str, seeds))}" if seeds else f"seed {config.seed}"
    return (
        f"Multimodal sentiment: text {config.text_encoder} ({config.text}), balance {config.balance}, {named}, "
        f"{config.device}, {threads} thread{'s' * (threads > 1)}."
    )


@contextmanager
def processes(config: Config, threads: int) -> Iterator[None]:
    """Sets the threads, and joins the processes of torchrun, if there are any."""
    import torch

    from examples.mosi.train import device_of

    # More than one wait for each other as soon as anything else runs on the machine.
    torch.set_num_threads(threads)
    if "LOCAL_RANK" not in os.environ:
        yield
        return
    cuda = device_of(config).type == "cuda"
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if cuda else "gloo")
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def runs(
    config: Config, out: Path, seeds: list[int], options: argparse.Namespace, *, bars: bool
) -> Iterator[dict[str, Any]]:
    """The result of the run, or of one in a folder of its own for each seed, finished ones left as they are."""
    from dataclasses import replace

    from examples.mosi import run
    from examples.mosi.train import prepare_once, train

    def one(config: Config, out: Path, resume: bool, dataset: Any = None) -> dict[str, Any]:
        log = out / "tensorboard" if options.log else None
        keep = {"keep_checkpoint": options.keep_checkpoint}
        return train(config, dataset, out=out, resume=resume, bars=bars, log=log, **keep)

    if not seeds:
        yield one(config, out, options.resume is not None)
        return
    if bars:
        run.check_free(out, options.resume is not None)
    dataset = prepare_once(config)
    if bars and not options.resume:
        run.start(out, config, {"seeds": seeds})
    for seed in seeds:
        folder = out / f"seed-{seed}"
        resume = run.is_run(folder)
        if bars:
            if not resume:  # killed before its first checkpoint
                (folder / "config.json").unlink(missing_ok=True)
            print(f"Seed {seed}", flush=True)
        yield one(replace(config, seed=seed), folder, resume, dataset)


def table(result: dict[str, Any], config: Config) -> str:
    """The test metrics under the name of the data that they are from, and how the modalities were balanced."""
    from examples.mosi.metrics import MMSA

    names = [name for name, value in result.items() if isinstance(value, float)]
    records = [line["balance"] for line in result["history"] if "balance" in line]
    balance = config.balance if records else "none, with one modality"
    lines = [
        result["banner"],
        f"balance: {balance}; seed {config.seed}; epoch {result['best_epoch']} is the best of {len(result['history'])}",
        "".join(f"{name:>15}" for name in names),
        "".join(f"{MMSA[name]:>15}" for name in names) + "  (its name in MMSA)",
        "".join(f"{result[name]:15.3f}" for name in names),
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


def summary(results: list[dict[str, Any]], seeds: list[int], out: Path) -> str:
    """The test metrics of each seed, with their mean and standard deviation; in seeds.csv too."""
    from statistics import mean, stdev

    from examples.mosi.run import write_text

    names = [name for name, value in results[0].items() if isinstance(value, float)]
    rows = {str(seed): [r[name] for name in names] for seed, r in zip(seeds, results, strict=True)}
    columns = list(zip(*rows.values(), strict=True))
    rows["mean"] = [mean(column) for column in columns]
    rows["std"] = [stdev(column) if len(column) > 1 else 0.0 for column in columns]
    lines = [",".join(["seed", *names])]
    lines += [",".join([head, *map(repr, row)]) for head, row in rows.items()]
    write_text(out / "seeds.csv", "\n".join(lines) + "\n")
    shown = [
        results[0]["banner"],
        f"{'seed':6}" + "".join(f"{name:>15}" for name in names),
        *(f"{seed:<6}" + "".join(f"{x:15.3f}" for x in rows[str(seed)]) for seed in seeds),
        f"{'mean':6}"
        + "".join(
            f"{f'{m:.3f} ± {s:.3f}':>15}" for m, s in zip(rows["mean"], rows["std"], strict=True)
        ),
    ]
    return "\n".join(shown)


def after(out: Path, seeds: list[int]) -> str:
    one = out / f"seed-{seeds[0]}" if seeds else out
    return (
        f"\nRun folder: {out}{f' (table: {out}/seeds.csv)' if seeds else ''}\n"
        f"Figure:     {one}/trajectory.png\n"
        f'Predict:    python -m examples.mosi.predict {one} --text "a film that I enjoyed"\n'
        f"Compare:    the same with --balance off, or over --seeds 0 1 2; the study: benchmarks/mosi"
    )


if __name__ == "__main__":
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    sys.exit(main())
