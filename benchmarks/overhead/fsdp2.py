"""The penalty on parameters sharded by FSDP2, on two processes of one machine: collectives and time of a step."""

import multiprocessing
import os
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.utils import clip_grad_norm_

from benchmarks._timing import interleaved, quartiles, ratios
from benchmarks.overhead.rivals import MAX_NORM, Branches
from gradbalance import attach

RANKS = 2


def measure_fsdp2(rounds: int = 15) -> dict:
    """Optimizer step alone: forward and backward with their own collectives are the same for all."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        workers = [
            context.Process(target=_work, args=(rank, folder, rounds, sender))
            for rank in range(RANKS)
        ]
        for worker in workers:
            worker.start()
        sender.close()  # else a worker that fails would leave this end waiting
        try:
            return receiver.recv()
        finally:
            for worker in workers:
                worker.join()


def _work(rank: int, folder: str, rounds: int, sender: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(RANKS), GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", f"file://{Path(folder) / 'store'}", rank=rank, world_size=RANKS)
    torch.manual_seed(0)
    model = Branches("MLP", 10)
    mesh = init_device_mesh("cpu", (RANKS,))
    for encoder in model.encoders.values():
        fully_shard(encoder, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model().backward()

    def step(optimizer: torch.optim.Optimizer, clip: bool = False) -> None:
        first = next(model.parameters())
        first.grad = (
            first.grad.detach()
        )  # else a second step with the same gradients would do nothing
        if clip:
            clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()

    def adamw() -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=1e-6)

    plain, calls = adamw(), {}
    calls["plain"] = lambda: step(plain)
    calls["clip_grad_norm_"] = lambda: step(plain, clip=True)
    for mode in ("update", "gradient"):
        for max_norm in (None, MAX_NORM):
            balanced = adamw()
            attach(balanced, model.groups(), apply_to=mode, max_norm=max_norm)
            calls[f"{mode} + max_norm" if max_norm else mode] = lambda optimizer=balanced: step(
                optimizer
            )
    counts = {}
    for name, call in calls.items():
        call()
        with CommDebugMode() as collectives:
            call()
        counts[name] = collectives.get_total_counts()
    times = interleaved(calls, rounds, "cpu", warm_up=1, clock=perf_counter)
    if rank == 0:
        found = {"collectives": counts, "plain_ms": [1e3 * t for t in quartiles(times["plain"])]}
        sender.send({**found, "ratios": ratios(times, "plain")})
    dist.barrier()
    dist.destroy_process_group()
