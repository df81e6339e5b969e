"""One reading of the gradients: norms and coherence of the groups, and the errors that travel with them."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradbalance._gradients.coherence import Sketch
from gradbalance._gradients.collectives import average
from gradbalance._gradients.layout import Gathered, Layout, Vector
from gradbalance._gradients.norms import reduce_norms


class Reading(NamedTuple):
    """What a step is decided on, the same on all ranks.

    Attributes:
        norms: Of each group, and of the parameters of no group where these are laid out, shape ``[G]``.
        cosines: Between this gradient of each group and its last one, NaN where undefined, shape ``[N]``; or None.
        errors: Observed since the last step, negative where there is none, shape ``[N]``; or None.
    """

    norms: Vector
    cosines: Vector | None
    errors: Tensor | None


class Meter:
    """Reads the gradients of a layout and, if asked to, remembers a sketch of them.

    Args:
        layout: Of the parameters.
        with_coherence: Whether to measure it.
        before: The meter of the layout before this one, whose sketch goes on where the layouts agree.

    Attributes:
        reads_alone: Whether :meth:`read` makes no use of the gathered gradients.
    """

    def __init__(self, layout: Layout, with_coherence: bool, before: "Meter | None" = None) -> None:
        self.layout = layout
        self._sketch = Sketch(layout.members, layout.home) if with_coherence else None
        if self._sketch is not None and before is not None and before._sketch is not None:
            self._sketch.continue_from(before._sketch)
        whole = self._sketch is not None and self._sketch.is_whole
        self.reads_alone = whole and layout.rows == len(layout.members)

    def norms(self, gathered: list[Gathered], scaler: Any = None) -> Tensor:
        """The norms alone, shape ``[G]``; the arguments are those of :meth:`read`."""
        norms: Tensor = _unscaled(reduce_norms(gathered, self.layout.rows, self.layout.home)[0], scaler)
        return norms

    def read(self, gathered: list[Gathered], errors: Tensor | None, scaler: Any, process_group: Any) -> Reading:
        """Take norms and, if asked to, coherence.

        Args:
            gathered: The gradients.
            errors: Observed on this rank, shape ``[N]``, negative where there is none; or None.
            scaler: Where GradScaler leaves its ``grad_scale`` and ``found_inf`` for fused optimizers.
            process_group: The ranks over which errors are averaged.
        """
        layout, sketch = self.layout, self._sketch
        norms: Vector
        cosines: Vector | None
        entries = None if sketch is None else sketch.take()
        if sketch is not None and self.reads_alone:
            norms, cosines = sketch.compare()
            errors = average(errors, process_group)
        else:
            norms, errors, total = reduce_norms(gathered, layout.rows, layout.home, errors, entries, process_group)
            cosines = None if sketch is None or total is None else sketch.compare(total)[1]
        return Reading(_unscaled(norms, scaler), cosines, errors)

    def keep(self, counts: Tensor | bool) -> None:
        """Remember the gradients just read as the last ones, if the step counts."""
        if self._sketch is not None:
            self._sketch.keep(counts)

    def packed(self, names: Sequence[str]) -> dict[str, Any]:
        """The last entries of the sketch of each group, for a checkpoint; a host read."""
        return {} if self._sketch is None else self._sketch.packed(names)

    def unpack(self, names: Sequence[str], packed: Mapping[str, Any]) -> None:
        """Take what :meth:`packed` gave."""
        if self._sketch is not None:
            self._sketch.unpack(names, packed)


def _unscaled(norms: Vector, scaler: Any) -> Any:
    """The norms without the scale of the loss, NaN where GradScaler will skip the step."""
    scale, found_inf = (getattr(scaler, name, None) for name in ("grad_scale", "found_inf"))
    if scale is None and found_inf is None:
        return norms
    norms = torch.as_tensor(norms, dtype=torch.float64) if isinstance(norms, list) else norms
    norms = norms if scale is None else norms / scale.to(norms)
    return norms if found_inf is None else torch.where(found_inf.to(norms) > 0, torch.nan, norms)
