"""Groups of parameters: by name, and which parameter of an optimizer is in which group."""

import difflib
from collections.abc import Iterable, Mapping, Sequence, Set
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, TypeGuard

from torch import Size, Tensor, nn

from gradbalance._warn import warn

__all__ = ["groups_by_name"]

Groups = Mapping[str, nn.Module | Iterable[Tensor]]
ParamGroups = Sequence[Mapping[str, Any]]


def groups_by_name(
    model: nn.Module, /, **patterns: str | Sequence[str]
) -> dict[str, list[nn.Parameter]]:
    """The parameters of ``model`` under the patterns of each group, by name of the group.

    ``print`` it to see how many entries and which modules are in each group, and which are in none.

    Args:
        model: The module whose ``named_parameters()`` and ``named_modules()`` are searched.
        **patterns: For each group the name of a module (all its parameters), the name of a
            parameter, a glob over parameter names (``*``, ``?``, ``[av]``), or a list of these.

    Raises:
        ValueError: If a pattern matches nothing; the message lists the closest names.
        TypeError: If ``model`` is not a module or a pattern is not a string.

    Example:
        >>> layers = {"text": nn.Linear(2, 2), "audio": nn.Linear(3, 2), "video": nn.Linear(4, 2)}
        >>> groups = groups_by_name(nn.ModuleDict(layers), text="text", av=["audio.weight", "v*"])
        >>> {name: len(parameters) for name, parameters in groups.items()}
        {'text': 2, 'av': 3}
        >>> print(groups)
        text         6  text
        av          16  audio.weight, video
        (no group)   2  audio.bias
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"`model` must be an nn.Module. Got {type(model).__name__}. Pass the module itself."
        )
    groups = {}
    for group, given in patterns.items():
        names = [given] if isinstance(given, str) else given
        groups[group] = NamedParameters(model, _checked_patterns(model, group, names))
    return NamedGroups(groups, model)


class NamedParameters(list[nn.Parameter]):
    """The parameters of a model under some patterns, which can be looked up again.

    Sharding and casting replace the parameters of a model; their names stay.
    """

    def __init__(self, model: nn.Module, patterns: Sequence[str]) -> None:
        self.model = model
        self.patterns = patterns
        super().__init__(self.current())

    def current(self) -> list[nn.Parameter]:
        """The parameters that the model has under the patterns now, each once."""
        return [p for _, p in self.named()]

    def named(self) -> list[tuple[str, nn.Parameter]]:
        """The same with their names."""
        parameters: dict[int, tuple[str, nn.Parameter]] = {}
        for name, p in self.model.named_parameters(remove_duplicate=False):
            if any(_matches(name, pattern) for pattern in self.patterns):
                parameters.setdefault(id(p), (name, p))
        return list(parameters.values())

    def __reduce__(self) -> tuple[object, ...]:
        return list, (list(self),)


class NamedGroups(dict[str, list[nn.Parameter]]):
    """Groups that print as an overview: what is in which group, and what is in none."""

    def __init__(self, groups: Mapping[str, list[nn.Parameter]], model: nn.Module) -> None:
        super().__init__(groups)
        self._model = model

    def __str__(self) -> str:
        named = dict(self._model.named_parameters(remove_duplicate=False))
        group_of = {id(p): group for group, parameters in self.items() for p in parameters}
        rows = []
        for group in [*self, "(no group)"]:
            own = {}
            for name, p in named.items():
                if group_of.get(id(p), "(no group)") == group:
                    own[name] = p
            unique = {id(p): p for p in own.values()}
            size = sum(p.numel() for p in unique.values())
            rows.append((group, f"{size:,}", ", ".join(_condensed(own, named)) or "nothing"))
        left = max(len(group) for group, _, _ in rows)
        right = max(len(size) for _, size, _ in rows)
        return "\n".join(f"{group:{left}}  {size:>{right}}  {names}" for group, size, names in rows)

    def __reduce__(self) -> tuple[object, ...]:
        return dict, (dict(self),)


def _checked_patterns(model: nn.Module, group: str, patterns: object) -> list[str]:
    names: list[object] = [patterns]
    if isinstance(patterns, Iterable) and not isinstance(patterns, nn.Module | Tensor | bytes):
        names = list(patterns)
    if not names:
        raise ValueError(
            f"`{group}` must hold at least one name or glob. Got {patterns!r}. "
            "Leave the group out, or name its modules."
        )
    checked = []
    named = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    for pattern in names:
        if not isinstance(pattern, str):
            raise TypeError(
                f"`{group}` must be a name, a glob or a list of them. "
                f"Got {type(pattern).__name__}. "
                "Pass modules and parameters to the optimizer wrapper directly."
            )
        if not any(_matches(name, pattern) for name in named):
            modules = [name for name, _ in model.named_modules() if name]
            close = difflib.get_close_matches(pattern, [*modules, *named], n=3, cutoff=0.4)
            top = ", ".join(name for name, _ in model.named_children())
            closest = f"Closest: {', '.join(close)}. " if close else ""
            raise ValueError(
                f"`{group}` must match a module or parameter. "
                f"Got {pattern!r}, which matches nothing. "
                f"{closest}Top-level modules: {top or 'none'}."
            )
        checked.append(pattern)
    return checked


def _matches(name: str, pattern: str) -> bool:
    return _is_within(name, pattern) or fnmatchcase(name, pattern)


def _is_within(name: str, path: str) -> bool:
    return name == path or name.startswith(path + ".")


def _condensed(names: Iterable[str], among: Iterable[str]) -> list[str]:
    """The names, with a module in the place of its parameters if it has all of them."""
    others = set(among) - set(names)
    chosen: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        for i in range(len(parts)):
            path = ".".join(parts[: i + 1])
            if not any(_is_within(other, path) for other in others):
                chosen[path] = None
                break
    return list(chosen)


Key = tuple[int, tuple[object, ...]]


class Place(NamedTuple):
    """What is remembered of a parameter of the optimizer, without holding it.

    Sharding replaces parameters, and the old ones must not stay in memory. A weak reference would
    keep torch from swapping them in place.

    Attributes:
        id: Of the parameter.
        description: Its class and shape: an ``id`` may be given again.
        shape: Its shape.
        group: Index of its group, None for none.
    """

    id: int
    description: tuple[object, ...]
    shape: Size
    group: int | None

    def key(self, is_held: bool) -> object:
        """What tells the parameter from others: its ``id`` alone while it is held."""
        return self.id if is_held else (self.id, self.description)


class Membership:
    """Which parameter of an optimizer is in which group.

    A parameter is known by identity, wherever it stands. A tensor that nobody knows (after
    sharding, casting) has the group of the one that stood in its place.

    Args:
        param_groups: Of the optimizer.
        groups: As the user gives them.
        fewest: Number of groups that there must be at least.

    Attributes:
        names: The groups, in order.
        group_of: Index of the group of each grouped parameter that requires a gradient, by ``id``.

    Raises:
        TypeError: If ``groups`` is not a mapping from names to modules or parameters.
        ValueError: If there are too few groups, or a group is empty, overlaps another, or holds
            parameters that the optimizer does not have. Of a module it must have some.

    Warns:
        UserWarning: If no parameter of a group requires a gradient, or the optimizer does not have
            all that do.
    """

    def __init__(self, param_groups: ParamGroups, groups: Groups, fewest: int = 2) -> None:
        labelled = _checked_groups(groups, fewest)
        self.names = tuple(groups)
        of_modules = {name for name, group in groups.items() if _is_looked_up(group)}
        _check_held(param_groups, labelled, of_modules)
        # Modules and names are asked anew whenever the parameters change. Of the other groups those
        # parameters are held which the optimizer does not have, as they are frozen.
        present = set(map(id, _tensors(param_groups)))
        self._sources: list[nn.Module | Sequence[Tensor]] = []
        for group, own in zip(groups.values(), labelled.values(), strict=True):
            if _is_looked_up(group):
                self._sources.append(group)
            else:
                self._sources.append([p for _, p in own if id(p) not in present])
        self._places: list[list[Place]] = []
        # From the first step on the parameters are held, so that no ``id`` is given again: those of
        # the optimizer, and those of lists that were taken out of it and may come back.
        self._held: dict[int, tuple[Tensor, int | None]] = {}
        # Before that an ``id`` alone may be that of a tensor that took the place of a parameter.
        self._described: dict[Key, int | None] = {}
        given: dict[int, int | None] = {}
        for m, own in enumerate(labelled.values()):
            for _, p in own:
                given[id(p)] = m
        self._remember(param_groups, given)

    @classmethod
    def of_copy(
        cls,
        param_groups: ParamGroups,
        names: tuple[str, ...],
        positions: Sequence[Sequence[int | None]],
        frozen: Mapping[str, list[Tensor]],
    ) -> "Membership":
        """The membership of a copy of an optimizer.

        Args:
            param_groups: Of the copy.
            names: The groups.
            positions: Index of the group of each parameter in each of the ``param_groups``.
            frozen: Parameters of each group that the optimizer does not hold.
        """
        membership = cls.__new__(cls)
        membership.names = names
        membership._sources = [frozen[name] for name in names]
        membership._places = []
        membership._held = {}
        membership._described = {}
        group_of = {}
        for group, of in zip(param_groups, positions, strict=True):
            for p, m in zip(group["params"], of, strict=True):
                group_of[id(p)] = m
        membership._remember(param_groups, group_of)
        return membership

    def update(self, param_groups: ParamGroups) -> None:
        """Look up the groups of an optimizer's parameters again, after they have changed.

        Raises:
            RuntimeError: If other tensors have taken the place of the parameters of a group, as
                under engines that flatten them.
        """
        tensors = _tensors(param_groups)
        if any(map(_is_flattened, tensors)):
            raise RuntimeError(
                "The optimizer must hold the parameters of the groups. "
                f"Got flattened ones. {FLATTENED}"
            )
        group_of, replaced = self._look_up(param_groups)
        remaining = set(group_of.values())
        lost: list[int] = []
        for m in range(len(self.names)):
            stood = any(place.group == m for places in self._places for place in places)
            if stood and m not in remaining:
                lost.append(m)
        taken = [place for place, p in replaced if place.group in lost and place.shape != p.shape]
        if taken or len(lost) == len(self.names):
            raise RuntimeError(self._lost_message(lost, tensors))
        for place, _ in replaced:
            self._held.pop(place.id, None)
            self._described.pop((place.id, place.description), None)
        # A module knows its parameters itself, and parameters of no group need not be known.
        for p, group in list(self._held.values()):
            if group is None or not isinstance(self._sources[group], list):
                del self._held[id(p)]
        for p in tensors:
            self._held[id(p)] = p, group_of[id(p)]
        self._remember(param_groups, group_of)
        for m in lost:
            warn(
                f"The optimizer holds no parameter of group `{self.names[m]}` any more: the group "
                "takes no part."
            )

    def positions(self, param_groups: ParamGroups) -> list[list[int | None]]:
        """Index of the group of each parameter in each of the ``param_groups``, None for none."""
        group_of, _ = self._look_up(param_groups)
        return [[group_of[id(p)] for p in group["params"]] for group in param_groups]

    def current(self, param_groups: ParamGroups) -> dict[int, int]:
        """Index of the group of each grouped parameter that requires a gradient, by ``id``."""
        known, _ = self._look_up(param_groups)
        group_of = {}
        for p in _tensors(param_groups):
            m = known[id(p)]
            if m is not None and p.requires_grad:
                group_of[id(p)] = m
        return group_of

    def frozen(self, param_groups: ParamGroups) -> dict[str, list[Tensor]]:
        """Frozen parameters of each group that the optimizer does not hold."""
        present = set(map(id, _tensors(param_groups)))
        frozen: dict[str, list[Tensor]] = {}
        for name, source in zip(self.names, self._sources, strict=True):
            frozen[name] = []
            for p in _current(source):
                if id(p) not in present and not p.requires_grad:
                    frozen[name].append(p)
        return frozen

    def extents(self, param_groups: ParamGroups) -> dict[str, "Extent"]:
        """How many entries each group has, and which of them train."""
        present = set(map(id, _tensors(param_groups)))
        members: list[dict[int, tuple[str, Tensor]]] = []
        for name, source in zip(self.names, self._sources, strict=True):
            members.append({id(p): (label, p) for label, p in _labelled(name, source)})
        for group, of in zip(param_groups, self.positions(param_groups), strict=True):
            for p, m in zip(group["params"], of, strict=True):
                if m is not None:
                    members[m].setdefault(id(p), (self.names[m], p))
        extents = {}
        for name, own in zip(self.names, members, strict=True):
            entries = trainable = 0
            missing: list[tuple[str, Tensor]] = []
            for label, p in own.values():
                entries += p.numel()
                if p.requires_grad:
                    trainable += p.numel()
                    if id(p) not in present:
                        missing.append((label, p))
            held = trainable - sum(p.numel() for _, p in missing)
            extents[name] = Extent(entries, trainable, held, [label for label, _ in missing])
        return extents

    def is_module(self) -> dict[str, bool]:
        """Whether each group was given as a module."""
        return {
            name: isinstance(source, nn.Module)
            for name, source in zip(self.names, self._sources, strict=True)
        }

    def sizes(self, param_groups: ParamGroups) -> dict[str, int]:
        """Number of trainable entries of each group."""
        sizes = dict.fromkeys(self.names, 0)
        for group, of in zip(param_groups, self.positions(param_groups), strict=True):
            for p, m in zip(group["params"], of, strict=True):
                if m is not None and p.requires_grad:
                    sizes[self.names[m]] += p.numel()
        return sizes

    def _look_up(
        self, param_groups: ParamGroups
    ) -> tuple[dict[int, int | None], list[tuple[Place, Tensor]]]:
        """The group of each parameter by ``id``, and the places at which unknown tensors stand."""
        known: dict[int, int | None] = {}
        for held, m in self._held.values():
            known[id(held)] = m
        for m, source in enumerate(self._sources):
            for p in _current(source):
                known[id(p)] = m
        standing = set()
        for p in _tensors(param_groups):
            standing |= {id(p), (id(p), _description(p))}
        group_of: dict[int, int | None] = {}
        replaced = []
        for i, group in enumerate(param_groups):
            for j, p in enumerate(group["params"]):
                before = self._place(i, j)
                key = id(p), _description(p)
                group_of[id(p)] = None
                if id(p) in known:
                    group_of[id(p)] = known[id(p)]
                elif before is not None and before.id == id(p):
                    group_of[id(p)] = before.group
                elif key in self._described:
                    group_of[id(p)] = self._described[key]
                elif before is not None and before.key(bool(self._held)) not in standing:
                    replaced.append((before, p))
                    if p.shape == before.shape:
                        group_of[id(p)] = before.group
        return group_of, replaced

    def _remember(self, param_groups: ParamGroups, group_of: Mapping[int, int | None]) -> None:
        self._places = []
        self.group_of = {}
        for group in param_groups:
            places = []
            for p in group["params"]:
                m = group_of.get(id(p))
                places.append(Place(id(p), _description(p), p.shape, m))
                # Not of a module, which is asked: it may let go of a parameter, whose `id` then
                # comes back as that of another tensor.
                if m is None or isinstance(self._sources[m], list):
                    self._described[id(p), _description(p)] = m
                if m is not None and p.requires_grad:
                    self.group_of[id(p)] = m
            self._places.append(places)

    def _place(self, i: int, j: int) -> Place | None:
        if i < len(self._places) and j < len(self._places[i]):
            return self._places[i][j]
        return None

    def _lost_message(self, lost: list[int], tensors: Sequence[Tensor]) -> str:
        names = ", ".join(f"`{self.names[m]}`" for m in lost)
        if not tensors:
            got = "empty `param_groups`"
        else:
            got = f"{len(tensors)} tensors, the first of shape {tuple(tensors[0].shape)}"
        return (
            f"The optimizer must hold the parameters of the groups. Those of {names} are gone. "
            f"Got {got}. Call `remove()` and wrap the optimizer again with the parameters that it "
            f"has now. If an engine flattened them: {FLATTENED}"
        )


class Extent(NamedTuple):
    """How large a group is.

    Attributes:
        entries: Of all its parameters.
        trainable: Entries of those that require a gradient.
        held: Entries of those of them that the optimizer has.
        missing: Names of those of them that the optimizer does not have.
    """

    entries: int
    trainable: int
    held: int
    missing: list[str]


def _is_looked_up(group: object) -> TypeGuard[nn.Module | NamedParameters]:
    """Whether the group is asked for its parameters whenever they may have changed."""
    return isinstance(group, nn.Module | NamedParameters)


def _tensors(param_groups: ParamGroups) -> list[Tensor]:
    """All parameters of an optimizer."""
    tensors: list[Tensor] = []
    for group in param_groups:
        tensors += group["params"]
    return tensors


def _description(p: Tensor) -> tuple[object, ...]:
    return type(p), p.shape


def _current(source: nn.Module | Sequence[Tensor]) -> Iterable[Tensor]:
    if isinstance(source, nn.Module):
        return source.parameters()
    if isinstance(source, NamedParameters):
        return source.current()
    return source


Labelled = dict[str, list[tuple[str, Tensor]]]

FLATTENED = (
    "DeepSpeed ZeRO and FSDP1 replace parameters by flat ones that keep no gradient per "
    "parameter: use FSDP2 (fully_shard), or call `coefficients_for` of the object that `attach` "
    "returns between backward and step."
)


def _is_flattened(parameter: Tensor) -> bool:
    """Whether the parameter is, or is a view of, a flat buffer of FSDP1 or DeepSpeed ZeRO."""
    marks = ("_fsdp_flattened", "_hp_mapping", "ds_id")
    return any(hasattr(parameter, mark) for mark in marks)


def _check_held(param_groups: ParamGroups, labelled: Labelled, of_modules: Set[str]) -> None:
    """Check that the optimizer has the trainable parameters of the groups, or some of a module."""
    present = set(map(id, _tensors(param_groups)))
    flattened = any(_is_flattened(p) for own in labelled.values() for _, p in own)
    if not present:
        way_out = FLATTENED if flattened else "Build it from the parameters of the model."
        raise ValueError(f"`optimizer` must hold parameters. Got empty `param_groups`. {way_out}")
    for name, own in labelled.items():
        trainable = []
        missing = []
        for label, p in own:
            if p.requires_grad:
                trainable.append((label, p))
                if id(p) not in present:
                    missing.append((label, p))
        if not any(id(p) in present or isinstance(p, nn.Parameter) for _, p in own):
            raise ValueError(
                f"`groups[{name!r}]` must hold parameters. Got tensors that are none, such as "
                "`p.data`, `p.detach()` or the values of a `state_dict()`. "
                "Pass the module, or `module.parameters()`."
            )
        if not trainable:
            warn(
                f"No parameter of group `{name}` requires a gradient: the group is frozen and "
                "takes no part."
            )
        is_partial = 0 < len(missing) < len(trainable)
        if is_partial and name in of_modules and not flattened:
            warn(
                f"The optimizer does not have {len(missing)} of the {len(trainable)} trainable "
                f"parameters of group `{name}`, the first being {missing[0][0]}. "
                "Add them to the optimizer, or freeze them."
            )
        elif missing:
            label, p = missing[0]
            if flattened:
                way_out = FLATTENED
            elif len(missing) == len(trainable):
                way_out = (
                    "If another optimizer trains it, put all branches into param_groups of one "
                    "optimizer; if the model was moved or copied, build the optimizer after that."
                )
            else:
                way_out = "Add them to the optimizer, or freeze them."
            raise ValueError(
                f"`groups[{name!r}]` must hold parameters of the optimizer. Got {len(missing)} of "
                f"{len(own)} that it does not have, the first being {label} with shape "
                f"{tuple(p.shape)}. {way_out}"
            )
    if flattened:
        raise RuntimeError(
            "`groups` must hold parameters with gradients of their own. Got flattened ones. "
            + FLATTENED
        )


def _checked_groups(groups: object, fewest: int) -> Labelled:
    """The parameters of each group with a label for messages."""
    if not isinstance(groups, Mapping):
        raise TypeError(
            f"`groups` must map names to modules or parameters. Got {type(groups).__name__}. "
            'Pass a dict, such as {"text": model.text, "audio": model.audio}.'
        )
    if len(groups) < fewest:
        count = "two groups" if fewest > 1 else "one group"
        raise ValueError(
            f"`groups` must hold at least {count}. Got {len(groups)}. "
            "Name every branch that should be balanced. To look at one, pass `rule=rules.Watch()`."
        )
    labelled: Labelled = {}
    owners: dict[int, tuple[str, str]] = {}
    for name, group in groups.items():
        if not isinstance(name, str):
            raise TypeError(f"`groups` must have string names. Got {name!r}. Use a string key.")
        labelled[name] = []
        for label, p in _labelled(name, group):
            if id(p) not in owners:
                owners[id(p)] = name, label
                labelled[name].append((label, p))
            elif owners[id(p)][0] != name:
                raise ValueError(
                    f"`groups` must be disjoint. Got {label}, shape {tuple(p.shape)}, which is "
                    f"also {owners[id(p)][1]}. "
                    "Give a shared (tied) parameter to one group, or to none."
                )
        if not labelled[name]:
            raise ValueError(
                f"`groups[{name!r}]` must hold at least one parameter. Got none. "
                "Was a generator already consumed, or the module flattened by FSDP1? "
                "Pass the module, or a list."
            )
    return labelled


def _labelled(name: str, group: object) -> list[tuple[str, Tensor]]:
    if isinstance(group, nn.Module):
        return [(f"{name}.{label}", p) for label, p in group.named_parameters()]
    if isinstance(group, NamedParameters):
        return [(label, p) for label, p in group.named()]
    if isinstance(group, Tensor):
        raise TypeError(
            f"`groups[{name!r}]` must be a module or an iterable of parameters. "
            f"Got {type(group).__name__}. Wrap a single parameter in a list."
        )
    if callable(group) and not isinstance(group, Iterable):
        raise TypeError(
            f"`groups[{name!r}]` must be a module or an iterable of parameters. Got {group!r}. "
            "Call it: `module.parameters()`."
        )
    if not isinstance(group, Iterable):
        raise TypeError(
            f"`groups[{name!r}]` must be a module or an iterable of parameters. "
            f"Got {type(group).__name__}. Pass `module.parameters()`."
        )
    labelled = []
    for i, p in enumerate(group):
        if not isinstance(p, Tensor):
            raise TypeError(
                f"`groups[{name!r}]` must hold parameters. Got {type(p).__name__}. "
                "Pass `module.parameters()`."
            )
        labelled.append((f"{name}[{i}]", p))
    return labelled
