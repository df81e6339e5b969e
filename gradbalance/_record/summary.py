"""A record in a few figures, and the dominance of a group."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np


class Summary(NamedTuple):
    """A record in a few figures; prints as a table.

    Attributes:
        steps: Recorded steps with finite gradients in two groups at least; the others are left out.
        norms: Mean gradient norm of each group.
        coherences: Mean coherence of each group's gradients from step to step, NaN where it was not measured.
        coefficients: Mean coefficient of each group.
        conflicts: Fraction of the steps in which the group was in conflict with another, of each group.
        dominance: The largest norm over the mean of the others, median over the steps.
        dominance_after: The same ratio of the norms times the coefficients.
    """

    steps: int
    norms: dict[str, float]
    coherences: dict[str, float]
    coefficients: dict[str, float]
    conflicts: dict[str, float]
    dominance: float
    dominance_after: float

    def __str__(self) -> str:
        width = max(len("dominance"), *map(len, self.norms))
        lines = [f"{'':{width}}  mean norm  coherence  coefficient  in conflict"]
        for name, norm in self.norms.items():
            known = math.isfinite(self.coherences[name])
            coherence = f"{self.coherences[name]:9.3f}" if known else f"{'-':>9}"
            numbers = f"{norm:9.3g}  {coherence}  {self.coefficients[name]:11.3f}  {self.conflicts[name]:11.1%}"
            lines.append(f"{name:{width}}  {numbers}")
        lines.append(
            f"{'dominance':{width}}  {self.dominance:.3g} before, {self.dominance_after:.3g} after; steps: {self.steps}"
        )
        return "\n".join(lines)


def summarise(record: Mapping[str, "np.ndarray"]) -> Summary:
    """The summary of what ``Recorder.to_dict`` gives, of at least one step."""
    import numpy as np

    def named(values: "np.ndarray") -> dict[str, float]:
        return dict(zip(record["names"].tolist(), values.tolist(), strict=True))

    known = np.isfinite(record["coherences"])
    with np.errstate(invalid="ignore"):  # 0/0 where it was never measured
        coherences = np.where(known, record["coherences"], 0).sum(0) / known.sum(0)
    return Summary(
        len(record["step"]),
        named(record["norms"].mean(0)),
        named(coherences),
        named(record["coefficients"].mean(0)),
        named(record["conflicts"].any(2).mean(0)),
        float(np.median(dominance(record["norms"]))),
        float(np.median(dominance(record["norms"] * record["coefficients"]))),
    )


def dominance(norms: "np.ndarray") -> "np.ndarray":
    """How many times the largest norm outweighs the mean of the others; 1 is balance.

    Args:
        norms: Of the groups, times their coefficients for what is left of it; shape ``[S, N]``, N at least 2.

    Returns:
        Infinite where the others are 0, shape ``[S]``.

    Example:
        >>> import numpy as np
        >>> dominance(np.array([[6.0, 1.0, 2.0]])).tolist()
        [4.0]
    """
    import numpy as np

    ascending = np.sort(norms, 1)
    with np.errstate(divide="ignore", invalid="ignore"):  # where the others are 0, or all are
        ratio: np.ndarray = ascending[:, -1] / ascending[:, :-1].mean(1)
    return ratio
