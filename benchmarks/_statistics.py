"""The one interval of all benchmarks."""

from collections.abc import Iterable

import numpy as np
from scipy import stats


def interval(values: Iterable[float], level: float = 0.95) -> tuple[float, float]:
    """Mean and half the width of Student's interval, over seeds or paired differences; NaN for fewer than two.

    Example:
        >>> mean, half = interval([1.0, 2.0, 3.0])
        >>> round(mean, 2), round(half, 2)
        (2.0, 2.48)
    """
    array = np.asarray(list(values), dtype=float)
    if len(array) < 2:
        return (float(array.mean()) if len(array) else float("nan")), float("nan")
    half = stats.t.ppf((1 + level) / 2, len(array) - 1) * array.std(ddof=1) / len(array) ** 0.5
    return float(array.mean()), float(half)
