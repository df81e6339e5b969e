"""A testbed that trains in no time."""

import torch

from benchmarks.balancing.data import gaussians
from benchmarks.balancing.model import Model
from benchmarks.balancing.testbeds import Branch, Testbed

TINY = Testbed(
    "tiny",
    "",
    (Branch("a", 1, 0.5, 2.0), Branch("b", 2, 0.5)),
    gaussians,
    size=64,
    epochs=2,
    width=8,
)


def model_and_batch():
    torch.manual_seed(0)
    part = gaussians(TINY, seed=0)["train"]
    return Model(TINY, [x.shape[1] for x in part.inputs], 10), part
