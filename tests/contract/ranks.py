"""Runs a function on every rank of a process group, in processes forked from a server that has torch loaded."""

import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from multiprocessing.connection import wait

import pytest
import torch
import torch.distributed as dist

if sys.platform == "win32":
    pytest.skip("Ranks are forked, which Windows cannot.", allow_module_level=True)

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "pytest",
        "torch._dynamo",
        "torch.distributed.checkpoint",
        "torch.distributed.fsdp",
        "torch.distributed.optim",
        "torch.distributed.tensor.debug",
        "torch.distributed.tensor.parallel",
    ]
)


def on_ranks(function, world_size, *args, timeout=60.0):
    """What ``function(*args)`` returns on each rank of a fresh gloo process group.

    An error on any rank is raised, and a skip on any rank is one of the test.

    Args:
        function: A function of a module, since it is pickled by name.
        world_size: The number of processes.
        *args: Passed to ``function``.
        timeout: Seconds after which the processes are killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        pipes = [CONTEXT.Pipe(duplex=False) for _ in range(world_size)]
        workers = [
            CONTEXT.Process(
                target=_work, args=(function, args, rank, world_size, folder, sender), daemon=True
            )
            for rank, (_, sender) in enumerate(pipes)
        ]
        try:
            for worker, (_, sender) in zip(workers, pipes, strict=True):
                worker.start()
                sender.close()  # the worker's copy is now the only one: its death ends the pipe
            return _received([receiver for receiver, _ in pipes], timeout)
        finally:
            for worker in workers:
                worker.kill()
                worker.join()


def _received(receivers, timeout):
    results = {}
    deadline = time.monotonic() + timeout
    while len(results) < len(receivers):
        waiting = [r for rank, r in enumerate(receivers) if rank not in results]
        for receiver in wait(waiting, deadline - time.monotonic()) or _time_out(
            len(waiting), timeout
        ):
            rank = receivers.index(receiver)
            try:
                failure, results[rank] = pickle.loads(receiver.recv_bytes())
            except EOFError:
                raise RuntimeError(f"Rank {rank} died.") from None
            if failure and results[rank] == "skipped":
                pytest.skip(failure)
            if failure:
                raise AssertionError(f"Rank {rank} failed.\n{failure}")
    return [results[rank] for rank in range(len(receivers))]


def _time_out(count, timeout):
    raise TimeoutError(f"{count} ranks did not finish within {timeout} s.")


def _work(function, args, rank, world_size, folder, sender):
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), GLOO_SOCKET_IFNAME="lo"
    )
    try:
        dist.init_process_group(
            "gloo",
            f"file://{folder}/store",
            timedelta(seconds=20),
            rank=rank,
            world_size=world_size,
        )
        # Pickled by value: torch would send a handle of shared memory, which dies with the worker.
        message = pickle.dumps((None, function(*args)))
    except pytest.skip.Exception as skipped:
        message = pickle.dumps((str(skipped), "skipped"))
    except Exception:
        message = pickle.dumps((traceback.format_exc(), None))
    sender.send_bytes(message)
    dist.destroy_process_group()  # after the work is told, since gloo of torch 2.6 may hang here
