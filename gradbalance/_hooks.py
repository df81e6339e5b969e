"""Something done before and after each step of an optimizer, however the step is called."""

from collections.abc import Callable
from functools import wraps
from types import MethodType
from typing import Any

import torch
from torch._compile import _disable_dynamo  # the public `torch.compiler.disable` takes seconds to import
from torch.optim import Optimizer


class StepHooks:
    """Calls ``before`` once the gradients are there, if need be after the closure, and ``after`` even if a step raises.

    Args:
        optimizer: Whose steps.
        owner: Whose hooks these are, for :func:`owner_of`.
        before: Called before the parameters are updated.
        after: Called after the step, twice where its post-hooks run.
    """

    def __init__(self, optimizer: Optimizer, owner: Any, before: Callable[[], None], after: Callable[[], None]) -> None:
        self.owner = owner
        self._optimizer, self._before, self._after = optimizer, before, after
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        # On the instance, since the class is the user's; frameworks and schedulers patch `step` in the same place.
        self._patched_step = vars(optimizer).get("step")
        self._step = MethodType(self._guarded(optimizer.step), optimizer)
        vars(optimizer)["step"] = self._step

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        own = vars(self._optimizer)
        if own.get("step") is self._step:  # else a scheduler patched it since; it does no harm
            del own["step"]
            own.update({} if self._patched_step is None else {"step": self._patched_step})

    @_disable_dynamo
    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not callable(closure):  # some steps take something else there
            self._before()
            return None

        def closure_then_before() -> Any:  # the gradients are there only after the closure
            with torch.enable_grad():
                loss = closure()
            self._before()
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": closure_then_before}
        return (args[0], closure_then_before, *args[2:]), kwargs

    @_disable_dynamo
    def _after_step(self, *_: Any) -> None:
        self._after()

    def _guarded(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """``step`` with an end that is reached even if it raises: then post-hooks do not run."""

        @wraps(step)
        def guarded(_: Optimizer, *args: Any, **kwargs: Any) -> Any:
            try:
                return step(*args, **kwargs)
            finally:
                self._after_step()

        return guarded


def owner_of(optimizer: Optimizer) -> Any:
    """Who hooked the steps of the optimizer with :class:`StepHooks`, or None."""
    hooks = (getattr(hook, "__self__", None) for hook in optimizer._optimizer_step_pre_hooks.values())
    return next((hook.owner for hook in hooks if isinstance(hook, StepHooks)), None)
