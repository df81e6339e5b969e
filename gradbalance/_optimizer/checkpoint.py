"""What a penalty remembers, inside the checkpoints, copies and pickles of its optimizer.

Everything goes through the optimizer's own ways of saving, so that no user has to save a second
object:

- **Checkpoints.** torch.distributed.checkpoint drops unknown top-level keys of a ``state_dict`` and
  loads a flattened one only for keys that the live ``param_groups`` have. So the first live
  param_group holds one key, :data:`KEY`, from construction on, empty but in a saved ``state_dict``.
  What a ``state_dict`` brings is checked before the optimizer loads it and taken after that, so
  that a load that fails changes nothing. Some loaders pass by the hooks of ``load_state_dict``;
  what they leave under the key is taken before the next step.
- **Copies and pickles.** ``Optimizer.__getstate__`` drops hooks, so that a copy would train without
  the penalty. ``__reduce_ex__`` on the instance, where ``copy`` and ``pickle`` look first, rebuilds
  the optimizer and puts the penalty on it again. Its groups are then lists of parameters, as a
  module in the pickle of an optimizer would bring all that it holds.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any, Protocol, SupportsIndex
from weakref import proxy

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from gradbalance._optimizer.unwrap import layers

KEY = "gradbalance"

# Builtin types, by name.
Saved = dict[str, Any]


def number_in(saved: object) -> float:
    """A number that was saved.

    Raises:
        TypeError: If it is none.
    """
    if isinstance(saved, bool) or not isinstance(saved, int | float):
        raise TypeError(f"{saved!r} in the place of a number")
    try:
        return float(saved)
    except OverflowError as error:
        raise TypeError("a number that fits into no float") from error


def count_in(saved: object) -> int:
    """A whole number >= 0 that was saved.

    Raises:
        TypeError: If it is none.
    """
    number = number_in(saved)
    if not 0 <= number < 1 << 53 or number != int(number):
        raise TypeError(f"{number!r} in the place of a count")
    return int(number)


class Remembers(Protocol):
    """Something whose memory is saved: builtin types, lists and dicts."""

    def save(self) -> Saved: ...

    def check(self, saved: Saved) -> None: ...

    def load(self, saved: Saved) -> None: ...


class Checkpoint:
    """Saves what is remembered in each ``state_dict`` of an optimizer, and takes it out again.

    Args:
        optimizer: As the user has it: some wrappers save and load for the optimizer that they wrap.
        steppers: Whose ``param_groups`` may hold what a checkpoint brought.
        memory: What is saved and loaded.
        persist: Whether to save; False leaves checkpoints without it.
    """

    def __init__(
        self, optimizer: object, steppers: tuple[Optimizer, ...], memory: Remembers, persist: bool
    ) -> None:
        self._steppers = [proxy(stepper) for stepper in steppers]  # which hold this
        self._memory = memory
        self._persist = persist
        self._handles: list[RemovableHandle] = []
        # Loaded since the last step. ZeroRedundancyOptimizer puts it into its param_groups again.
        self._recent: object = None
        self.load_pending()
        if persist:
            self._put_key()
        for layer in layers(optimizer):
            # Otherwise it leaves both to the one that it wraps.
            if "_optimizer_state_dict_post_hooks" in vars(layer):
                self._handles.append(layer.register_state_dict_post_hook(self._on_save))
                self._handles.append(layer.register_load_state_dict_pre_hook(self._before_load))
                self._handles.append(layer.register_load_state_dict_post_hook(self._after_load))

    def load_pending(self) -> None:
        """Take what a checkpoint left in the live ``param_groups``, whoever loaded it and when."""
        for optimizer in self._steppers:  # ZeroRedundancyOptimizer copies from one to the other
            for group in optimizer.param_groups:
                saved = group.get(KEY)
                is_new = self._persist and saved and saved != self._recent
                if is_new:
                    self._check(saved)
                if saved:
                    group[KEY] = ()
                if is_new:
                    self._recent = saved
                    self._memory.load(saved[0])

    def before_step(self) -> None:
        """Take what some loaders leave; from now on the same checkpoint may be loaded again."""
        self.load_pending()
        self._recent = None

    def remove(self) -> None:
        """Leave the checkpoints alone from now on."""
        self.load_pending()
        for handle in self._handles:
            handle.remove()
        for optimizer in self._steppers:
            for group in optimizer.param_groups:
                group.pop(KEY, None)

    def _put_key(self) -> None:
        for optimizer in self._steppers:
            groups = optimizer.param_groups
            if groups and not any(KEY in group for group in groups):
                groups[0][KEY] = ()

    def _on_save(self, optimizer: Optimizer, state_dict: Saved) -> None:
        self.load_pending()
        groups = state_dict.get("param_groups") or []
        for group in groups:
            group.pop(KEY, None)
        if self._persist and groups:
            # A tuple: of a dict torch.distributed.checkpoint loads only keys that it had before.
            groups[0][KEY] = (self._memory.save(),)

    def _before_load(self, optimizer: Optimizer, state_dict: Saved) -> None:
        if self._persist:
            for group in state_dict.get("param_groups") or []:
                if group.get(KEY):
                    self._check(group[KEY])

    def _after_load(self, optimizer: Optimizer) -> None:
        self.load_pending()
        if self._persist:
            self._put_key()

    def _check(self, saved: Sequence[Saved]) -> None:
        try:
            self._memory.check(saved[0])
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            what = f"without {error}" if isinstance(error, KeyError) else f"with {error}"
            raise ValueError(
                f"`state_dict` must hold what the penalty saved under {KEY!r} in its first "
                f"param_group. Got {type(saved).__name__} {what}. "
                "Load a checkpoint of this version, or build with `persist=False`."
            ) from error


def reduce(
    optimizer: Optimizer,
    protocol: SupportsIndex,
    rebuild: Callable[..., None],
    penalty: tuple[object, ...],
) -> tuple[object, ...]:
    """How an optimizer with a penalty is copied and pickled; see the docstring of this module.

    Args:
        optimizer: The optimizer.
        protocol: Of pickle.
        rebuild: Called with the rebuilt optimizer and the parts of the penalty.
        penalty: What the penalty is made of.
    """
    parts: Any = object.__reduce_ex__(optimizer, max(2, operator.index(protocol)))
    make, args, state = parts[:3]
    return _rebuild_optimizer, (make, args, state, rebuild, penalty)


def _rebuild_optimizer(
    make: Callable[..., Optimizer],
    args: tuple[object, ...],
    state: Saved,
    rebuild: Callable[..., None],
    penalty: tuple[object, ...],
) -> Optimizer:
    optimizer = make(*args)
    optimizer.__setstate__(state)
    rebuild(optimizer, *penalty)
    return optimizer
