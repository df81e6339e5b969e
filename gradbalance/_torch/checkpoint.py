"""What a penalty remembers inside an optimizer's own checkpoints, in its first param_group."""

from collections.abc import Callable
from typing import Any
from weakref import proxy

from torch.optim import Optimizer

from gradbalance._torch.unwrap import layers

KEY = "gradbalance"


class Checkpoint:
    """Puts what is remembered into each ``state_dict`` of an optimizer, and takes it out of each one that is loaded.

    Args:
        optimizer: As the user has it: some wrappers save and load for the optimizer that they wrap.
        steppers: Whose param_groups to search for what a checkpoint brought.
        save: Gives what is remembered, in builtin types; None to leave the checkpoints without it.
        load: Takes it back.
    """

    def __init__(
        self,
        optimizer: Any,
        steppers: tuple[Optimizer, ...],
        save: Callable[[], dict[str, Any]] | None,
        load: Callable[[dict[str, Any]], None],
    ) -> None:
        self._steppers = [proxy(stepper) for stepper in steppers]  # which hold this
        self._save, self._load = save, load
        self._handles: list[Any] = []
        self.take_in()
        for layer in layers(optimizer):
            if "_optimizer_state_dict_post_hooks" in vars(layer):  # else it leaves both to the one that it wraps
                self._handles.append(layer.register_state_dict_post_hook(self._saving))
                self._handles.append(layer.register_load_state_dict_pre_hook(self._loading))

    def take_in(self) -> None:
        """Move what a checkpoint brought out of the param_group, whoever loaded it and when."""
        for optimizer in self._steppers:  # ZeroRedundancyOptimizer copies from one to the other
            for group in optimizer.param_groups[:1]:
                if KEY in group:
                    self._move(group)

    def remove(self) -> None:
        """Leave the checkpoints alone from now on."""
        self.take_in()
        for handle in self._handles:
            handle.remove()

    def _saving(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        self.take_in()
        if self._save is not None and state_dict.get("param_groups"):
            # A tuple: of a dict torch.distributed.checkpoint would load only those keys that are there before.
            first = state_dict["param_groups"][0]
            first.pop(KEY, None)  # of the live one, see below: two checkpoints in turn are to be alike
            first[KEY] = (self._save(),)
            # And flattened (`flatten_optimizer_state_dict`) it loads only the keys of the live param_groups.
            optimizer.param_groups[0][KEY] = ()

    def _loading(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any] | None:
        first, *others = state_dict.get("param_groups") or [{}]
        if KEY not in first:
            return None  # what else is missing is for the optimizer to say
        first = dict(first)
        self._move(first)
        return {**state_dict, "param_groups": [first, *others]}

    def _move(self, group: dict[str, Any]) -> None:
        saved = group[KEY]
        try:
            for remembered in saved if self._save is not None else ():
                self._load(remembered)
        except (KeyError, TypeError) as error:
            missing = f"none of the key {error}" if isinstance(error, KeyError) else f"{type(saved).__name__}"
            raise ValueError(
                f"`state_dict` must hold what the penalty saved under {KEY!r} in its first param_group. Got {missing}. "
                "Load a checkpoint of this version, or build with `persist=False`."
            ) from error
        del group[KEY]
