"""The penalty under FSDP2: exact norms of sharded gradients, one all_reduce a step.

Run ``torchrun --nproc-per-node 2 examples/fsdp2.py``: the coefficients are the same on all ranks, and the checkpoint
fits any number of them.
"""

import os
import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import mse_loss

from gradbalance import ConflictAwarePenalty, rules


def build(device: str) -> tuple[nn.ModuleDict, ConflictAwarePenalty]:
    """A sharded model with a branch for each modality, and its optimizer."""
    torch.manual_seed(0)  # the same weights on every rank
    model = nn.ModuleDict({"audio": nn.Linear(20, 1), "visual": nn.Linear(5, 1)}).to(device)
    mesh = init_device_mesh(device, (int(os.environ["WORLD_SIZE"]),))
    for branch in model.values():
        fully_shard(branch, mesh=mesh)
    # After the sharding, as with every optimizer: it replaces the parameters.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return model, ConflictAwarePenalty(optimizer, dict(model.items()), rules.ConflictAware())


def main(steps: int = 100) -> dict[str, float]:
    """Train, save, load; the coefficients of the last step."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, optimizer = build(device)
    torch.manual_seed(1 + dist.get_rank())  # every rank its own batches
    for _ in range(steps):
        audio, visual = torch.randn(16, 20, device=device), torch.randn(16, 5, device=device)
        target = audio.mean(1, keepdim=True) + visual.mean(1, keepdim=True)
        heard, seen = model["audio"](audio), model["visual"](visual)
        optimizer.zero_grad()
        mse_loss(heard + seen, target).backward()
        optimizer.observe(
            audio=mse_loss(heard, target), visual=mse_loss(seen, target)
        )  # averaged over the ranks
        optimizer.step()

    with tempfile.TemporaryDirectory() as own:
        folder = [own]
        dist.broadcast_object_list(folder)  # that of rank 0
        weights, moments = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder[0])

        resumed_model, resumed = build(device)
        weights, moments = get_state_dict(resumed_model, resumed)
        dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=folder[0])
        set_state_dict(resumed_model, resumed, model_state_dict=weights, optim_state_dict=moments)
        dist.barrier()
    assert resumed.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    return optimizer.coefficients()


if __name__ == "__main__":
    print(main())
    dist.destroy_process_group()
