"""Training: one process or several, resumable bit for bit after any kill."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from examples.mosi import run
from examples.mosi.build import build, optimizer_of, others, ramp
from examples.mosi.config import Config
from examples.mosi.data import Dataset
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
    also: Callable[[Model, Dataset, list[str]], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Trains, and returns the test metrics of the epoch with the best validation MAE.

    Args:
        config: All settings.
        dataset: Shared by runs of one process; otherwise prepared from the configuration.
        out: The run folder; without it nothing is written.
        resume: Go on from the checkpoint in `out`: the result is bitwise that of the uninterrupted run.
        bars: Show progress.
        also: What to add to the result, from the tested model, the data and the names of the non-text modalities.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = torch.device(config.device)
    dataset = prepare_once(config, rank, world) if dataset is None else dataset
    names = others(config, dataset)
    corpus, writes = dataset.corpus, out is not None and rank == 0
    if bars:
        print(corpus.banner)

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
        state = run.restore(out, config, corpus)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
    elif writes:
        run.start(out, config, corpus)

    def save() -> None:
        state.update(
            model=model.state_dict(),
            optimizer=optimizer.state_dict(),
            scheduler=scheduler.state_dict(),
        )
        if writes:
            run.save(out, state, config, corpus)

    if not resume:
        save()
    while (
        state["epoch"] < config.epochs and state["epoch"] - state["best_epoch"] <= config.patience
    ):
        epoch = state["epoch"]
        # Every epoch has seeds of its own: a checkpoint between two epochs needs no generator's state.
        seed = 4 * (10_000 * config.seed + epoch)
        draw.generator.manual_seed(seed + 1)
        noise.manual_seed(seed + 2)
        torch.manual_seed(seed + 3 + (rank << 32))
        batches = dataset.batches("train", size, torch.Generator().manual_seed(seed))
        title = f"epoch {epoch}" + (
            f", valid MAE {state['history'][-1]['valid']['mae']:.3f}" if epoch else ""
        )
        with tqdm(batches, desc=title, leave=False, disable=not bars or rank > 0) as bar:
            shards = (dataset.batch(index, names).shard(rank, world).to(device) for index in bar)
            line = {"epoch": epoch} | train_epoch(network, optimizer, scheduler, shards, config)
        valid = metrics(
            predict(model, dataset, "valid", names), corpus.labels[corpus.split["valid"]]
        )
        state["history"].append(line | {"valid": valid})
        if valid["mae"] < state["best_mae"]:
            state |= {"best_mae": valid["mae"], "best_epoch": epoch}
            state["best"] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        state["epoch"] = epoch + 1
        save()

    model.load_state_dict(state["best"])
    index = corpus.split["test"]
    prediction = predict(model, dataset, "test", names)
    test = metrics(prediction, corpus.labels[index])
    test |= {"data": corpus.source, "banner": corpus.banner, "best_epoch": state["best_epoch"]}
    if writes:
        run.finish(out, test, corpus, index, prediction, state["history"])
    if also:
        test |= also(model, dataset, names)
    return test | {"history": state["history"]}


def prepare_once(config: Config, rank: int, world: int) -> Dataset:
    """The first of several processes fills the cache of states, the others read it."""
    if rank > 0:
        dist.barrier()
    dataset = prepare(config)
    if rank == 0 and world > 1:
        dist.barrier()
    return dataset


def train_epoch(
    network: nn.Module, optimizer, scheduler, batches, config: Config
) -> dict[str, Any]:
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
    return line | ({"balance": balance_of(recorder)} if watched else {})


def balance_of(recorder: Recorder) -> dict[str, Any]:
    """Means over an epoch by group, of what was measured; how far the largest norm is above the others; a histogram."""
    record = recorder.to_dict()
    counts = np.isfinite(record["norms"]).all(1) & ((record["norms"] > 0).sum(1) >= 2)
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
    # How many of the steps each group's coefficient was in each fifth of a unit, from 0 to 4.
    balance["histogram"] = {
        name: np.histogram(values.clip(0, 4), 20, (0, 4))[0].tolist()
        for name, values in zip(recorder.names, record["coefficients"].T, strict=True)
    }
    return balance


def dominance(norms: np.ndarray) -> float:
    """Largest norm over the mean of the others, median over the steps."""
    ordered = np.sort(norms, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):  # inf where the others are 0
        return float(np.median(ordered[:, -1] / ordered[:, :-1].mean(1)))


@torch.inference_mode()
def predict(model: nn.Module, dataset: Dataset, part: str, names: list[str]) -> Tensor:
    """Predictions for a split, in its order; several processes share the work and all hold the result."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
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
