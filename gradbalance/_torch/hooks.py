"""Something done before and after each step of an optimizer, however the step is called."""

from collections.abc import Callable
from functools import wraps
from types import MethodType
from typing import Any
from weakref import proxy, ref

import torch
from torch._compile import _disable_dynamo  # the public `torch.compiler.disable` takes seconds to import
from torch.optim import Optimizer


class StepHooks:
    """Calls ``before`` once the gradients are there, if need be after the closure, and ``after`` even if a step raises.

    Both stand next to the step itself: hooks of others that set a learning rate do so before the one and after the
    other, whenever they were registered. The optimizer holds this, so that nothing here holds the optimizer.

    Args:
        optimizer: Whose steps.
        owner: Whose hooks these are, for :func:`hooks_of`.
        before: Called before the parameters are updated.
        after: Called after the step, twice where its post-hooks run.
    """

    def __init__(self, optimizer: Optimizer, owner: Any, before: Callable[[], None], after: Callable[[], None]) -> None:
        self.owner = owner
        self._before, self._after = before, after
        self._unhooked = _UNHOOKED.format(type(optimizer).__name__)
        self._began = self._ran = False
        try:
            self._handles = [
                optimizer.register_step_pre_hook(self._before_step),
                optimizer.register_step_post_hook(self._after_step),
            ]
        except AttributeError as error:
            raise ValueError(self._unhooked) from error
        # On the instance, since the class is the user's; frameworks and schedulers patch `step` in the same place.
        self._patched_step = vars(optimizer).get("step")
        step = MethodType(self._guarded(optimizer), proxy(optimizer))  # a method: schedulers ask for its function
        vars(optimizer)["step"], self._step = step, ref(step)

    def remove(self, optimizer: Optimizer) -> None:
        """Take the hooks off the optimizer."""
        for handle in self._handles:
            handle.remove()
        own = vars(optimizer)
        if "step" in own and own["step"] is self._step():  # else a scheduler patched it since; it does no harm
            del own["step"]
            own.update({} if self._patched_step is None else {"step": self._patched_step})

    @_disable_dynamo
    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._began = True
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not callable(closure):  # some steps take something else there
            self._run_before()
            return None

        def closure_then_before() -> Any:  # the gradients are there only after the closure
            with torch.enable_grad():
                loss = closure()
            self._run_before()
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": closure_then_before}
        return (args[0], closure_then_before, *args[2:]), kwargs

    def _run_before(self) -> None:
        self._ran = True
        self._before()

    @_disable_dynamo
    def _after_step(self, *_: Any) -> None:
        if self._ran:
            self._after()

    @_disable_dynamo
    def _begin(self) -> None:
        self._began = self._ran = False
        for handle, last in zip(self._handles, (True, False), strict=True):
            hooks = handle.hooks_dict_ref()
            if hooks is not None and handle.id in hooks and next(reversed(hooks) if last else iter(hooks)) != handle.id:
                hooks.move_to_end(handle.id, last=last)

    @_disable_dynamo
    def _finish(self, raised: bool) -> None:
        if self._ran:
            self._after()
        hooked = self._handles[0].id in (self._handles[0].hooks_dict_ref() or ())
        if hooked and not self._began and not raised:
            raise RuntimeError(self._unhooked)

    def _guarded(self, optimizer: Optimizer) -> Callable[..., Any]:
        """Its step with an end that is reached even if it raises: then post-hooks do not run."""
        alive = ref(optimizer)
        step: Any = optimizer.step
        is_own = getattr(step, "__self__", None) is optimizer  # else a scheduler or a framework has patched it
        step = step.__func__ if is_own else step

        @wraps(step)
        def guarded(_: Optimizer, *args: Any, **kwargs: Any) -> Any:
            optimizer = alive()
            if optimizer is None:
                raise ReferenceError(_GONE)
            self._begin()
            raised = True
            try:
                result = step(optimizer, *args, **kwargs) if is_own else step(*args, **kwargs)
                raised = False
            finally:
                self._finish(raised)
            return result

        return guarded


_UNHOOKED = (
    "`optimizer` must run its step hooks. Got {}, whose `step` does not: its `__init__` does not call that of "
    "torch.optim.Optimizer. Wrap the optimizer inside it, or call `super().__init__`."
)
_GONE = "The optimizer must be there when it steps. Got its `step` alone. Keep the optimizer, and call its `step`."


def hooks_of(optimizer: Optimizer) -> StepHooks | None:
    """The :class:`StepHooks` on the optimizer, if any."""
    hooks = getattr(optimizer, "_optimizer_step_pre_hooks", {}).values()
    owners = (getattr(hook, "__self__", None) for hook in hooks)
    return next((owner for owner in owners if isinstance(owner, StepHooks)), None)
