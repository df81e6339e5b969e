"""The engine: at each step of an optimizer it measures the groups, decides, and acts."""

from collections.abc import Callable, Mapping, Sequence
from math import nan, sqrt
from weakref import proxy

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradbalance._optimizer.checkpoint import Saved, count_in
from gradbalance._optimizer.scaling import Displacement, LearningRates
from gradbalance._step.gradients import Gradients, Layout, on_host
from gradbalance._step.measure import Reading, average, measure, world_size
from gradbalance._step.movement import Movement
from gradbalance._step.observed import ObservedErrors
from gradbalance._step.options import Options
from gradbalance._step.sketch import Sketch, parse
from gradbalance._step.state import State, name_of
from gradbalance._step.write import add_noise_, clip_factor, scale_, spreads
from gradbalance.balance import Balance
from gradbalance.groups import Membership


class Engine:
    """What happens before and after each step.

    Args:
        reader: The optimizer that lists all parameters.
        stepper: The one that steps.
        membership: The group of each parameter.
        scaling: How the step of a group is scaled; None where its gradients are, or nothing.
        options: Of the penalty.

    Attributes:
        coefficients: In force at the last step, one of each group.
    """

    def __init__(
        self,
        reader: Optimizer,
        stepper: Optimizer,
        membership: Membership,
        scaling: LearningRates | Displacement | None,
        options: Options,
    ) -> None:
        self._reader = proxy(reader)  # which holds this
        self._stepper = proxy(stepper)
        self.membership = membership
        self.scaling = scaling
        self._options = options
        self._amounts = options.noise_of(membership.names)
        self._acts = getattr(options.rule, "acts", True)
        is_clipped = options.max_norm is not None
        self._writes = options.apply_to == "gradient" or is_clipped or any(self._amounts)
        smoothing = options.smoothing**options.every
        scale_free = not isinstance(stepper, torch.optim.SGD)
        fewest = min(2, len(membership.names))  # one group alone can be watched
        self.state = State(membership.names, options.rule, smoothing, scale_free, fewest)
        self.observed = ObservedErrors(membership.names)
        self.coefficients = [1.0] * len(membership.names)
        self._listeners: list[Callable[[Balance], None]] = []
        self._begun = 0  # how often somebody began to listen
        self._layout: Layout | None = None
        self._sketch: Sketch | None = None
        self._movement: Movement | None = None
        self._watch_anywhere = 0  # the sum of `_own_watch` over the ranks, if they have shards
        self._watch_before = 0  # at the last measured step
        self._active = [False] * len(membership.names)  # at the last measured step, if it counted
        self._loaded_sketch: Saved = {}  # of a checkpoint, until there is a sketch
        self._reading: Reading | None = None  # of the last step, until it is decided on
        self._steps = 0  # however they ended: one of so many is measured

    @torch.no_grad()
    def before_step(self) -> None:
        """Measure, decide, act."""
        self.after_step()
        self.settle()
        layout = self._current_layout()
        _refuse_capture(layout.device)
        gradients = layout.gather(to_write=self._writes)
        is_inside = self.state.is_inside(self._options.window)
        reading, norms = self._measure(layout, gradients)
        active = gradients.plan.present
        if self._is_late(layout):
            self._reading = reading
        elif reading.is_measured or on_host(layout.device):
            active = self._decide(reading)
        else:  # a step that is not measured does not wait
            self._reading = reading
            if sum(active) < 2:
                active = [False] * len(active)
        self._steps += 1
        self.coefficients = self._in_force(active, is_inside)
        if self._writes:
            is_noisy = is_inside and any(self._amounts) and any(active)
            self._write(gradients, norms, is_noisy)
        if self._movement is not None and reading.is_measured:
            self._movement.begin(self._watch())  # and it ends before the next step
        if self.scaling is not None:
            self.scaling.begin(self.coefficients)

    def after_step(self) -> None:
        """Undo what was put in place for the step; may be called twice."""
        if self.scaling is not None:
            self.scaling.end()

    def settle(self) -> None:
        """Decide on the reading of the last step, if that has not been done."""
        reading = self._reading
        self._reading = None
        if reading is not None:
            self._decide(reading)

    def _measure(self, layout: Layout, gradients: Gradients) -> tuple[Reading, Tensor | None]:
        """What the step shows, and its unscaled norms if they are needed to clip."""
        options = self._options
        is_measured = self._steps % options.every == 0
        # The step before it is compared too: coherence is that of successive gradients.
        is_compared = is_measured or (self._steps + 1) % options.every == 0
        sketch = self._sketch if is_compared else None
        errors: Tensor | None = None
        if is_measured and self.observed.sums:
            errors = self.observed.take(layout.device)
        moved = {}
        if self._movement is not None:
            self._movement.end()
            if is_measured:
                moved = self._movement.take(self._own_watch())
        reads_alone = self._sketch is not None and self._sketch.is_whole
        parts = measure(
            gradients,
            layout,
            sketch,
            moved,
            errors,
            with_norms=options.max_norm is not None or (is_measured and not reads_alone),
            process_group=options.process_group,
        )
        # GradScaler leaves both on a fused optimizer, which it lets step with scaled gradients.
        norms = parts.get("norms")
        for name in ("grad_scale", "found_inf"):
            value = getattr(self._stepper, name, None)
            if value is not None:
                parts[name] = value.to(layout.device).reshape(())
        if norms is not None and "grad_scale" in parts:
            norms = norms / parts["grad_scale"]
        rates = layout.rates(self._reader.param_groups) if is_measured else None
        return Reading(parts, gradients.plan.present, is_measured, rates), norms

    def _decide(self, reading: Reading) -> list[bool]:
        """Take a reading into the state; on which groups the decision acts, if the step counts."""
        numbers = reading.numbers()
        n = len(self.state.names)
        active = reading.present
        lengths = [0.0] * n
        cosines: list[float] | None = None
        if self._sketch is not None and "products" in numbers:
            lengths, cosines = self._sketch.compare(numbers["products"])
        is_skipped = numbers.get("found_inf", 0.0) > 0  # by GradScaler
        if reading.is_measured:
            scale = nan if is_skipped else numbers.get("grad_scale", 1.0)
            norms = [norm / scale for norm in numbers.get("norms", lengths)[:n]]
            self._see_movement(numbers.get("moved"))
            active = self.state.learn(norms, cosines, numbers.get("errors"), reading.rates)
            self._active = active
        elif is_skipped or sum(active) < self.state.fewest:
            # That is all that is known of a step that is not measured.
            active = [False] * n
        is_inside = self.state.is_inside(self._options.window)
        if any(active):
            self.state.step += 1
            if self._sketch is not None:
                self._sketch.keep(lengths)
        if reading.is_measured and self._listeners:
            balance = self.state.balance(self._in_force(active, is_inside))
            for listener in self._listeners:
                listener(balance)
        return active

    def _see_movement(self, moved: list[float] | None) -> None:
        """Take in how far the groups moved at the measured step before, if that was read.

        Args:
            moved: See :meth:`Movement.take`; None if nothing was read.
        """
        anywhere, *squares = moved or [0.0]
        self._watch_anywhere = int(anywhere)
        watch = self._watch()
        is_new = watch != self._watch_before
        self._watch_before = watch
        n = len(self.state.names)
        is_read = any(squares)
        if is_read or is_new:
            self.state.moved = [nan] * n
        if not is_read or is_new or not any(self._active):
            return
        for m in range(n):
            size, step = squares[m], squares[n + m]
            if step == 0 and self._active[m]:
                self.state.moved[m] = 0.0
            elif step > 0 and size > 0:  # unlike that of an adapter that begins with zeros
                self.state.moved[m] = sqrt(step / size)

    def listen(self, listener: Callable[[Balance], None]) -> None:
        """Tell what was measured at each measured step, until :meth:`leave`."""
        if listener not in self._listeners:
            self._listeners.append(listener)
            self._begun += 1

    def leave(self, listener: Callable[[Balance], None]) -> bool:
        """Tell it no longer; whether it has listened."""
        if listener not in self._listeners:
            return False
        self._listeners.remove(listener)
        return True

    def _own_watch(self) -> int:
        """0 if nobody listens on this rank, and another number whenever somebody begins to."""
        return self._begun if self._listeners else 0

    def _watch(self) -> int:
        """The same on all ranks that have shards of the parameters."""
        if self._movement is not None and self._movement.meshes:
            return self._watch_anywhere
        return self._own_watch()

    def _in_force(self, active: list[bool], is_inside: bool) -> list[float]:
        """The coefficients of a step on these groups, inside or outside the window."""
        coefficients = [1.0] * len(active)
        if self._acts and is_inside:
            for m, decided in enumerate(self.state.decided):
                if active[m]:
                    coefficients[m] = decided
        return coefficients

    def _write(self, gradients: Gradients, norms: Tensor | None, is_noisy: bool) -> None:
        """Scale and clip the gradients, and add noise."""
        options = self._options
        max_norm = options.max_norm
        scales = options.apply_to == "gradient"
        factors = [1.0] * len(self.coefficients)
        if scales:
            factors = list(self.coefficients)
        factors.append(1.0)  # of the parameters of no group
        try:
            noisy = spreads(gradients.by_bucket, self._amounts) if is_noisy else []
            clip = None
            if max_norm is not None and norms is not None:
                clip = clip_factor(norms, factors[: len(norms)], max_norm)
            scale_(gradients.by_bucket, factors, clip)
            add_noise_(noisy, clip, options.generator)
        except RuntimeError as error:
            if any(t.is_inference() for _, _, write in gradients.by_bucket for t in write):
                raise RuntimeError(_INFERENCE) from error
            raise

    def _current_layout(self) -> Layout:
        """The layout, made anew when the optimizer holds or trains other parameters."""
        param_groups = self._reader.param_groups
        if self._layout is not None and self._layout.fits(param_groups):
            return self._layout
        self.membership.update(param_groups)
        n = len(self.state.names)
        with_rest = self._options.max_norm is not None
        layout = Layout(param_groups, self.membership.group_of, n, with_rest)
        self._check(layout)
        if getattr(self._options.rule, "needs_coherence", True):
            sketch = Sketch(layout.members, layout.device)
            if self._sketch is not None:
                sketch.continue_from(self._sketch)
            self._sketch = sketch
            if self._loaded_sketch:
                sketch.load(self.state.names, self._loaded_sketch)
                self._loaded_sketch = {}
        self._movement = Movement(layout.members, layout.device)
        self.state.moved = [nan] * n
        self.state.forget([not members for members in layout.members])
        if self.scaling is not None:
            self.scaling.divide(self.membership.group_of)
        self._layout = layout
        return layout

    def _is_late(self, layout: Layout) -> bool:
        if self._options.late is not None:
            return self._options.late
        return not on_host(layout.device)

    def _check(self, layout: Layout) -> None:
        if any(self._amounts) and layout.is_sharded:
            raise RuntimeError(
                "`noise` must be 0 with sharded parameters. Got DTensors. Leave the noise off."
            )
        several = world_size(self._options.process_group) > 1
        if any(self._amounts) and self._options.generator is None and several:
            raise RuntimeError(
                "`generator` must be given with `noise` on several ranks. Got None, which draws "
                "other noise on each rank. Pass a generator with the same seed on every rank."
            )

    def decide_for(self, norms: Sequence[float], errors: Mapping[str, object] | None) -> None:
        """One decision for norms that were measured elsewhere, one of each group."""
        if errors is not None:
            self.observed.add(errors)
        parts = {"norms": torch.tensor(norms, dtype=torch.float64, device="cpu")}
        observed = self.observed.take(torch.device("cpu"))
        observed = average(observed, self._options.process_group)
        if observed is not None:
            parts["errors"] = observed
        present = [True] * len(norms)
        is_inside = self.state.is_inside(self._options.window)
        active = self._decide(Reading(parts, present, is_measured=True))
        self.coefficients = self._in_force(active, is_inside)

    def save(self) -> Saved:
        """What is remembered, in builtin types, by group name.

        A pending reading is decided on first: a checkpoint between two steps holds what the second
        one will know.
        """
        self.settle()
        sketch = self._loaded_sketch
        if self._sketch is not None:
            sketch = self._fitted_sketch(self._sketch).save(self.state.names)
        saved = {"rule": name_of(self._options.rule), **self.state.save(), "sketch": sketch}
        saved["observed"] = self.observed.save()
        saved["phase"] = int(self._steps % self._options.every)
        if hasattr(self._options.rule, "state_dict"):
            saved["rule_state"] = self._options.rule.state_dict()
        return saved

    def _fitted_sketch(self, sketch: Sketch) -> Sketch:
        """The sketch in the order that the optimizer has its parameters in now.

        Whoever loads it knows no other.
        """
        param_groups = self._reader.param_groups
        if self._layout is None or self._layout.fits(param_groups):
            return sketch
        group_of = self.membership.current(param_groups)
        layout = Layout(param_groups, group_of, len(self.state.names), with_rest=False)
        fitted = Sketch(layout.members, layout.device)
        fitted.continue_from(sketch)
        return fitted

    def check(self, saved: Saved) -> None:
        """Check what :meth:`save` gave.

        Raises:
            KeyError, TypeError: If it is damaged.
            ValueError: If it is that of another rule or of other groups.
        """
        name = name_of(self._options.rule)
        if saved["rule"] != name:
            raise ValueError(
                f"`state_dict` must be of the rule {name}. Got that of {saved['rule']}. "
                "Build with the same rule, or with `persist=False`."
            )
        self.state.parse(saved)
        parse(self.state.names, saved["sketch"])
        self.observed.parse(saved["observed"])
        count_in(saved["phase"])
        if hasattr(self._options.rule, "load_state_dict"):
            saved["rule_state"]

    def load(self, saved: Saved) -> None:
        """Take what :meth:`save` gave, checked."""
        if hasattr(self._options.rule, "load_state_dict"):
            self._options.rule.load_state_dict(saved["rule_state"])
        self._reading = None
        self._active = [False] * len(self._active)  # what lies between is not a step
        self.state.load(saved)
        self.observed.load(saved["observed"])
        self._steps = int(saved["phase"])
        if self._sketch is None:
            self._loaded_sketch = saved["sketch"]
        else:
            self._sketch.load(self.state.names, saved["sketch"])


def _refuse_capture(device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "The optimizer must step outside a CUDA graph capture. Got a step inside one. "
            "Capture forward and backward, and call `step()` outside."
        )


_INFERENCE = (
    'The gradients must be writable for `apply_to="gradient"`, `max_norm` and `noise`. Got '
    "inference tensors. Make them outside `torch.inference_mode()`, or scale the update alone."
)
