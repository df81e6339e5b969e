"""What the penalty is measured against: clipping, and other ways to balance. Each acts between backward and step."""

from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grads_with_norm_, get_total_norm

# Small enough that clipping always acts.
MAX_NORM = 1e-3
Groups = dict[str, list[nn.Parameter]]
Losses = Callable[[], list[Tensor]]


class NoStep(torch.optim.Optimizer):
    """An optimizer that leaves the parameters alone: what remains of a step is the penalty."""

    __module__ = (
        "torch.optim.nothing"  # taken for torch's own: a trial would refuse what moves no parameter
    )

    def __init__(self, params: Iterable[Tensor]) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self, closure: None = None) -> None:
        pass


class OGMGE:
    """OGM-GE (Peng et al., CVPR 2022, eq. 9 to 12): a loop over the parameters that scales and adds noise."""

    def __init__(self, groups: Groups, alpha: float = 0.1) -> None:
        self.groups, self.alpha = groups, alpha

    def __call__(self, scores: Sequence[Tensor]) -> None:
        for m, parameters in enumerate(self.groups.values()):
            others = [score for k, score in enumerate(scores) if k != m]
            ratio = scores[m] / (sum(others) / len(others))
            coefficient = 1 - torch.tanh(self.alpha * ratio) if ratio > 1 else 1.0
            for p in (p for p in parameters if p.numel() > 1):  # a single element has no deviation
                noise = torch.zeros_like(p.grad).normal_(0, p.grad.std().item() + 1e-8)
                p.grad = p.grad * coefficient + noise


class ZClip:
    """ZClip (Kumar et al., arXiv 2504.02507): clips where the norm is an outlier of its running mean and deviation."""

    def __init__(
        self,
        parameters: list[nn.Parameter],
        smoothing: float = 0.97,
        threshold: float = 2.5,
        warm_up: int = 25,
    ) -> None:
        self.parameters, self.smoothing, self.threshold, self.warm_up = (
            parameters,
            smoothing,
            threshold,
            warm_up,
        )
        self.first: list[float] = []
        self.mean = self.variance = 0.0

    def __call__(self) -> None:
        norm = get_total_norm([p.grad for p in self.parameters])
        value = norm.item()
        if len(self.first) < self.warm_up:
            self.first.append(value)
            self.mean = sum(self.first) / len(self.first)
            self.variance = sum((v - self.mean) ** 2 for v in self.first) / len(self.first)
            return
        deviation = self.variance**0.5
        z = (value - self.mean) / (deviation + 1e-6)
        if z > self.threshold:
            value = self.mean + self.threshold**2 / z * deviation
            clip_grads_with_norm_(self.parameters, value, norm)
        self.mean = self.smoothing * self.mean + (1 - self.smoothing) * value
        self.variance = (
            self.smoothing * self.variance + (1 - self.smoothing) * (value - self.mean) ** 2
        )


def clipping(groups: Groups) -> dict[str, Callable[[], object]]:
    """What acts on finished gradients."""
    parameters = [p for group in groups.values() for p in group]
    scores = [torch.tensor(1.0 + m, device=parameters[0].device) for m in range(len(groups))]
    zclip, ogm = ZClip(parameters), OGMGE(groups)

    def per_group() -> None:
        for group in groups.values():
            clip_grad_norm_(group, MAX_NORM)

    return {
        "clip_grad_norm_": lambda: clip_grad_norm_(parameters, MAX_NORM),
        "clip_grad_norm_ per group": per_group,
        "ZClip": zclip,
        "OGM-GE loop": lambda: ogm(scores),
    }


def with_own_backward(
    losses: Losses, shared: nn.Parameter, optimizer: torch.optim.Optimizer
) -> dict[str, Callable[[], object]]:
    """What replaces the backward of the summed losses; only of the packages that are installed."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    found: dict[str, Callable[[], object]] = {}
    if find_spec("gradnorm_pytorch"):
        from gradnorm_pytorch import GradNormLossWeighter

        weighter = GradNormLossWeighter(num_losses=3, grad_norm_parameters=shared).to(shared.device)
        found["gradnorm-pytorch"] = lambda: weighter.backward(losses())
    if find_spec("torchjd"):
        from torchjd.aggregation import UPGrad
        from torchjd.autojac import backward, jac_to_grad

        def upgrad() -> None:
            backward(losses())
            jac_to_grad(parameters, UPGrad())

        found["TorchJD UPGrad"] = upgrad
    if find_spec("pytorch_optimizer"):
        from pytorch_optimizer import PCGrad

        pcgrad = PCGrad(optimizer)
        found["PCGrad (pytorch_optimizer)"] = lambda: pcgrad.pc_backward(losses())
    return found


class Branches(nn.Module):
    """Three encoders and one head that all share; one loss for each."""

    def __init__(self, kind: str, size: int) -> None:
        super().__init__()
        make, width, depth = (
            (mlp, *WIDTHS[kind, size]) if kind == "MLP" else (transformer, *WIDTHS[kind, size])
        )
        self.encoders = nn.ModuleDict(
            {name: make(width, depth) for name in ("text", "audio", "visual")}
        )
        self.head = nn.Linear(width, 1)
        self.inputs = torch.randn(3, 64, width) if kind == "MLP" else torch.randn(3, 8, 16, width)
        self.targets = torch.randn(self.inputs.shape[1:-1])

    def forward(self) -> Tensor:
        return torch.stack(self.losses()).sum()

    def losses(self) -> list[Tensor]:
        found = []
        for encode, x in zip(self.encoders.values(), self.inputs, strict=True):
            found.append((self.head(encode(x)).squeeze(-1) - self.targets).square().mean())
        return found

    def groups(self) -> Groups:
        return {name: list(encoder.parameters()) for name, encoder in self.encoders.items()}

    def move(self, device: str) -> "Branches":
        self.inputs, self.targets = self.inputs.to(device), self.targets.to(device)
        return self.to(device)


# Width and layers per encoder for so many million parameters in all; 0 to see that it runs.
WIDTHS = {
    ("MLP", 0): (32, 2),
    ("MLP", 100): (2048, 8),
    ("transformer", 0): (64, 1),
    ("MLP", 10): (1024, 3),
    ("MLP", 60): (2048, 5),
    ("transformer", 10): (256, 4),
    ("transformer", 60): (512, 6),
}


def mlp(width: int, depth: int) -> nn.Module:
    return nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(depth)))


def transformer(width: int, depth: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(width, width // 64, 4 * width, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
