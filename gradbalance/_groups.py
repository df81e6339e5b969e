"""From names to parameters: which parameter belongs to which group, and every error of the construction."""

import difflib
import fnmatch
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

UNGROUPED = -1

Groups = Mapping[str, nn.Module | Iterable[Tensor]]
ParamGroups = Sequence[Mapping[str, Any]]


def groups_by_name(model: nn.Module, **patterns: str | Sequence[str]) -> dict[str, list[nn.Parameter]]:
    """The parameters of ``model`` under each group's patterns: a dict from group name to parameters.

    ``print`` it to see how many entries and which modules are in each group, and which are in none.

    Args:
        model: The module whose ``named_parameters()`` and ``named_modules()`` are searched.
        **patterns: For each group the name of a module (all its parameters), the name of a parameter, a glob over
            parameter names (``*``, ``?``, ``[av]``), or a list of these.

    Raises:
        ValueError: If a pattern matches nothing; the message lists the closest names.
        TypeError: If ``model`` is not a module or a pattern is not a string.

    Example:
        >>> model = nn.ModuleDict({"text": nn.Linear(2, 2), "audio": nn.Linear(3, 2), "video": nn.Linear(4, 2)})
        >>> groups = groups_by_name(model, text="text", av=["audio.weight", "v*"])
        >>> {name: len(parameters) for name, parameters in groups.items()}
        {'text': 2, 'av': 3}
        >>> print(groups)
        text         6  text
        av          16  audio.weight, video
        (no group)   2  audio.bias
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be an nn.Module. Got {type(model).__name__}. Pass the module itself.")
    named = dict(model.named_parameters(remove_duplicate=False))  # a tied parameter has several names
    groups = {}
    for group, names in patterns.items():
        found: dict[str, nn.Parameter] = {}
        for pattern in [names] if isinstance(names, str) else names:
            if not isinstance(pattern, str):
                raise TypeError(
                    f"`{group}` must be a name, a glob or a list of them. Got {pattern!r}. "
                    "Pass modules and parameters to the optimizer wrapper directly."
                )
            matches = {name: p for name, p in named.items() if _matches(name, pattern)}
            if not matches:
                modules = [name for name, _ in model.named_modules() if name]
                close = difflib.get_close_matches(pattern, [*modules, *named], n=3, cutoff=0.4)
                top = ", ".join(name for name, _ in model.named_children())
                raise ValueError(
                    f"`{group}` must match a module or parameter. Got {pattern!r}, which matches nothing. "
                    + (f"Closest: {', '.join(close)}. " if close else "")
                    + f"Top-level modules: {top or 'none'}."
                )
            found |= matches
        groups[group] = list({id(p): p for p in found.values()}.values())
    return NamedGroups(groups, named)


def _matches(name: str, pattern: str) -> bool:
    return _is_within(name, pattern) or fnmatch.fnmatchcase(name, pattern)


def _is_within(name: str, path: str) -> bool:
    return name == path or name.startswith(path + ".")


class NamedGroups(dict[str, list[nn.Parameter]]):
    """Groups that print as an overview: what is in which group, and what is in none."""

    def __init__(self, groups: Mapping[str, list[nn.Parameter]], named: Mapping[str, nn.Parameter]) -> None:
        super().__init__(groups)
        self._named = named

    def __str__(self) -> str:
        group_of = {id(p): group for group, parameters in self.items() for p in parameters}
        rows = []
        for group in [*self, "(no group)"]:
            own = {name: p for name, p in self._named.items() if group_of.get(id(p), "(no group)") == group}
            size = sum(p.numel() for p in {id(p): p for p in own.values()}.values())
            rows.append((group, f"{size:,}", ", ".join(_condensed(own, self._named)) or "nothing"))
        left, right = (max(len(row[i]) for row in rows) for i in (0, 1))
        return "\n".join(f"{group:{left}}  {size:>{right}}  {names}" for group, size, names in rows)


def _condensed(names: Iterable[str], among: Iterable[str]) -> list[str]:
    """``names``, with a module in place of its parameters wherever they are all there."""
    others = set(among) - set(names)
    chosen: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        paths = (".".join(parts[: i + 1]) for i in range(len(parts)))
        chosen[next(path for path in paths if not any(_is_within(other, path) for other in others))] = None
    return list(chosen)


class Assignment(NamedTuple):
    """Which group each parameter of the optimizer belongs to."""

    names: tuple[str, ...]
    members: dict[int, tuple[int, Tensor]]  # id of a parameter -> its group, and the parameter itself
    of: list[list[int]]  # the group of each position of each param_group, or UNGROUPED
    shapes: list[list[Any]]  # the shape of the parameter at each position


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
            flattened = any(is_flattened(p) for p in own)
            raise ValueError(
                f"`groups[{name!r}]` must hold parameters of the optimizer. Got {len(missing)} of {len(own)} that it "
                f"does not have, the first at index {missing[0]} with shape {tuple(own[missing[0]].shape)}. "
                + (FLATTENED if flattened else "Build the optimizer from the same model, after moving or wrapping it.")
            )
    if any(is_flattened(p) for _, p in members.values()):
        raise RuntimeError(
            f"`groups` must hold parameters with gradients of their own. Got flattened ones. {FLATTENED}"
        )
    return Assignment(
        tuple(groups),
        members,
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
        new = [assignment.members.get(id(p), (UNGROUPED,))[0] for p in parameters[len(known) :]]
        of.append([*known, *new])
        shapes.append([p.shape for p in parameters])
    if not any(m != UNGROUPED for group_of in of for m in group_of):
        raise RuntimeError(
            f"The optimizer must hold the parameters of the groups. Got none of them any more. {FLATTENED}"
        )
    return assignment._replace(of=of, shapes=shapes)


FLATTENED = (
    "DeepSpeed ZeRO and FSDP1 replace parameters by flat ones that keep no gradient per parameter: use FSDP2 "
    "(fully_shard), or call `Penalty.coefficients_for` between backward and step."
)


def is_flattened(parameter: Tensor) -> bool:
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
