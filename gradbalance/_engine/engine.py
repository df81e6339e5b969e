"""The engine: at each step of an optimizer it measures the branches, asks the rule, and acts."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any
from weakref import proxy

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradbalance._engine import groups as grouping
from gradbalance._engine.ask import ask_on_host, name_of
from gradbalance._engine.ask_on_device import ask_on_device
from gradbalance._engine.errors import Observed
from gradbalance._engine.groups import Assignment
from gradbalance._engine.options import noise_of
from gradbalance._engine.state import Balance, Flag, State
from gradbalance._gradients.collectives import world_size
from gradbalance._gradients.fingerprint import Fingerprint
from gradbalance._gradients.layout import Gathered, Layout, Vector
from gradbalance._gradients.meter import Meter, Reading
from gradbalance._gradients.write import add_noise_, clipped, scale_, spreads
from gradbalance._torch.displacement import Displacement
from gradbalance._torch.learning_rates import LearningRates


class Engine:
    """What happens before and after each step.

    Args:
        reader: The optimizer that lists all parameters.
        stepper: The one that steps.
        assignment: The group of each parameter.
        way: How steps are scaled, or None where the gradients are, or nothing.
        options: Those of :class:`Penalty`, checked.
    """

    def __init__(
        self,
        reader: Optimizer,
        stepper: Optimizer,
        assignment: Assignment,
        way: LearningRates | Displacement | None,
        options: Mapping[str, Any],
    ) -> None:
        self._reader, self._stepper = proxy(reader), proxy(stepper)  # which hold this
        self.assignment, self.way = assignment, way
        self._rule = options["rule"]
        self._needs_coherence = getattr(self._rule, "needs_coherence", True)
        self.into_gradients = options["apply_to"] == "gradient" and getattr(self._rule, "acts", True)
        self._every, self._window = options["every"], options["window"]
        self._smoothing = options["smoothing"] ** self._every
        self._noise, self._generator = noise_of(options["noise"], assignment.names), options["generator"]
        self._max_norm, self._process_group = options["max_norm"], options["process_group"]
        self._writes = self.into_gradients or any(self._noise) or self._max_norm is not None
        self._scale_free = not isinstance(stepper, torch.optim.SGD)
        self.state, self.observed = State(assignment.names), Observed(assignment.names)
        self.listeners: list[Callable[[Balance], None]] = []
        self._meter: Meter | None = None
        self._sketch: dict[str, Any] = {}  # of a checkpoint, until there is a meter
        self._steps = 0  # however they ended: every so many are measured
        self._left: Fingerprint | None = None  # the gradients as the last step left them
        self._watchful = False  # whether something writes gradients past torch's counter
        self._in_step = self._acted = False

    @torch.no_grad()
    def before_step(self) -> None:
        """Measure, ask, act."""
        looks = self._in_step or self.into_gradients
        again = looks and self._left is not None and self._left.matches()
        if again and self._in_step:
            return  # a step nested in a step
        self._acted = False
        self._end_scaling()
        meter, state = self._current_meter(), self.state
        asks = self._steps % self._every == 0
        # The step before it is read too: coherence is that of successive gradients.
        precedes = self._needs_coherence and not asks and (self._steps + 1) % self._every == 0
        # Without shards a look at the sketch alone will do for it.
        gathers = self._writes or (asks and not meter.reads_alone) or (precedes and meter.layout.is_sharded)
        gathered = meter.layout.gather() if gathers else []
        if asks and world_size() > 1 and not meter.layout.has_gradients:
            warnings.warn(_NO_GRADIENTS, UserWarning, stacklevel=2)

        fresh: Flag = True
        if again:
            # A second step without a new backward must not act twice, unless the gradients were written unseen.
            fresh = self._is_rewritten(meter.norms(gathered))
            if state.on_host and not fresh:
                self._acted = True
                return
        self._steps += 1
        norms: Vector | None = None
        if asks:
            reading = meter.read(gathered, self.observed.take(state.home), self._stepper, self._process_group)
            counts, due = self.ask(reading, fresh)
            meter.keep(counts)
            norms = reading.norms
        else:
            if (found_inf := getattr(self._stepper, "found_inf", None)) is not None:
                fresh = (found_inf.to(state.home) == 0) & fresh  # GradScaler will skip the step
            due = state.keep_deciding(self._window, fresh)
            if precedes:
                norms = meter.read(gathered, None, self._stepper, self._process_group).norms
                meter.keep(fresh)
            elif self._max_norm is not None:
                norms = meter.norms(gathered, self._stepper)

        if self._writes:
            self._write(gathered, norms, due)
        if self.way is not None:
            self.way.begin(state.coefficients)
        self._left, self._in_step, self._acted = Fingerprint(meter.layout), True, True

    def _write(self, gathered: list[Gathered], norms: Vector | None, due: Flag) -> None:
        """Scale and clip the gradients, and add noise."""
        factors: Tensor | None = None
        clip: Tensor | None = None
        if self.into_gradients:
            factors = self.state.tensor(self.state.coefficients)
        spread = spreads(gathered, self._noise) if any(self._noise) else []
        if isinstance(norms, Tensor) and self._max_norm is not None:
            factors, clip = clipped(norms, factors, self._max_norm)
        try:
            if factors is not None:
                scale_(gathered, factors)
            add_noise_(spread, clip, due, self._generator)
        except RuntimeError as error:
            if any(t.is_inference() for g in gathered for t in g.write):
                raise RuntimeError(_INFERENCE) from error
            raise

    def _current_meter(self) -> Meter:
        """The meter, made anew when the optimizer holds other parameters, or other ones of them are trained."""
        param_groups = self._reader.param_groups
        if self._meter is None or not self._meter.layout.fits(param_groups):
            self.assignment = grouping.reassign(self.assignment, param_groups)
            n, with_rest = len(self.state.names), self._max_norm is not None
            layout = Layout(param_groups, self.assignment.of, n, with_rest)
            self._check_noise(layout)
            self._meter = Meter(layout, self._needs_coherence, self._meter)
            if self._sketch:
                self._meter.unpack(self.state.names, self._sketch)
                self._sketch = {}
            self.state.to(layout.home)
            if self.way is not None:
                self.way.divide(self.assignment.group_of(param_groups))
        return self._meter

    def ask(self, reading: Reading, fresh: Flag = True) -> tuple[Flag, Flag]:
        """One decision of the rule; whether the step counts, and whether it lies inside the window."""
        options = {"smoothing": self._smoothing, "window": self._window, "scale_free": self._scale_free}
        decided: tuple[Flag, Flag]
        if self.state.on_host:
            decided = ask_on_host(self._rule, self.state, reading, **options, fresh=bool(fresh))
        else:
            decided = ask_on_device(self._rule, self.state, reading, **options, fresh=fresh)
        for listener in self.listeners:
            listener(self.state.balance)
        return decided

    def parameters(self) -> dict[str, list[Tensor]]:
        """Those of each group, by name."""
        return self.assignment.parameters(self._reader.param_groups)

    def _is_rewritten(self, norms: Tensor) -> Tensor:
        """Whether the gradients have other norms than the last step left them with; from the second suspicion on."""
        known = None if self._left is None else self._left.norms
        if known is None:  # from now on the norms are taken
            self._watchful = True
            return torch.zeros((), dtype=torch.bool, device=norms.device)
        return ~torch.isclose(norms, known, rtol=1e-6, atol=0).all()

    def _end_scaling(self) -> None:
        if self.way is not None:
            self.way.end()

    def after_step(self) -> None:
        """Undo what was put in place for the step; may be called twice."""
        self._end_scaling()
        if self._acted and self.into_gradients and self._meter is not None:
            # Again, as some steps write into the gradients, and so do hooks after them.
            layout = self._meter.layout
            norms = self._meter.norms(layout.gather()) if self._watchful else None
            self._left = Fingerprint(layout, norms)
        self._in_step = False

    def _check_noise(self, layout: Layout) -> None:
        if any(self._noise) and layout.is_sharded:
            raise RuntimeError("`noise` must be 0 with sharded parameters. Got DTensors. Leave the noise off.")
        if any(self._noise) and self._generator is None and world_size(self._process_group) > 1:
            raise RuntimeError(
                "`generator` must be given with `noise` on several ranks. Got None, which draws other noise on each "
                "rank. Pass a generator with the same seed on every rank."
            )

    def save(self) -> dict[str, Any]:
        """What is remembered, in builtin types, by group name."""
        sketch = self._sketch if self._meter is None else self._meter.packed(self.state.names)
        kept = {"rule": name_of(self._rule), **self.state.numbers(), "sketch": sketch}
        kept["phase"] = self._steps % self._every
        if hasattr(self._rule, "state_dict"):
            kept["rule_state"] = self._rule.state_dict()
        return kept

    def load(self, kept: Mapping[str, Any]) -> None:
        """Take what :meth:`save` gave.

        Raises:
            ValueError: If it is that of another rule or of other groups.
        """
        if kept["rule"] != name_of(self._rule):
            raise ValueError(
                f"`state_dict` must be of the rule {name_of(self._rule)}. Got that of {kept['rule']}. "
                "Build with the same rule, or with `persist=False`."
            )
        self.state.load(kept)
        self._steps = kept["phase"]
        if self._meter is None:
            self._sketch = kept["sketch"]
        else:
            self._meter.unpack(self.state.names, kept["sketch"])
        if "rule_state" in kept and hasattr(self._rule, "load_state_dict"):
            self._rule.load_state_dict(kept["rule_state"])


_INFERENCE = (
    'The gradients must be writable for `apply_to="gradient"`, `max_norm` and `noise`. Got inference tensors. Make '
    "them outside `torch.inference_mode()`, or scale the update alone."
)
_NO_GRADIENTS = (
    "The optimizer must hold parameters that get gradients. Got none with a gradient on this rank. Build it after "
    "wrapping or sharding the model: FSDP1 replaces the parameters."
)
