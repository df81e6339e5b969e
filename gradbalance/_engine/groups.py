"""From names to parameters: which parameter belongs to which group, and every error of the construction."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple
from weakref import ref

from torch import Tensor, nn

UNGROUPED = -1

Groups = Mapping[str, nn.Module | Iterable[Tensor]]
ParamGroups = Sequence[Mapping[str, Any]]


class Assignment(NamedTuple):
    """Which group each parameter of the optimizer belongs to."""

    names: tuple[str, ...]
    # id of a parameter -> its group, and the parameter itself: held weakly, since sharding replaces parameters and the
    # old ones must not stay in memory.
    members: dict[int, tuple[int, ref[Tensor]]]
    of: list[list[int]]  # the group of each position of each param_group, or UNGROUPED
    shapes: list[list[Any]]  # the shape of the parameter at each position

    def group_of(self, param_groups: ParamGroups) -> dict[int, int]:
        """The group of each grouped parameter that the optimizer holds, by ``id``."""
        pairs = zip(param_groups, self.of, strict=True)
        return {id(p): m for group, of in pairs for p, m in zip(group["params"], of, strict=True) if m != UNGROUPED}

    def parameters(self, param_groups: ParamGroups) -> dict[str, list[Tensor]]:
        """The parameters of each group: those that the optimizer holds now, and frozen ones that it does not hold."""
        found: dict[str, dict[int, Tensor]] = {name: {} for name in self.names}
        for group, of in zip(param_groups, self.of, strict=False):
            for p, m in zip(group["params"], of, strict=False):
                if m != UNGROUPED:
                    found[self.names[m]][id(p)] = p
        for m, member in self.members.values():
            if (p := member()) is not None and not p.requires_grad:
                found[self.names[m]].setdefault(id(p), p)
        return {name: list(parameters.values()) for name, parameters in found.items()}


def assign(param_groups: ParamGroups, groups: Groups) -> Assignment:
    """The group of each parameter in an optimizer's ``param_groups``, checked.

    Raises:
        TypeError: If ``groups`` is not a mapping from names to modules or parameters.
        ValueError: If there are fewer than two groups, or a group is empty, overlaps another, or holds parameters
            that the optimizer does not have.

    Warns:
        UserWarning: If no parameter of a group requires a gradient.
    """
    members = _members(groups)
    flattened = any(_is_flattened(p) for _, p in members.values())  # as by DeepSpeed ZeRO 3
    if not any(group["params"] for group in param_groups):
        raise ValueError(
            "`optimizer` must hold parameters. Got empty `param_groups`. "
            + (FLATTENED if flattened else "Build it from the parameters of the model.")
        )
    present = {id(p) for group in param_groups for p in group["params"]}
    for index, name in enumerate(groups):
        own = [p for m, p in members.values() if m == index]
        trainable = [p for p in own if p.requires_grad]
        if not trainable:
            warnings.warn(
                f"No parameter of group `{name}` requires a gradient: the group is frozen and takes no part.",
                UserWarning,
                stacklevel=4,
            )
        missing = [i for i, p in enumerate(own) if p.requires_grad and id(p) not in present]
        if missing:
            raise ValueError(
                f"`groups[{name!r}]` must hold parameters of the optimizer. Got {len(missing)} of {len(own)} that it "
                f"does not have, the first at index {missing[0]} with shape {tuple(own[missing[0]].shape)}. "
                + (FLATTENED if flattened else "Build the optimizer from the same model, after moving or wrapping it.")
            )
    if flattened:
        raise RuntimeError(
            f"`groups` must hold parameters with gradients of their own. Got flattened ones. {FLATTENED}"
        )
    return Assignment(
        tuple(groups),
        {key: (m, ref(p)) for key, (m, p) in members.items()},
        [[members[id(p)][0] if id(p) in members else UNGROUPED for p in g["params"]] for g in param_groups],
        [[p.shape for p in g["params"]] for g in param_groups],
    )


def reassign(assignment: Assignment, param_groups: ParamGroups) -> Assignment:
    """The assignment after the optimizer's ``param_groups`` changed.

    A known position keeps its group, since frameworks swap parameters in place (sharding, casting); a new one is
    looked up by identity, so that members unfrozen later join their group.

    Raises:
        RuntimeError: If the parameters are no longer those of the groups, as under flattening engines.
    """
    of, shapes = [], []
    for i, group in enumerate(param_groups):
        known = assignment.of[i] if i < len(assignment.of) else []
        parameters = group["params"]
        if len(parameters) < len(known) or any(
            p.shape != shape for p, shape in zip(parameters, assignment.shapes[i] if known else [], strict=False)
        ):
            raise RuntimeError(
                "The optimizer must hold the parameters of the groups at every step. Got other parameters than at "
                f"construction. {FLATTENED}"
            )
        of.append([*known, *(_group_of(p, assignment) for p in parameters[len(known) :])])
        shapes.append([p.shape for p in parameters])
    if not any(m != UNGROUPED for group_of in of for m in group_of):
        raise RuntimeError(
            f"The optimizer must hold the parameters of the groups. Got none of them any more. {FLATTENED}"
        )
    return assignment._replace(of=of, shapes=shapes)


def _group_of(p: Tensor, assignment: Assignment) -> int:
    m, member = assignment.members.get(id(p), (UNGROUPED, None))
    return m if member is not None and member() is p else UNGROUPED


FLATTENED = (
    "DeepSpeed ZeRO and FSDP1 replace parameters by flat ones that keep no gradient per parameter: use FSDP2 "
    "(fully_shard), or call `coefficients_for` of the object that `attach` returns between backward and step."
)


def _is_flattened(parameter: Tensor) -> bool:
    """Whether the parameter is, or is a view into, a flat buffer of FSDP1 or DeepSpeed ZeRO 1, 2 or 3."""
    return any(hasattr(parameter, mark) for mark in ("_fsdp_flattened", "_hp_mapping", "ds_id"))


def _members(groups: Groups) -> dict[int, tuple[int, Tensor]]:
    if not isinstance(groups, Mapping):
        raise TypeError(
            f"`groups` must map names to modules or parameters. Got {type(groups).__name__}. "
            'Pass a dict, such as {"text": model.text, "audio": model.audio}.'
        )
    if len(groups) < 2:
        raise ValueError(
            f"`groups` must hold at least two groups. Got {len(groups)}. Name every branch that should be balanced."
        )
    members: dict[int, tuple[int, Tensor]] = {}
    labels: dict[int, str] = {}
    for index, (name, group) in enumerate(groups.items()):
        if not isinstance(name, str):
            raise TypeError(f"`groups` must have string names. Got {name!r}. Use a string key.")
        parameters = _labelled(name, group)
        if not parameters:
            raise ValueError(
                f"`groups[{name!r}]` must hold at least one parameter. Got none. "
                "Was a generator already consumed, or the module flattened by FSDP1? Pass the module, or a list."
            )
        for label, parameter in parameters:
            owner, _ = members.setdefault(id(parameter), (index, parameter))
            first = labels.setdefault(id(parameter), label)
            if owner != index:
                raise ValueError(
                    f"`groups` must be disjoint. Got {label}, shape {tuple(parameter.shape)}, which is also {first}. "
                    "Give a shared (tied) parameter to one group, or to none."
                )
    return members


def _labelled(name: str, group: nn.Module | Iterable[Tensor]) -> list[tuple[str, Tensor]]:
    if isinstance(group, nn.Module):
        return [(f"{name}.{label}", p) for label, p in group.named_parameters()]
    if isinstance(group, Tensor) or not isinstance(group, Iterable):
        raise TypeError(
            f"`groups[{name!r}]` must be a module or an iterable of parameters. Got {type(group).__name__}. "
            "Wrap a single parameter in a list."
        )
    parameters = list(group)
    for p in parameters:
        if not isinstance(p, Tensor):
            raise TypeError(
                f"`groups[{name!r}]` must hold parameters. Got {type(p).__name__}. Pass `module.parameters()`."
            )
    return [(f"{name}[{i}]", p) for i, p in enumerate(parameters)]
