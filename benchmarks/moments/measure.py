"""Time, memory and accuracy of the moments.

Every call is timed in turn with its rivals, so that a ratio compares neighbours in time; the table has the median of
the ratios of all rounds and their quartiles.
"""

import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks._timing import interleaved, launches, peak_memory, quartiles
from benchmarks.moments.report import TARGETS, TRITON
from gradbalance import moments, statistical_loss

SIZES = [(64, 50, 768), (4096, 768), (256, 128, 74), (8, 16, 64)]
CUDA_SIZES = [(4096, 4096), (65536, 1024)]
ROUNDS = 30
MORE_ROUNDS = 100  # for each, where a call takes a fraction of a millisecond
OFFSETS = [0.0, 1e3, 1e4, 1e6]
# What is timed in turn.
RIVALS = [
    (
        "naive, masked",
        "moments, masked",
        "naive, masked, compiled",
        "moments, masked, compiled",
        "var_mean",
        "moments",
    ),
    ("three calls of CMD", "moment loss of three pairs"),
    ("Deep CORAL", "covariance loss"),
]


# The same on a GPU, in parts: what torch runs as it is, what it compiles, and the Triton kernels against both.
EAGER = (("naive, masked", "moments, masked", "var_mean", "moments"), *RIVALS[1:])
COMPILED = (("naive, masked", "naive, masked, compiled", "moments, masked, compiled"),)
FUSED = (("naive, masked", TRITON), ("moments, masked, compiled", TRITON))


