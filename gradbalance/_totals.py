"""Means and spreads over all steps of a record, however many, in a memory that does not grow."""

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]


class Spread:
    """Mean and variance of the finite values of each group.

    Attributes:
        number: Of the values, shape ``[N]``.
        mean: 0 before the first value, shape ``[N]``.
    """

    def __init__(self, n: int) -> None:
        self.number = np.zeros(n)
        self.mean = np.zeros(n)
        self._squares = np.zeros(n)  # summed squares of the deviations from the mean

    def add(self, values: Matrix) -> None:
        """Take more values, shape ``[S, N]``.

        Reference:
            Chan, Golub and LeVeque, Updating formulae and a pairwise algorithm for computing sample
            variances, 1979.
        """
        is_known = np.isfinite(values)
        number = is_known.sum(0)
        mean = np.where(is_known, values, 0.0).sum(0) / np.maximum(number, 1)
        squares = np.square(np.where(is_known, values - mean, 0.0)).sum(0)
        total = np.maximum(self.number + number, 1)
        difference = mean - self.mean
        self._squares += squares + np.square(difference) * self.number * number / total
        self.mean += difference * number / total
        self.number += number

    @property
    def deviation(self) -> Vector:
        """Standard deviation, NaN before the first value, shape ``[N]``."""
        with np.errstate(invalid="ignore", divide="ignore"):
            deviation: Vector = np.sqrt(self._squares / self.number)
        return deviation

    @property
    def value(self) -> Vector:
        """The mean, NaN before the first value, shape ``[N]``."""
        return np.where(self.number > 0, self.mean, np.nan)

    @property
    def error(self) -> Vector:
        """Standard error of the mean of independent values, inf before the third, shape ``[N]``."""
        error = self.deviation / np.sqrt(np.maximum(self.number - 1, 1))
        return np.where(self.number > 2, error, np.inf)


class Covariance:
    """Mean and covariance of vectors.

    Attributes:
        number: Of the vectors.
        mean: Shape ``[N]``.
    """

    def __init__(self, n: int) -> None:
        self.number = 0
        self.mean = np.zeros(n)
        self._products = np.zeros((n, n))

    def add(self, vectors: Matrix) -> None:
        """Take more vectors, shape ``[S, N]``."""
        number = len(vectors)
        if number == 0:
            return
        mean = vectors.mean(0)
        deviations = vectors - mean
        total = self.number + number
        difference = mean - self.mean
        outer = np.outer(difference, difference)
        self._products += deviations.T @ deviations + outer * self.number * number / total
        self.mean += difference * number / total
        self.number = total

    @property
    def value(self) -> Matrix:
        """The covariance, shape ``[N, N]``."""
        return self._products / max(self.number, 1)


class Totals:
    """What a summary needs of all recorded steps.

    Args:
        n: Number of groups, N.
        needs_errors: Whether the rule proposes 1 until standard errors are known.

    Attributes:
        recorded: Number of steps.
        counted: Number of those that counted.
        not_finite: Number of those whose norms are not finite.
        with_gradient: Number of those at which each group has a gradient, shape ``[N]``.
        moved: Length of a step that counted over that of the parameters.
        shares: Of the sum of the norms, at the steps that counted; so are the following.
        cosines: Between successive gradients.
        useful: Their product.
        coefficients: In force.
        proposed: Answers of the rule once it knows standard errors.
    """

    def __init__(self, n: int, needs_errors: bool) -> None:
        self._needs_errors = needs_errors
        self.recorded = 0
        self.counted = 0
        self.not_finite = 0
        self.with_gradient = np.zeros(n, dtype=int)
        self.moved = Spread(n)
        self.shares = Spread(n)
        self.cosines = Spread(n)
        self.useful = Spread(n)
        self.coefficients = Spread(n)
        self.proposed = Covariance(n)

    def add(self, rows: NDArray[np.void]) -> None:
        """Take more rows of a record."""
        norms = rows["norms"]
        self.recorded += len(rows)
        self.not_finite += int((~np.isfinite(norms).all(1)).sum())
        self.with_gradient += (np.isfinite(norms) & (norms > 0)).sum(0)
        self.moved.add(rows["moved"])  # of the last step that was read, which has counted
        rows = rows[rows["counts"]]
        self.counted += len(rows)
        norms = rows["norms"]
        shares = norms / norms.sum(1, keepdims=True)
        self.shares.add(shares)
        self.cosines.add(rows["cosines"])
        self.useful.add(rows["cosines"] * shares)
        self.coefficients.add(rows["coefficients"])
        if self._needs_errors:
            is_known = np.isfinite(rows["coherences"])
            is_settled = np.isfinite(rows["coherence_errors"])
            rows = rows[is_settled.any(1) & (is_settled | ~is_known).all(1)]
        self.proposed.add(rows["proposed"])
