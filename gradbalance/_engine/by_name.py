"""Groups by the names of modules and parameters."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn


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
            matches = {name: p for name, p in named.items() if _is_within(name, pattern) or fnmatchcase(name, pattern)}
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
