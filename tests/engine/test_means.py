"""Running means and their standard errors against the equations of SPEC 1.1."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradbalance.rules import Watch
from tests.reference import Mean, Reference
from tests.rules.asking import Asked
from tests.strategies import SMOOTHINGS, group_cosines, group_errors


def vector(means, n, of=Mean.mean, absent=math.nan):
    """A number of each group's mean, as the engine shows it."""
    values = [of(means[m]) if m in means else None for m in range(n)]
    return [absent if value is None else value for value in values]


def assert_means(balance, slow, n):
    for name in ("shares", "coherences", "useful", "errors"):
        expected = vector(getattr(slow, name), n)
        found = getattr(balance, name).tolist()
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-12, nan_ok=True), name
    for name, means in (("coherence_errors", slow.coherences), ("useful_errors", slow.useful)):
        expected = vector(means, n, Mean.error, math.inf)
        # The error of equal values is the root of what rounding leaves.
        assert getattr(balance, name).tolist() == pytest.approx(expected, rel=1e-6, abs=1e-7), name


@st.composite
def steps_of(draw, n):
    norm = st.integers(1, 640).map(lambda x: x / 64) | st.just(0.0)
    norms = draw(st.lists(norm, min_size=n, max_size=n))
    errors = draw(st.none() | group_errors(n, partial=True))
    return norms, errors, draw(group_cosines(n))


@settings(max_examples=80)
@given(data=st.data(), smoothing=SMOOTHINGS, every=st.sampled_from([1, 1, 2, 3]))
def test_means_and_standard_errors_are_those_of_the_equations(data, smoothing, every):
    n = data.draw(st.integers(2, 3))
    asked = Asked(Watch(), n, smoothing, every=every)
    slow = Reference(lambda given: [1.0] * n, smoothing**every)
    last = {}
    told = []
    for step in range(data.draw(st.integers(1, 9))):
        norms, errors, cosines = data.draw(steps_of(n))
        asked.step(norms, errors, cosines)
        told += [] if errors is None else [errors]
        now = {m: asked.angles[m] for m in range(n) if norms[m] > 0}
        is_measured = step % every == 0
        counts = len(now) >= 2 if is_measured else bool(now)
        if is_measured:
            known = [
                math.cos(now[m] - last[m]) if m in now and m in last else None for m in range(n)
            ]
            slow.step(norms, mean_of_each(told, n), known)
            told = []
        # The last gradient is one of those that are read: of a measured step, or of that before.
        if counts and (is_measured or (step + 1) % every == 0):
            last |= now
        assert_means(asked.penalty.balance, slow, n)


def mean_of_each(told, n):
    if not told:
        return None
    means = []
    for m in range(n):
        values = [errors[m] for errors in told if errors[m] is not None]
        means.append(sum(values) / len(values) if values else None)
    return means


def test_the_first_values_have_equal_weight_and_later_ones_that_of_the_smoothing():
    asked = Asked(Watch(), 2, smoothing=0.75)
    values = [0.75, 0.5, 0.25, 0.5, 0.9, 0.1]
    mean = 0.0
    for k, share in enumerate(values, 1):
        asked.step([share, 1 - share])
        weight = max(0.25, 1 / k)
        mean = (1 - weight) * mean + weight * share
        assert asked.penalty.balance.shares[0] == pytest.approx(mean, rel=1e-12)
        if k <= 4:
            assert mean == pytest.approx(sum(values[:k]) / k, rel=1e-12)


def test_the_standard_error_of_a_plain_mean_is_that_of_statistics():
    asked = Asked(Watch(), 2, smoothing=0.98)
    cosines = [0.5, -0.25, 0.75, 0.125]
    asked.step([1.0, 1.0])
    errors = []
    for c in cosines:
        asked.step([1.0, 1.0], None, [c, 1.0])
        errors.append(asked.penalty.balance.coherence_errors.tolist()[0])
    assert errors[:2] == [math.inf, math.inf], "before the third value"
    for n in (3, 4):
        mean = sum(cosines[:n]) / n
        variance = sum((c - mean) ** 2 for c in cosines[:n]) / n
        assert errors[n - 1] == pytest.approx(math.sqrt(variance / (n - 1)), rel=1e-9)


def test_an_exponential_mean_is_worth_a_bounded_number_of_values():
    asked = Asked(Watch(), 2, smoothing=0.5)
    for step in range(60):
        asked.step([1.0, 1.0], None, [(-1.0) ** step * 0.5, 1.0])
    # Values of +-1/2 in turn: the weighted variance is 1/4 - mean^2, and n is (1 + 0.5)/(1 - 0.5).
    balance = asked.penalty.balance
    variance = 0.25 - balance.coherences[0] ** 2
    expected = math.sqrt(variance / (3 - 1))
    assert balance.coherence_errors[0] == pytest.approx(expected, rel=1e-6)


def test_without_smoothing_the_means_are_those_of_this_step_exactly():
    asked = Asked(Watch(), 2, smoothing=0.0)
    for big in (1.0, 1e-30, 1e30, 3.0):
        asked.step([big, 1.0])
        assert asked.penalty.balance.shares.tolist() == [big / (big + 1), 1 / (big + 1)]
    assert asked.penalty.balance.coherence_errors.tolist() == [math.inf] * 2, (
        "one value has no error"
    )


@given(smoothing=SMOOTHINGS, every=st.integers(1, 4))
def test_a_running_mean_forgets_as_fast_whatever_every(smoothing, every):
    asked = Asked(Watch(), 2, smoothing, every=every)
    mean = Mean(smoothing**every)
    for step in range(9):
        asked.step([1.0 + step, 2.0])
        if step % every == 0:
            mean.values.append((1.0 + step) / (3.0 + step))
        assert asked.penalty.balance.shares[0] == pytest.approx(mean.mean(), rel=1e-12)
        assert asked.penalty.balance.step == step + 1