def naive(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Masked mean and variance as one writes them down."""
    weight, dims = mask[..., None].to(x.dtype), tuple(range(x.dim() - 1))
    mean = (x * weight).sum(dims) / weight.sum()
    return mean, ((x - mean).square() * weight).sum(dims) / weight.sum()


def cmd(a: Tensor, b: Tensor, orders: int = 5) -> Tensor:
    """Central moment discrepancy as in MISA: distances of the means and of the central moments up to ``orders``."""

    def distance(p: Tensor, q: Tensor) -> Tensor:
        return (p - q).square().sum().sqrt()

    means = a.mean(0), b.mean(0)
    centred = a - means[0], b - means[1]
    higher = (
        distance(centred[0].pow(k).mean(0), centred[1].pow(k).mean(0)) for k in range(2, orders + 1)
    )
    return distance(*means) + sum(higher)


def three_pairs(branches: list[Tensor]) -> Tensor:
    """Squared differences of four moments between every two branches, whose moments are taken once each."""
    found = [moments(x, order=4)[1:] for x in branches]
    pairs = ((0, 1), (0, 2), (1, 2))
    return sum(
        (p - q).square().mean() for i, j in pairs for p, q in zip(found[i], found[j], strict=True)
    )


def coral(a: Tensor, b: Tensor) -> Tensor:
    """Deep CORAL."""
    return (a.mT.cov() - b.mT.cov()).square().sum() / (4 * a.shape[1] ** 2)


def cases(
    shape: tuple[int, ...], device: str, dtype: torch.dtype
) -> dict[str, tuple[Callable, list[Tensor]]]:
    """Name -> (function of the inputs, inputs); each function returns the tensors to differentiate."""
    generator = torch.Generator().manual_seed(0)
    branches = [
        torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for _ in range(3)
    ]
    mask = (torch.rand(shape[:-1], generator=generator) > 0.3).to(device)
    x, dims = branches[0], tuple(range(len(shape) - 1))
    flat = [branch.detach().flatten(0, -2).requires_grad_() for branch in branches]
    torch.compiler.reset()
    fused, fused_naive = (
        torch.compile(moments, fullgraph=True),
        torch.compile(naive, fullgraph=True),
    )
    return {
        "naive, masked": (lambda x: naive(x, mask), [x]),
        "naive, masked, compiled": (lambda x: fused_naive(x, mask), [x]),
        "moments, masked": (lambda x: moments(x, mask)[1:3], [x]),
        "moments, masked, compiled": (lambda x: fused(x, mask)[1:3], [x]),
        "var_mean": (lambda x: torch.var_mean(x, dims, correction=0), [x]),
        "moments": (lambda x: moments(x)[1:3], [x]),
        "three calls of CMD": (lambda a, b, c: [cmd(a, b) + cmd(a, c) + cmd(b, c)], flat),
        "moment loss of three pairs": (lambda *flat: [three_pairs(list(flat))], flat),
        "Deep CORAL": (lambda a: [coral(a, flat[1].detach())], flat[:1]),
        "covariance loss": (
            lambda a: [statistical_loss(a, flat[1], moments=["covariance"])],
            flat[:1],
        ),
    }


def runs(
    function: Callable, inputs: list[Tensor]
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Forward without a graph, and forward with backward."""
    plain = [x.detach() for x in inputs]
    gradients = [
        torch.linspace(-1, 1, max(1, out.numel()), device=out.device).reshape(out.shape)
        for out in function(*plain)
    ]

    def forward() -> object:
        return function(*plain)

    def both() -> object:
        out = function(*inputs)
        return torch.autograd.grad(
            out, inputs, [g.to(o.dtype) for g, o in zip(gradients, out, strict=True)]
        )

    return forward, both


def in_triton(call: Callable[[], object]) -> Callable[[], object]:
    """The call with the Triton kernels, in both directions."""

    def run() -> object:
        os.environ["GRADBALANCE_TRITON"] = "1"
        try:
            return call()
        finally:
            del os.environ["GRADBALANCE_TRITON"]

    return run


def measure_size(
    shape: tuple[int, ...],
    device: str,
    dtype: torch.dtype,
    rounds: int,
    rivals: Sequence[tuple[str, ...]] = tuple(RIVALS),
) -> dict:
    """Times, memory and (on a GPU) kernel launches of the named cases at one size; an error in place of a case."""
    known = cases(shape, device, dtype)
    known[TRITON] = known["moments, masked"]
    found: dict = {"dtype": str(dtype).removeprefix("torch."), "cases": {}, "ratios": {}}
    if device == "cpu":
        rounds *= MORE_ROUNDS if torch.Size(shape).numel() < 100_000 else 1
    unit = torch.Size(shape).numel() * dtype.itemsize
    for names in rivals:
        chosen = {}
        for name in names:
            try:
                chosen[name] = runs(*known[name])
                if name == TRITON:
                    chosen[name] = tuple(map(in_triton, chosen[name]))
                    chosen[name][1]()
            except Exception as error:  # the others are to be measured all the same
                chosen.pop(name, None)
                found["cases"][name] = {"error": f"{type(error).__name__}: {error}"}
        forward = interleaved({name: calls[0] for name, calls in chosen.items()}, rounds, device)
        both = interleaved({name: calls[1] for name, calls in chosen.items()}, rounds, device)
        for name, calls in chosen.items():
            inputs = 3 if "three" in name else 1
            found["cases"][name] = {
                "forward_ms": [1e3 * t for t in quartiles(forward[name])],
                "both_ms": [1e3 * t for t in quartiles(both[name])],
                "peak_forward": peak_memory(calls[0], device) / unit / inputs,
                "peak_both": peak_memory(calls[1], device) / unit / inputs,
            }
            if device != "cpu":
                counts = {
                    "launches_forward": launches(calls[0]),
                    "launches_both": launches(calls[1]),
                }
                found["cases"][name] |= counts
        for name, rival, *_ in TARGETS:
            if name in both and rival in both:
                found["ratios"][f"{name} / {rival}"] = quartiles(both[name] / both[rival])
        if TRITON in both:
            x = torch.empty(shape, dtype=dtype, device=device)
            copy = interleaved({"copy": x.clone}, rounds, device)["copy"].median()
            # forward reads x, backward reads x and writes its gradient; the copy reads and writes
            found["bandwidth / copy"] = float(3 / both[TRITON].median() * copy / 2)
    return found


def accuracy(device: str) -> dict:
    """Largest relative error over 64 skewed float32 features of standard deviation 1, against float64."""
    noise = (
        torch.randn(2, 3200, 64, generator=torch.Generator().manual_seed(0)).square().sum(0).div(2)
    )
    found = {}
    for offset in OFFSETS:
        x = (noise + offset).to(device)
        exact = moments(x.double(), order=4)
        raw = x.square().mean(0) - x.mean(0).square()
        centred = x - x.mean(0)
        two_pass = centred.square().mean(0), centred.pow(3).mean(0), centred.pow(4).mean(0)
        rows = {
            "gradbalance": moments(x, order=4)[2:],
            "two passes": (
                two_pass[0],
                two_pass[1] / two_pass[0] ** 1.5,
                two_pass[2] / two_pass[0] ** 2,
            ),
            "torch.var_mean": (torch.var_mean(x, 0, correction=0)[0],),
            "raw sums": (raw,),
        }
        found[f"{offset:g}"] = {
            name: [
                float(((value - best) / best).abs().max())
                for value, best in zip(values, exact[2:], strict=False)
            ]
            for name, values in rows.items()
        }
    return found


def sizes(device: str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """What is measured on the device: shape and dtype, by name."""
    found = [(shape, torch.float32) for shape in SIZES]
    if device != "cpu":
        found += [(shape, torch.bfloat16) for shape in CUDA_SIZES]
    return {" x ".join(map(str, shape)): (shape, dtype) for shape, dtype in found}
