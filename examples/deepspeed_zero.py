"""The penalty under DeepSpeed ZeRO, which keeps no gradient per parameter: norms and scaling by DeepSpeed's own means.

Run ``deepspeed examples/deepspeed_zero.py``, or ``torchrun --nproc-per-node 2 examples/deepspeed_zero.py``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import deepspeed
import torch
from deepspeed.utils import (
    safe_get_full_grad,
    safe_get_local_grad,
    safe_set_full_grad,
    safe_set_local_grad,
)
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from gradbalance import attach, rules

Groups = Mapping[str, Sequence[Tensor]]


def coefficients(penalty: Any, groups: Groups, **errors: Tensor) -> dict[str, float]:
    """The coefficient of each group: between backward and step, where the gradients are averaged over the ranks."""
    norms = {
        name: torch.stack([safe_get_full_grad(p).norm() for p in ps]).norm()
        for name, ps in groups.items()
    }
    return penalty.coefficients_for(norms, errors or None)


def scale_gradients(groups: Groups, factors: Mapping[str, float]) -> None:
    """What ``apply_to="gradient"`` does: for SGD, since most others cancel a constant factor."""
    for name, parameters in groups.items():
        for p in parameters:
            if hasattr(
                p, "ds_id"
            ):  # ZeRO 3 cannot set a full gradient whose size is no multiple of the ranks
                safe_set_local_grad(p, factors[name] * safe_get_local_grad(p))
            else:
                safe_set_full_grad(p, factors[name] * safe_get_full_grad(p))


def scale_learning_rates(
    optimizer: Any, groups: Groups, factors: Mapping[str, float], lr: float
) -> None:
    """What ``apply_to="update"`` does: for every optimizer whose first param_groups are ``groups``, in order."""
    for param_group, name in zip(optimizer.param_groups, groups, strict=False):
        param_group["lr"] = factors[name] * lr


def main(steps: int = 100, stage: int = 3, lr: float = 1e-2) -> dict[str, float]:
    """Train a branch for each modality; the coefficients of the last step."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"audio": nn.Linear(20, 1), "visual": nn.Linear(5, 1)})
    groups = {name: list(branch.parameters()) for name, branch in model.items()}
    # Before `initialize`, and on an optimizer that is never stepped, of the class of the one that is: it only keeps the
    # groups and, in its state_dict, the running means. A penalty on the optimizer that DeepSpeed steps refuses the flat
    # parameters. The rule has to decide by norms and errors: the coherence of the gradients is not at hand.
    penalty = attach(torch.optim.AdamW(model.parameters()), groups, rule=rules.ConflictAware())
    engine, optimizer, _, _ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(
            [{"params": parameters} for parameters in groups.values()], lr=lr
        ),
        config={
            "train_micro_batch_size_per_gpu": 16,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
        },
    )
    for _ in range(steps):
        audio, visual = (
            torch.randn(16, 20, device=engine.device),
            torch.randn(16, 5, device=engine.device),
        )
        target = audio.mean(1, keepdim=True) + visual.mean(1, keepdim=True)
        heard, seen = model["audio"](audio), model["visual"](visual)
        engine.backward(mse_loss(heard + seen, target))
        errors = {"audio": mse_loss(heard, target), "visual": mse_loss(seen, target)}
        scale_learning_rates(optimizer, groups, coefficients(penalty, groups, **errors), lr)
        engine.step()
    return penalty.coefficients()


if __name__ == "__main__":
    print(main())
