"""The default rule: the useful part of the gradient decides, as far as it can be told from chance."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradbalance.rules import Measured
from gradbalance.rules.useful import Useful
from tests.reference import useful_coefficients
from tests.rules.asking import Asked
from tests.strategies import group_cosines, group_norms, measurements

RULE = Useful()
MOST = st.sampled_from([1.0, 3.0, 10.0])


def measured_of(coherences, shares, error=0.0, scale_free=True, useful=None):
    """A measurement with the same relative error of every mean; useful is the product if not given."""
    n = len(coherences)
    coherences, shares = np.array(coherences), np.array(shares)
    return Measured(
        names=tuple(f"group{m}" for m in range(n)),
        norms=shares,
        shares=shares,
        coherences=coherences,
        coherence_errors=np.full(n, error),
        useful=coherences * shares if useful is None else np.array(useful),
        useful_errors=error * shares,
        errors=None,
        active=np.ones(n, dtype=bool),
        scale_free=scale_free,
        coefficients=np.ones(n),
        step=100,
    )


@given(norms=group_norms(), scale=st.sampled_from([2.0**-30, 0.125, 2.0**30]), data=st.data())
def test_the_scale_of_the_loss_does_not_change_the_coefficients(norms, scale, data):
    cosines = [data.draw(group_cosines(len(norms))) for _ in range(6)]
    scale_free = data.draw(st.booleans())
    one, other = (Asked(RULE, len(norms), smoothing=0.9, scale_free=scale_free) for _ in range(2))
    for c in cosines:
        expected = one.step(norms, cosines=c).tolist()
        assert other.step([scale * n for n in norms], cosines=c).tolist() == pytest.approx(
            expected, rel=1e-6
        )


@given(
    n=st.integers(1, 6),
    coherence=st.floats(-1, 1),
    share=st.floats(0, 1),
    error=st.floats(0, 1) | st.just(math.inf),
    scale_free=st.booleans(),
)
def test_equal_groups_have_coefficients_of_exactly_one(n, coherence, share, error, scale_free):
    measured = measured_of([coherence] * n, [share] * n, 0.0, scale_free)
    measured = measured._replace(
        coherence_errors=np.full(n, error), useful_errors=np.full(n, error)
    )
    assert RULE(measured).tolist() == [1.0] * n


@given(data=st.data(), measured=measurements(inactive=False, unknown=False))
def test_differences_below_their_standard_error_change_nothing(data, measured):
    n = len(measured.names)
    # Each error is that of the larger group of the pair, which alone exceeds the difference.
    part = st.floats(0, 0.999)
    parts = np.array(data.draw(st.lists(part, min_size=n, max_size=n)))
    useful_errors = np.full(n, 0.05)
    coherence_errors = np.full(n, 0.2)
    alike = measured._replace(
        useful=0.1 + math.sqrt(2) * 0.05 * parts,
        useful_errors=useful_errors,
        coherences=0.1 + math.sqrt(2) * 0.2 * parts,
        coherence_errors=coherence_errors,
    )
    assert RULE(alike).tolist() == [1.0] * n


@given(data=st.data(), measured=measurements(unknown=False), rise=st.floats(0, 2))
def test_a_group_is_not_slowed_as_its_own_useful_part_or_coherence_rises(data, measured, rise):
    m = data.draw(st.integers(0, len(measured.names) - 1))
    for field in ("useful", "coherences"):
        higher = getattr(measured, field).copy()
        higher[m] += rise
        after = RULE(measured._replace(**{field: higher}))
        assert after[m] >= RULE(measured)[m] - 1e-12


@given(measured=measurements(), most=MOST)
def test_the_most_useful_group_keeps_its_rate_and_none_is_slowed_more_than_allowed(measured, most):
    c = Useful(most)(measured._replace(scale_free=True))
    assert c.max() == 1
    assert c.min() >= 1 / most
    known = np.isfinite(measured.useful) & np.isfinite(measured.useful_errors)
    if known.any():
        best = np.where(known, np.nan_to_num(measured.useful), -np.inf).argmax()
        assert c[best] == 1


@given(measured=measurements(), most=MOST)
def test_under_sgd_the_coefficients_are_bounded(measured, most):
    c = Useful(most)(measured._replace(scale_free=False))
    assert c.min() >= (1 - 1e-12) / most
    assert c.max() <= RULE.limit


@given(data=st.data(), measured=measurements(unknown=False))
def test_under_sgd_no_step_is_longer_than_the_longest_was(data, measured):
    """However large a gradient is now that was small in the mean."""
    norms = np.array(data.draw(st.permutations(measured.norms.tolist())))
    c = RULE(measured._replace(norms=norms, active=norms > 0, scale_free=False))
    assert (c * norms).max() <= norms.max() * (1 + 1e-12)
    assert (c[norms == 0] <= 1).all()


@given(data=st.data(), first=measurements(inactive=False, unknown=False))
def test_no_coefficient_jumps(data, first):
    """Between two measurements the half with the larger change, again and again: a jump stays in sight."""
    n = len(first.names)
    second = data.draw(measurements(n=n, inactive=False, unknown=False))
    errors = np.array(data.draw(st.lists(st.floats(0.01, 0.5), min_size=n, max_size=n)))

    def between(a, b, t):
        return a + t * (b - a)

    def at(t):
        shares = np.exp(between(np.log(first.shares), np.log(second.shares), t))
        coherences = between(first.coherences, second.coherences, t)
        return RULE(
            first._replace(
                shares=shares,
                coherences=coherences,
                coherence_errors=errors,
                useful=coherences * shares,
                useful_errors=errors * shares,
            )
        )

    low, high, change = 0.0, 1.0, math.inf
    for _ in range(45):
        middle = (low + high) / 2
        left = np.abs(at(low) - at(middle)).max()
        right = np.abs(at(middle) - at(high)).max()
        if left >= right:
            high, change = middle, left
        else:
            low, change = middle, right
    assert change < 1e-4, f"between {at(low).tolist()} and {at(high).tolist()}"


@given(data=st.data(), measured=measurements())
def test_permuting_the_groups_permutes_the_coefficients(data, measured):
    order = data.draw(st.permutations(range(len(measured.names))))
    moved = [v[order] if isinstance(v, np.ndarray) else v for v in measured]
    permuted = type(measured)(*moved)._replace(names=tuple(measured.names[i] for i in order))
    assert RULE(permuted).tolist() == pytest.approx(RULE(measured)[order].tolist(), rel=1e-9)


@given(data=st.data(), measured=measurements(unknown=False))
def test_a_group_that_is_not_known_yet_has_one_and_changes_nothing_for_the_others(data, measured):
    n = len(measured.names)
    m = data.draw(st.integers(0, n - 1))
    fields = ["coherences", "useful", "coherence_errors", "useful_errors"]
    field = data.draw(st.sampled_from(fields))
    values = getattr(measured, field).copy()
    values[m] = math.nan if field in fields[:2] else math.inf
    c = RULE(measured._replace(**{field: values}))
    assert c[m] == 1
    others = [k for k in range(n) if k != m]
    alone = [v[others] if isinstance(v, np.ndarray) else v for v in measured]
    without = type(measured)(*alone)._replace(names=tuple(measured.names[k] for k in others))
    assert c[others].tolist() == pytest.approx(RULE(without).tolist(), rel=1e-9)


@given(measured=measurements(), factor=st.floats(1e-6, 1e6))
def test_a_schedule_of_all_rates_changes_nothing(measured, factor):
    if measured.rates is None:
        measured = measured._replace(rates=np.full(len(measured.names), 1e-3))
    scheduled = measured._replace(rates=factor * measured.rates)
    assert RULE(scheduled).tolist() == pytest.approx(RULE(measured).tolist(), rel=1e-6)


@given(measured=measurements(), rate=st.sampled_from([0.0, 1e-5, 1.0, math.nan]))
def test_equal_and_unknown_rates_change_nothing(measured, rate):
    expected = RULE(measured._replace(rates=None)).tolist()
    assert RULE(measured._replace(rates=np.full(len(measured.names), rate))).tolist() == expected


@given(data=st.data(), measured=measurements(unknown=False), factor=st.floats(1, 1e3))
def test_a_higher_rate_spares_a_group_and_slows_no_other(data, measured, factor):
    m = data.draw(st.integers(0, len(measured.names) - 1))
    higher = np.full(len(measured.names), 1e-3)
    higher[m] *= factor
    before, after = RULE(measured._replace(rates=None)), RULE(measured._replace(rates=higher))
    assert after[m] >= before[m] - 1e-12
    others = np.arange(len(before)) != m
    assert after[others].tolist() == pytest.approx(before[others].tolist(), rel=1e-12)


def test_new_layers_at_ten_times_the_rate_of_a_pretrained_encoder_are_spared():
    measured = measured_of([0.14, 0.15], [0.96, 0.04], 0.0)
    assert RULE(measured).tolist() == [1.0, 0.1]
    assert RULE(measured._replace(rates=np.array([1e-4, 1e-3]))).tolist() == [1.0, 1.0]
    assert RULE(measured._replace(rates=np.array([1e-3, 1e-4]))).tolist() == [1.0, 0.1]


def test_before_the_third_cosine_every_coefficient_is_one():
    for scale_free in (True, False):
        asked = Asked(RULE, 3, smoothing=0.995, scale_free=scale_free)
        for cosines in (None, [0.1, 0.9, 0.0], [0.1, 0.9, 0.0]):
            assert asked.step([9.0, 1.0, 0.5], cosines=cosines).tolist() == [1.0] * 3
        assert asked.step([9.0, 1.0, 0.5], cosines=[0.1, 0.9, 0.0]).tolist() != [1.0] * 3


def test_a_rule_without_coherences_gives_one():
    measured = measured_of([0.5, 0.0], [0.5, 0.5])
    nothing = dict.fromkeys(["coherences", "coherence_errors", "useful", "useful_errors"])
    assert RULE(measured._replace(**nothing)).tolist() == [1.0, 1.0]


_WILD = st.sampled_from([0.0, -1.0, 1.0, 5e-324, 1e-300, 1e-160, 1e-30, 1e300, math.nan, math.inf])


@given(data=st.data(), n=st.sampled_from([1, 2, 3, 40]), scale_free=st.booleans())
def test_the_answer_is_finite_whatever_was_measured(data, n, scale_free):
    def wild(values=_WILD):
        return np.array(data.draw(st.lists(values, min_size=n, max_size=n)))

    norms = np.abs(wild())
    with np.errstate(all="raise", under="ignore"):
        c = RULE(
            measured_of([0.1] * n, [0.1] * n, 0.0, scale_free)._replace(
                coherences=wild(_WILD.filter(lambda a: not a > 1)),
                coherence_errors=np.abs(wild()),
                useful=wild(_WILD.filter(lambda a: not a > 1)),
                useful_errors=np.abs(wild()),
                shares=wild(st.sampled_from([0.0, 5e-324, 1e-160, 1e-30, 0.5, 1.0])),
                norms=norms,
                active=np.isfinite(norms) & (norms > 0),
                rates=wild(),
            )
        )
    assert c.shape == (n,)
    assert np.isfinite(c).all()
    assert (c > 0).all()


@given(data=st.data(), measured=measurements(), most=MOST)
def test_the_rule_equals_its_equations_pair_by_pair(data, measured, most):
    def known(values):
        return [None if math.isnan(value) else value for value in values.tolist()]

    norms = data.draw(st.permutations(measured.norms.tolist()))
    measured = measured._replace(norms=np.array(norms), active=np.array(norms) > 0)

    expected = useful_coefficients(
        known(measured.useful),
        measured.useful_errors.tolist(),
        known(measured.coherences),
        measured.coherence_errors.tolist(),
        measured.shares.tolist(),
        norms,
        measured.scale_free,
        rates=None if measured.rates is None else measured.rates.tolist(),
        most=most,
    )
    assert Useful(most)(measured).tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("coherences", "shares", "error", "scale_free", "expected"),
    [
        ([0.4, 0.2], [0.5, 0.5], 0.0, True, [1.0, 0.5]),
        ([0.4, 0.2], [0.5, 0.5], 0.1, True, [1.0, 0.75]),
        ([0.4, 0.0], [0.5, 0.5], 0.0, True, [1.0, 0.1]),
        ([0.1, 0.2], [0.9, 0.1], 0.0, True, [1.0, 8 / 9]),
        ([0.1, 0.4], [0.95, 0.05], 0.0, True, [1.0, 1.0]),
        ([0.0, -0.5], [0.5, 0.5], 0.0, True, [1.0, 1.0]),
        ([0.4, 0.2], [0.2, 0.8], 0.0, False, [4.0, 0.25]),
        ([0.9, 0.0], [0.004, 0.996], 0.0, False, [20.0, 0.1]),
        ([0.4, 0.2], [0.8, 0.2], 0.0, False, [1.0, 1.0]),
    ],
)
def test_some_coefficients_are_these(coherences, shares, error, scale_free, expected):
    c = RULE(measured_of(coherences, shares, error, scale_free))
    assert c.tolist() == pytest.approx(expected, rel=1e-9)


def plain_means(means, steps=100, runs=100):
    """The coefficients ``[runs, steps, 2]`` of equal shares whose cosines scatter by .2 around means."""
    generator = np.random.default_rng(0)
    coefficients = np.ones((runs, steps, 2))
    for run in range(runs):
        cosines = generator.normal(means, 0.2, (steps, 2)).clip(-1, 1)
        for step in range(3, steps):
            seen = cosines[:step]
            errors = seen.std(0) / math.sqrt(step - 1)
            measured = measured_of(seen.mean(0), [0.5, 0.5])._replace(
                coherence_errors=errors, useful_errors=errors / 2
            )
            coefficients[run, step] = RULE(measured)
    return coefficients


def test_by_chance_alone_few_coefficients_leave_the_neighbourhood_of_one():
    c = plain_means([0.05, 0.05])
    assert (c >= 0.8).mean() >= 0.85


def test_groups_of_different_coherence_are_told_apart_early():
    c = plain_means([0.25, 0.1])
    ratios = c[..., 0] / c[..., 1]
    assert np.median(ratios[:, 10]) >= 1.4
    assert np.median(ratios[:, -1]) >= 1.9


@pytest.mark.parametrize("value", [-1.0, 0.0, 0.5, math.nan, math.inf])
def test_an_option_out_of_range_is_refused_by_name(value):
    with pytest.raises(ValueError, match=r"`most` must be finite and .* Got .*\. [A-Z]"):
        Useful(value)
