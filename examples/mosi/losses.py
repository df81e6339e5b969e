"""The terms of the objective of arXiv 2605.28575."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.mosi.config import Config
from examples.mosi.data import Batch
from examples.mosi.model import Output, pool
from gradbalance import statistical_loss


def losses(
    output: Output, batch: Batch, config: Config
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The terms of the objective, unweighted, and the error of each head: means over the whole batch.

    A process of several divides its sums by its fair share of the batch, so that the average over the processes (of
    gradients and of errors) is exact for uneven shares too.
    """
    share = batch.size / batch.world
    regression = F.l1_loss if config.task == "l1" else F.mse_loss
    terms = {"task": regression(output.prediction, batch.labels, reduction="sum") / share}
    if output.heads:
        terms["uni"] = (
            sum(regression(y, batch.labels, reduction="sum") for y in output.heads.values()) / share
        )
    if output.reconstructions:
        errors = [
            pool((x - batch.features[name]).square(), batch.masks[name])
            for name, x in output.reconstructions.items()
        ]
        terms["recon"] = sum(error.mean(-1).sum() for error in errors) / (2 * share)
    if output.latents and config.div:
        pooled = [pool(latent.z, batch.masks[name]) for name, latent in output.latents.items()]
        terms["div"] = -sum(entropy(z).sum() for z in pooled) / (len(pooled) * share)
    if output.statistics:
        group = torch.distributed.group.WORLD if batch.world > 1 else None
        terms["stat"] = sum(
            statistical_loss(
                predicted,
                batch.features[name],
                batch.masks[name],
                batch.masks[name],
                process_group=group,
            )
            for name, predicted in output.statistics.items()
        ) / len(output.statistics)
    with torch.no_grad():
        errors = {name: (y - batch.labels).abs().sum() / share for name, y in output.heads.items()}
    return terms, errors


def entropy(z: Tensor) -> Tensor:
    """Entropy of softmax(z) as a share of its maximum, [B, Z] -> [B] in [0, 1]; 0 where Z is 1."""
    logs = z.log_softmax(-1)
    return -(logs.exp() * logs).sum(-1) / math.log(max(2, z.shape[-1]))
