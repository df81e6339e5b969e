"""Training: one process or several, resumable bit for bit after any kill."""

import math
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from examples.mosi import run
from examples.mosi.build import build, optimizer_of, ramp
from examples.mosi.config import Config
from examples.mosi.data import Batch, Dataset, check_present
from examples.mosi.draw import Draw
from examples.mosi.losses import losses
from examples.mosi.metrics import metrics
from examples.mosi.model import Model
from examples.mosi.text import prepare
from gradbalance import ConflictAwarePenalty, Recorder


def train(
    config: Config,
    dataset: Dataset | None = None,
    *,
    out: Path | None = None,
    resume: bool = False,
    bars: bool = False,
    keep_checkpoint: bool = False,
    log: Any = None,
    also: Callable[[Model, Dataset, list[str]], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Trains, and returns the test metrics of the epoch with the best validation MAE.

    Args:
        config: All settings.
        dataset: Shared by runs of one process; otherwise prepared from the configuration.
        out: The run folder; without it nothing is written.
        resume: Go on from the checkpoint in `out`: the result is bitwise that of the uninterrupted run. A finished run
            without a checkpoint returns what it has stored.
        bars: Show progress.
        keep_checkpoint: Keep what a resume needs when the run is finished; model.pt holds what a prediction needs.
        log: Where losses, validation metrics and the balance of each step go: the folder of a SummaryWriter as a Path,
            a SummaryWriter, or a function of a dict.
        also: What to add to the result, from the tested model, the data and the names of the non-text modalities.
    """
    rank, world = ranks()
    device = device_of(config)
    writes = out is not None and rank == 0
    if resume and (result := run.finished(out, config)):
        return result
    if writes:
        run.check_free(out, resume)
    if isinstance(log, Path):
        import_module("torch.utils.tensorboard")  # before any work, where it is not installed
    dataset = prepare_once(config) if dataset is None else dataset
    names = config.others(dataset.widths)
    corpus = dataset.corpus
    check_present(corpus, names)
    record = run.record_of(config, corpus) if out else {}

    torch.manual_seed(config.seed)
    draw, noise = Draw(device), torch.Generator(device)
    model = build(config, dataset, names, draw).to(device)
    network = DistributedDataParallel(model) if world > 1 else model
    size = config.batch_size * world
    steps = -(-len(corpus.split["train"]) // size)
    optimizer = optimizer_of(model, config, steps, noise)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, partial(ramp, config=config, total=steps * config.epochs)
    )
    state: dict[str, Any] = {"epoch": 0, "best_epoch": -1, "best_mae": float("inf"), "history": []}

    if resume:
        state = run.restore(out, config, record)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
    elif writes:
        run.start(out, config, record)

    def say(line: str) -> None:
        if bars:
            print(line, flush=True)
        if writes:
            run.log(out, line)

    def save() -> None:
        state.update(
            model=model.state_dict(),
            optimizer=optimizer.state_dict(),
            scheduler=scheduler.state_dict(),
        )
        if writes:
            run.save(out, state, config, record)

    say(corpus.banner)
    if not resume:
        save()
    recorder = None
    while (
        state["epoch"] < config.epochs and state["epoch"] - state["best_epoch"] <= config.patience
    ):
        epoch, started = state["epoch"], time.perf_counter()
        # Every epoch has seeds of its own: a checkpoint between two epochs needs no generator's state.
        seed = 4 * (10_000 * config.seed + epoch)
        draw.generator.manual_seed(seed + 1)
        noise.manual_seed(seed + 2)
        torch.manual_seed(seed + 3 + (rank << 32))
        batches = dataset.batches("train", size, torch.Generator().manual_seed(seed))
        # None: on a terminal alone, so that a log has no carriage returns.
        hidden = None if bars and rank == 0 else True
        with tqdm(batches, desc=f"epoch {epoch}", leave=False, disable=hidden) as bar:
            shards = (dataset.batch(index, names).shard(rank, world).to(device) for index in bar)
            line, recorder = train_epoch(network, optimizer, scheduler, shards, config)
        prediction = predict(model, dataset, "valid", names)
        if not prediction.isfinite().all():
            raise FloatingPointError(
                "`prediction` must stay finite. Got NaN or infinity. Lower `lr`."
            )
        valid = metrics(prediction, corpus.labels[corpus.split["valid"]])
        state["history"].append({"epoch": epoch} | line | {"valid": valid})
        if valid["mae"] < state["best_mae"]:
            state |= {"best_mae": valid["mae"], "best_epoch": epoch}
            state["best"] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        state["epoch"] = epoch + 1
        save()
        say(told(state, time.perf_counter() - started))
        if log and rank == 0:
            send(state["history"][-1], recorder, log)
    if recorder:
        say(f"What each modality did in the last epoch:\n{recorder.summary()}")

    model.load_state_dict(state["best"])
    parts = corpus.split if out else ("test",)
    predictions = {part: predict(model, dataset, part, names) for part in parts}
    test = metrics(predictions["test"], corpus.labels[corpus.split["test"]])
    test |= {"data": corpus.source, "banner": corpus.banner, "best_epoch": state["best_epoch"]}
    if writes:
        run.finish(out, test, state, config, record, dataset, predictions)
        if not keep_checkpoint:
            (out / run.CHECKPOINT).unlink()
    if also:
        test |= also(model, dataset, names)
    return test | {"history": state["history"]}


def device_of(config: Config) -> torch.device:
    available = torch.cuda.is_available()
    name = config.device
    if name == "auto":
        name = "cuda" if available else "cpu"
    if name == "cuda" and not available:
        raise ValueError(
            '`device` must be "cpu" or "auto" where there is no GPU that torch can use. Got "cuda". Leave it out.'
        )
    if name == "cuda" and config.precision == "bf16" and not torch.cuda.is_bf16_supported():
        raise ValueError(
            '`precision` must be "float32" on this GPU. Got "bf16", which it lacks. Leave it out.'
        )
    return torch.device(name)


def told(state: dict[str, Any], seconds: float) -> str:
    """The last epoch in one line."""
    line = state["history"][-1]
    terms = "  ".join(f"{name} {value:.3f}" for name, value in line["train"].items())
    best = " (best)" if state["best_epoch"] == line["epoch"] else ""
    return f"epoch {line['epoch']}  loss: {terms}  validation MAE {line['valid']['mae']:.3f}{best}  {seconds:.1f} s"


def send(line: dict[str, Any], recorder: Recorder | None, log: Any) -> None:
    """Losses and validation metrics of an epoch, and what `Recorder.log_to` sends of its steps."""
    if isinstance(log, Path):
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(log) as writer:
            send(line, recorder, writer)
        return
    scalars = {
        f"{part}/{name}": value for part in ("train", "valid") for name, value in line[part].items()
    }
    if hasattr(log, "add_scalar"):
        for name, value in scalars.items():
            log.add_scalar(name, value, line["epoch"])
    else:
        log({"epoch": line["epoch"]} | scalars)
    if recorder:
        recorder.log_to(log, every=1)


def ranks() -> tuple[int, int]:
    """The rank of this process, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def prepare_once(config: Config) -> Dataset:
    """The first of several processes fills the cache of states, the others read it."""
    rank, world = ranks()
    if rank > 0:
        dist.barrier()
    dataset = prepare(config)
    if rank == 0 and world > 1:
        dist.barrier()
    return dataset


def train_epoch(
    network: nn.Module, optimizer, scheduler, batches: Iterable[Batch], config: Config
) -> tuple[dict[str, Any], Recorder | None]:
    """One epoch; the mean of each loss and, where there are modalities to balance, how they were balanced."""
    network.train()
    weights = {
        "task": 1.0,
        "uni": config.uni,
        "recon": config.recon,
        "div": config.div,
        "stat": config.stat,
    }
    watched = isinstance(optimizer, ConflictAwarePenalty)
    totals: dict[str, list[Tensor]] = {}
    with Recorder(optimizer) if watched else nullcontext() as recorder:
        for batch in batches:
            terms, errors = losses(network(batch), batch, config)
            optimizer.zero_grad()
            sum(weights[name] * term for name, term in terms.items()).backward()
            if config.balance == "paper":
                errors.pop("text", None)  # the paper compares audio with visual alone
            if watched and config.balance in ("errors", "paper"):
                optimizer.observe(**errors)
            if config.max_norm and not watched:
                nn.utils.clip_grad_norm_(network.parameters(), config.max_norm)
            optimizer.step()
            scheduler.step()
            for name, term in terms.items():
                totals.setdefault(name, []).append(term.detach())
    line: dict[str, Any] = {
        "train": {name: float(torch.stack(total).mean()) for name, total in totals.items()}
    }
    for name, value in line["train"].items():
        if not math.isfinite(value):
            raise FloatingPointError(
                f"`{name}` loss must stay finite. Got {value}. Lower `lr` or its weight."
            )
    return line | ({"balance": balance_of(recorder)} if watched else {}), recorder


def balance_of(recorder: Recorder) -> dict[str, Any]:
    """Means over an epoch by group, of what was measured; how far the largest norm is above the others."""
    record = recorder.to_dict()
    counts = np.isfinite(record["norms"]).all(1) & ((record["norms"] > 0).sum(1) >= 2)
    if not counts.any():
        raise FloatingPointError(
            "`gradients` must be finite and not 0 at some step of an epoch. Got none. Lower `lr`, or the weight of a loss."
        )
    record = {name: values[counts] for name, values in record.items() if name != "names"}
    means = {name: record[name].mean(0) for name in ("norms", "coefficients")}
    is_measured = np.isfinite(record["coherences"]).any(0).all()
    if is_measured:
        means["coherences"] = np.nanmean(record["coherences"], 0)
    means["conflicts"] = record["conflicts"].any(2).mean(0)
    balance: dict[str, Any] = {"steps": len(record["step"])}
    for name, values in means.items():
        balance[name] = dict(zip(recorder.names, values.tolist(), strict=True))
    balance["dominance"] = dominance(record["norms"])
    balance["dominance_after"] = dominance(record["norms"] * record["coefficients"])
    return balance


def dominance(norms: np.ndarray) -> float:
    """Largest norm over the mean of the others, median over the steps."""
    ordered = np.sort(norms, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):  # inf where the others are 0
        return float(np.median(ordered[:, -1] / ordered[:, :-1].mean(1)))


@torch.inference_mode()
def predict(model: nn.Module, dataset: Dataset, part: str, names: list[str]) -> Tensor:
    """Predictions for a split, in its order; several processes share the work and all hold the result."""
    rank, world = ranks()
    device = next(model.parameters()).device
    model.eval()
    index = dataset.corpus.split[part]
    prediction = torch.zeros(len(index), device=device)
    chunks = dataset.tokens.lengths[index].argsort(stable=True).split(64)
    for chunk in chunks[rank::world]:
        batch = dataset.batch(index[chunk], names).to(device)
        prediction[chunk.to(device)] = model(batch).prediction
    if world > 1:
        dist.all_reduce(prediction)
    return prediction.cpu()
