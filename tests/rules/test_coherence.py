"""The default rule: properties that hold whatever its formula."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradbalance.rules import Coherence
from tests.reference import coherent_coefficients
from tests.rules.asking import Asked
from tests.strategies import group_cosines, group_norms, measurements

RULE = Coherence()
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "most": st.sampled_from([1.0, 2.0, 10.0]),
        "chance": st.sampled_from([0.01, 0.5]),
        "clear": st.sampled_from([0.02, 1.0]),
    },
)


@st.composite
def in_force(draw, inactive=True, unknown=True):
    """A measurement, in some of which the coefficients are those of the rule for another one."""
    measured = draw(measurements(inactive=inactive, unknown=unknown))
    if draw(st.booleans()):
        other = draw(measurements(n=len(measured.names)))
        coefficients = RULE(other._replace(scale_free=measured.scale_free))
        measured = measured._replace(coefficients=coefficients)
    return measured


@given(norms=group_norms(), scale=st.sampled_from([2.0**-30, 0.125, 2.0**30]), data=st.data())
def test_the_scale_of_the_loss_does_not_change_the_coefficients(norms, scale, data):
    cosines = [data.draw(group_cosines(len(norms))) for _ in range(3)]
    scale_free = data.draw(st.booleans())
    one, other = (Asked(RULE, len(norms), smoothing=0.5, scale_free=scale_free) for _ in range(2))
    for c in cosines:
        expected = one.step(norms, cosines=c).tolist()
        assert other.step([scale * n for n in norms], cosines=c).tolist() == pytest.approx(
            expected, rel=1e-9
        )


@given(measured=measurements(inactive=False), coherence=st.floats(-1, 1), norm=st.floats(1e-6, 1e6))
def test_equal_coherences_and_equal_shares_give_exactly_one(measured, coherence, norm):
    n = len(measured.names)
    equal = np.ones(n)
    shares = measured.shares if measured.scale_free else equal / n
    alike = measured._replace(norms=norm * equal, shares=shares, coherences=coherence * equal)
    assert RULE(alike).tolist() == [1.0] * n


@given(data=st.data(), measured=in_force(unknown=False), rise=st.floats(0, 2))
def test_a_more_coherent_group_is_not_slowed_down(data, measured, rise):
    m = data.draw(st.integers(0, len(measured.names) - 1))
    higher = measured.coherences.copy()
    higher[m] = min(1.0, higher[m] + rise)
    assert RULE(measured._replace(coherences=higher))[m] >= RULE(measured)[m] - 1e-12


@given(measured=in_force())
def test_the_coefficients_are_bounded_by_the_options(measured):
    c = RULE(measured)
    highest = RULE.most if measured.scale_free else RULE.limit
    assert c.min() >= (1 - 1e-12) / RULE.most
    assert c.max() <= highest * (1 + 1e-12)


@given(data=st.data(), first=measurements(inactive=False, unknown=False))
def test_no_coefficient_jumps(data, first):
    """Between two measurements the half with the larger change, again and again: a jump stays in sight."""
    second = data.draw(measurements(n=len(first.names), inactive=False, unknown=False))

    def between(a, b, t):
        return a + t * (b - a)

    def at(t):
        shares = np.exp(between(np.log(first.shares), np.log(second.shares), t))
        coherences = between(first.coherences, second.coherences, t)
        return RULE(first._replace(shares=shares, coherences=coherences))

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


def test_before_the_second_step_every_coefficient_is_one():
    for scale_free in (True, False):
        asked = Asked(RULE, 3, scale_free=scale_free)
        assert asked.step([9.0, 1.0, 0.5]).tolist() == [1.0] * 3


def test_a_branch_of_noise_moves_less_far_than_a_coherent_one():
    asked = Asked(RULE, 2)
    asked.step([1.0, 1.0])
    noise, learning = asked.step([1.0, 1.0], cosines=[0.02, 0.4])
    assert learning > 1.5 * noise


@given(measured=measurements(inactive=False), options=OPTIONS)
def test_the_rule_equals_its_equations_with_one_for_a_group_of_unknown_coherence(measured, options):
    coherences = [None if math.isnan(a) else a for a in measured.coherences.tolist()]
    expected = coherent_coefficients(
        coherences, measured.shares.tolist(), measured.scale_free, **options
    )
    assert Coherence(**options)(measured).tolist() == pytest.approx(expected, rel=1e-9)
    assert Coherence(**options)(measured._replace(coherences=None)).tolist() == [1.0] * len(
        measured.names
    )


@pytest.mark.parametrize(
    ("coherences", "shares", "scale_free", "expected"),
    [
        ([0.3, 0.1], [0.5, 0.5], True, [3.0, 1.0]),
        ([0.35, 0.2], [0.5, 0.5], True, [2.25, 1.0]),
        ([0.0, -0.5], [0.5, 0.5], True, [1.0, 1.0]),
        ([0.9, 0.0], [0.004, 0.996], False, [20.0, 1 / 3]),
        ([0.4, 0.15], [0.25, 0.75], False, [3.0, 1 / 3]),
    ],
)
def test_some_coefficients_are_these(coherences, shares, scale_free, expected):
    asked = Asked(RULE, 2, scale_free=scale_free)
    asked.step(shares)
    assert asked.step(shares, cosines=coherences).tolist() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("option", ["most", "chance", "clear"])
@pytest.mark.parametrize("value", [-1.0, 0.0, math.nan, math.inf])
def test_an_option_out_of_range_is_refused_by_name(option, value):
    with pytest.raises(ValueError, match=rf"`{option}` must be finite and .* Got .*\. [A-Z]"):
        Coherence(**{option: value})
