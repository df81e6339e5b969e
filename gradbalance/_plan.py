"""How the parameters of an optimizer lie in memory: worked out once, kept while the optimizer holds the same ones."""

from itertools import chain
from operator import is_
from typing import NamedTuple
from weakref import ref

import torch
from torch import Tensor

from gradbalance._buckets import Bucket, in_buckets, local
from gradbalance._groups import Assignment, ParamGroups
from gradbalance._norms import world_size
from gradbalance._settings import Settings
from gradbalance._sketch import Sketch


class Plan(NamedTuple):
    """What a step needs to know of the parameters."""

    params: list[list[Tensor]]  # of each param_group, to notice a change
    buckets: list[Bucket]
    rows: int  # N, or N + 1 where clipping takes in the parameters of no group
    group_of: dict[int, int]  # id of a parameter -> its group, or UNGROUPED
    sizes: Tensor  # [N] number of entries
    sketch: Sketch | None  # None where the agreement of the gradients is not asked for
    home: torch.device  # of the N-vectors

    def fits(self, param_groups: ParamGroups) -> bool:
        """Whether the optimizer still holds the parameters of the plan."""
        if len(self.params) != len(param_groups):
            return False
        pairs = [(old, group["params"]) for old, group in zip(self.params, param_groups, strict=True)]
        return all(len(old) == len(new) and all(map(is_, old, new)) for old, new in pairs)


def make_plan(assignment: Assignment, param_groups: ParamGroups, settings: Settings) -> Plan:
    """The plan for the parameters that the optimizer holds now.

    Raises:
        RuntimeError: If there is to be noise on sharded parameters, or on several ranks without a generator.
    """
    n = len(assignment.names)
    members: list[list[Tensor]] = [[] for _ in range(n + 1)]
    group_of = {}
    for group, of in zip(param_groups, assignment.of, strict=True):
        for p, m in zip(group["params"], of, strict=True):
            members[m].append(p)  # UNGROUPED is -1, the last row
            group_of[id(p)] = m
    readable = [[p for p in row if p.device.type != "meta"] for row in members[:n]]
    home = next((p.device for p in chain.from_iterable(readable)), torch.device("cpu"))
    sizes = torch.tensor([sum(p.numel() for p in row) for row in members[:n]], device=home)
    rows = n if settings.max_norm is None else n + 1
    plan = Plan(
        [list(group["params"]) for group in param_groups],
        in_buckets(members[:rows]),
        rows,
        group_of,
        sizes,
        None if settings.agreement is None else Sketch(readable, home),
        home,
    )
    if settings.noise:
        if any(bucket.mesh is not None for bucket in plan.buckets):
            raise RuntimeError("`noise` must be 0 with sharded parameters. Got DTensors. Leave the noise off.")
        if settings.generator is None and world_size(settings.process_group) > 1:
            raise RuntimeError(
                "`generator` must be given with `noise` on several ranks. Got None, which draws other noise on each "
                "rank. Pass a generator with the same seed on every rank."
            )
    return plan


class Fingerprint:
    """By one gradient of each group, the way to know the gradients again: the tensor and its version."""

    def __init__(self, plan: Plan) -> None:
        self._marks: list[tuple[Tensor, ref[Tensor], int]] = []
        for row in chain.from_iterable(bucket.parameters for bucket in plan.buckets):
            for p in row:
                if (gradient := p.grad) is not None:
                    self._marks.append((p, ref(gradient), local(gradient)._version))
                    break

    def matches(self) -> bool:
        """Whether the gradients are the same, untouched since."""
        return bool(self._marks) and all(
            p.grad is not None and p.grad is known() and local(p.grad)._version == version
            for p, known, version in self._marks
        )
