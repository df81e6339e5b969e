"""The memory of the rule inside an optimizer's own checkpoints, in its first param_group."""

from typing import Any

from torch.optim import Optimizer

from gradbalance._memory import KEYS, Memory
from gradbalance._rates import LearningRates
from gradbalance._wrapped import layers, unwrap


class Checkpoint:
    """Puts a memory into each ``state_dict`` of an optimizer, and takes it out of each one that is loaded."""

    def __init__(self, optimizer: Optimizer, memory: Memory, rates: LearningRates, persist: bool) -> None:
        self._optimizers = unwrap(optimizer)
        self._memory, self._rates, self._persist = memory, rates, persist
        self.take_in()
        self._handles = []
        for layer in layers(optimizer):  # SAM saves and loads for the optimizer that it wraps
            if "_optimizer_state_dict_post_hooks" in vars(layer):  # else it leaves both to the one that it wraps
                self._handles.append(layer.register_state_dict_post_hook(self._save))
                self._handles.append(layer.register_load_state_dict_pre_hook(self._load))

    def take_in(self) -> None:
        """Move the state out of the param_group into which a checkpoint brought it, whoever loaded it and when."""
        for optimizer in self._optimizers:  # ZeroRedundancyOptimizer copies from one to the other
            for group in optimizer.param_groups[:1]:
                self._move(group)

    def remove(self) -> None:
        """Leave the checkpoints alone from now on."""
        for handle in self._handles:
            handle.remove()

    def _save(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        self.take_in()
        if self._persist:
            state_dict["param_groups"][0].update(self._memory.numbers())

    def _load(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        self._rates.restore()
        first, *others = state_dict["param_groups"]
        first = dict(first)
        self._move(first)
        return {**state_dict, "param_groups": [first, *others]}

    def _move(self, group: dict[str, Any]) -> None:
        if KEYS[0] in group:
            if self._persist:
                self._memory.restore(group)
            for key in KEYS:
                del group[key]
