"""Something done before and after each step of an optimizer, however the step is called."""

from collections.abc import Callable, Sequence
from functools import wraps
from types import MethodType
from typing import Any
from weakref import proxy, ref

import torch
from torch._compile import _disable_dynamo  # `torch.compiler.disable` takes seconds to import
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


class StepHooks:
    """Calls ``before`` once the gradients are complete, and ``after`` even if the step raises.

    Hooks of others that set a learning rate run before the one and after the other, whenever they
    were registered. A step that calls the step of its base class is one step: its hooks run twice,
    and only the outer ones count. The optimizer holds this object, which does not hold the
    optimizer.

    Args:
        optimizer: Whose steps.
        owner: Whose hooks these are, for :func:`hooks_of`.
        before: Called in turn before the parameters are updated, after the closure if there is one.
        after: Called after the step; calling it twice must do no harm.

    Raises:
        ValueError: If the optimizer has no step hooks.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        owner: object,
        before: Sequence[Callable[[], None]],
        after: Callable[[], None],
    ) -> None:
        self.owner = owner
        self._before = before
        self._after = after
        self._no_hooks = _NO_HOOKS.format(type(optimizer).__name__)
        self._depth = 0  # of hooked steps within each other
        self._is_running = False  # whether a guarded step runs
        self._was_called = False  # whether the hooks of the running step were called
        try:
            self._pre_hook = optimizer.register_step_pre_hook(self._before_step)
            self._post_hook = optimizer.register_step_post_hook(self._after_step)
        except AttributeError as error:
            raise ValueError(self._no_hooks) from error
        # On the instance, since the class is the user's. Frameworks and schedulers patch `step` in
        # the same place.
        self._patched_step = vars(optimizer).get("step")
        # A method, whose function schedulers ask for.
        step = MethodType(self._guarded(optimizer), proxy(optimizer))
        vars(optimizer)["step"] = step
        self._step = ref(step)

    def remove(self, optimizer: Optimizer) -> None:
        """Take the hooks off the optimizer."""
        self._pre_hook.remove()
        self._post_hook.remove()
        own = vars(optimizer)
        # If a scheduler has patched it since, it stays, and does no harm.
        if own.get("step") is self._step():
            del own["step"]
            if self._patched_step is not None:
                own["step"] = self._patched_step

    @_disable_dynamo
    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self._was_called = True
        self._depth += 1
        if self._depth > 1:
            return None
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not callable(closure):  # some steps take something else there
            self._run_before()
            return None

        def closure_then_before() -> Any:  # the gradients are complete only after the closure
            with torch.enable_grad():
                loss = closure()
            self._run_before()
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": closure_then_before}
        return (args[0], closure_then_before, *args[2:]), kwargs

    def _run_before(self) -> None:
        for before in self._before:
            before()

    @_disable_dynamo
    def _after_step(self, *_: object) -> None:
        self._depth = max(0, self._depth - 1)
        if self._depth == 0:
            self._after()

    def _guarded(self, optimizer: Optimizer) -> Callable[..., Any]:
        """The optimizer's step, with an end that is reached even if it raises."""
        alive = ref(optimizer)
        step: Any = optimizer.step
        # Otherwise a scheduler or a framework has patched it.
        is_own = getattr(step, "__self__", None) is optimizer
        if is_own:
            step = step.__func__

        @wraps(step)
        def guarded(_: Optimizer, *args: Any, **kwargs: Any) -> Any:
            optimizer = alive()
            if optimizer is None:
                raise ReferenceError(_GONE)
            if is_own:
                args = (optimizer, *args)
            if self._is_running:
                return step(*args, **kwargs)
            self._begin()
            try:
                result = step(*args, **kwargs)
            finally:
                self._end()
            if not self._was_called and self._is_registered():
                raise RuntimeError(self._no_hooks)
            return result

        return guarded

    @_disable_dynamo
    def _begin(self) -> None:
        self._depth = 0
        self._is_running = True
        self._was_called = False
        # The last to run before the step, and the first after it.
        _move(self._pre_hook, last=True)
        _move(self._post_hook, last=False)

    @_disable_dynamo
    def _end(self) -> None:
        self._depth = 0
        self._is_running = False
        self._after()

    def _is_registered(self) -> bool:
        return self._pre_hook.id in (self._pre_hook.hooks_dict_ref() or ())


def _move(handle: RemovableHandle, last: bool) -> None:
    hooks = handle.hooks_dict_ref()
    if hooks is not None and handle.id in hooks:
        hooks.move_to_end(handle.id, last=last)


_NO_HOOKS = (
    "`optimizer` must run its step hooks. Got {}, whose `step` does not: its `__init__` does not "
    "call that of torch.optim.Optimizer. Wrap the optimizer inside it, or call `super().__init__`."
)
_GONE = (
    "The optimizer must exist when it steps. Got its `step` alone. "
    "Keep the optimizer, and call its `step`."
)


def hooks_of(optimizer: Optimizer) -> StepHooks | None:
    """The :class:`StepHooks` on the optimizer, if any."""
    for hook in getattr(optimizer, "_optimizer_step_pre_hooks", {}).values():
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, StepHooks):
            return owner
    return None
