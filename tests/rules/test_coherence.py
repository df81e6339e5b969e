"""The default rule: properties that hold whatever its formula."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from gradbalance.rules import Coherence, Measured
from tests.reference import coherent_coefficients
from tests.rules.asking import Asked
from tests.strategies import group_norms, measurements

RULE = Coherence()
NAN = float("nan")
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "most": st.sampled_from([1.0, 2.0, 10.0]),
        "chance": st.sampled_from([0.01, 0.5]),
        "clear": st.sampled_from([0.02, 1.0]),
    },
)


def in_force(draw, measured):
    """The same measurement with the coefficients that the rule itself gave for another one."""
    other = draw(measurements(n=len(measured.names)))
    return measured._replace(coefficients=RULE(other._replace(scale_free=measured.scale_free)))


@given(norms=group_norms(), scale=st.sampled_from([2.0**-30, 0.125, 2.0**30]), data=st.data())
def test_the_scale_of_the_loss_does_not_change_the_coefficients(norms, scale, data):
    cosines = [data.draw(st.lists(st.floats(-1, 1), min_size=len(norms), max_size=len(norms))) for _ in range(3)]
    for scale_free in (True, False):
        one, other = (Asked(RULE, len(norms), smoothing=0.5, scale_free=scale_free) for _ in range(2))
        for c in cosines:
            expected = one.step(norms, cosines=c)
            torch.testing.assert_close(other.step([scale * n for n in norms], cosines=c), expected, rtol=1e-9, atol=0)


@given(measured=measurements(inactive=False), coherence=st.floats(-1, 1), norm=st.floats(1e-6, 1e6))
def test_equal_coherences_and_equal_shares_give_exactly_one(measured, coherence, norm):
    n = len(measured.names)
    equal = torch.full((n,), 1.0, dtype=torch.float64)
    shares = measured.shares if measured.scale_free else equal / n
    given_all = measured._replace(norms=norm * equal, shares=shares, coherences=coherence * equal)
    assert RULE(given_all).tolist() == [1.0] * n


@given(data=st.data(), measured=measurements(unknown=False), rise=st.floats(0, 2))
def test_a_more_coherent_group_is_not_slowed_down(data, measured, rise):
    measured = data.draw(st.sampled_from([measured, in_force(data.draw, measured)]))
    m = data.draw(st.integers(0, len(measured.names) - 1))
    higher = measured.coherences.clone()
    higher[m] = min(1.0, float(higher[m]) + rise)
    assert RULE(measured._replace(coherences=higher))[m] >= RULE(measured)[m] - 1e-12


@given(data=st.data(), measured=measurements())
def test_the_coefficients_are_bounded_by_the_options(data, measured):
    c = RULE(data.draw(st.sampled_from([measured, in_force(data.draw, measured)])))
    highest = RULE.most if measured.scale_free else RULE.limit
    assert ((c >= (1 - 1e-12) / RULE.most) & (c <= highest * (1 + 1e-12))).all()


@given(data=st.data(), first=measurements(inactive=False, unknown=False))
def test_no_coefficient_jumps(data, first):
    """Between two measurements the half with the larger change, again and again: a jump stays in sight."""
    second = data.draw(measurements(n=len(first.names), inactive=False, unknown=False))

    def at(t):
        shares = torch.lerp(first.shares.log(), second.shares.log(), t).exp()  # they span many orders of magnitude
        return RULE(first._replace(shares=shares, coherences=torch.lerp(first.coherences, second.coherences, t)))

    low, high, change = 0.0, 1.0, math.inf
    for _ in range(45):
        middle = (low + high) / 2
        left, right = (float((at(a) - at(b)).abs().max()) for a, b in ((low, middle), (middle, high)))
        low, high, change = (low, middle, left) if left >= right else (middle, high, right)
    assert change < 1e-4, f"between {at(low).tolist()} and {at(high).tolist()}"


@given(data=st.data(), measured=measurements())
def test_permuting_the_groups_permutes_the_coefficients(data, measured):
    order = data.draw(st.permutations(range(len(measured.names))))
    moved = [v[order] if torch.is_tensor(v) and v.dim() else v for v in measured]
    names = tuple(measured.names[i] for i in order)
    permuted = RULE(type(measured)(*moved)._replace(names=names))
    torch.testing.assert_close(permuted, RULE(measured)[order], rtol=1e-9, atol=0)


@given(measured=measurements(), known=st.integers(0, 2))
def test_unknown_coherences_give_finite_coefficients(measured, known):
    coherences = torch.where(torch.arange(len(measured.names)) < known, measured.coherences, NAN)
    c = RULE(measured._replace(coherences=coherences))
    assert c.isfinite().all()
    assert c[coherences.isnan()].eq(1).all(), "nothing is known of it"


def test_before_the_second_step_every_coefficient_is_one():
    for scale_free in (True, False):
        asked = Asked(RULE, 3, scale_free=scale_free)
        assert asked.step([9.0, 1.0, 0.5], cosines=[None] * 3).tolist() == [1.0] * 3


def test_a_branch_of_noise_moves_less_far_than_a_coherent_one():
    asked = Asked(RULE, 2)
    noise, learning = asked.step([1.0, 1.0], cosines=[0.02, 0.4]).tolist()
    assert learning > 1.5 * noise


@given(measured=measurements(), known=st.integers(0, 8), options=OPTIONS)
def test_in_numbers_the_rule_decides_as_on_tensors(measured, known, options):
    rule = Coherence(**options)
    coherences = torch.where(torch.arange(len(measured.names)) < known, measured.coherences, NAN)
    measured = measured._replace(coherences=coherences)
    lists = [v.tolist() if torch.is_tensor(v) else v for v in measured]
    assert rule.in_numbers(Measured(*lists)) == pytest.approx(rule(measured).tolist(), rel=1e-9)
    assert rule.in_numbers(Measured(*lists)._replace(coherences=None)) == [1.0] * len(measured.names)


@given(measured=measurements(unknown=False))
def test_float32_decides_as_float64(measured):
    assume(measured.shares.min() > 1e-6)
    narrow = type(measured)(*(v.float() if torch.is_tensor(v) and v.is_floating_point() else v for v in measured))
    torch.testing.assert_close(RULE(narrow).double(), RULE(measured), rtol=1e-3, atol=1e-4)


def test_the_rule_reads_nothing_of_the_host():
    """On the meta device there is no value to read: a host read raises."""
    n = torch.ones(3, dtype=torch.float64, device="meta")
    for scale_free in (True, False):
        assert RULE(Measured(tuple("abc"), n, n, n, None, n > 0, scale_free, n, n.sum())).shape == (3,)


@pytest.mark.parametrize("option", list(vars(RULE)))
def test_an_option_that_is_no_number_of_its_range_is_refused_by_name(option):
    for value in (-1.0, math.nan):
        with pytest.raises(ValueError, match=rf"`{option}` must be .* Got .*\. [A-Z]"):
            Coherence(**{option: value})


@given(measured=measurements(inactive=False), options=OPTIONS)
def test_the_rule_equals_its_equations(measured, options):
    coherences = [None if math.isnan(a) else a for a in measured.coherences.tolist()]
    expected = coherent_coefficients(coherences, measured.shares.tolist(), measured.scale_free, **options)
    assert Coherence(**options)(measured).tolist() == pytest.approx(expected, rel=1e-9)


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
    given_these = torch.tensor([coherences, shares], dtype=torch.float64)
    measured = Measured(
        ("a", "b"), given_these[1], given_these[1], given_these[0], None, given_these[1] > 0, scale_free,
        torch.ones(2, dtype=torch.float64), torch.tensor(9.0),
    )  # fmt: skip
    assert RULE(measured).tolist() == pytest.approx(expected, rel=1e-9)


def test_a_branch_of_unknown_coherence_changes_nothing_for_the_others():
    known = [0.12, 0.03]
    with_one_more = torch.tensor([*known, NAN], dtype=torch.float64)
    shares = torch.full((3,), 1 / 3, dtype=torch.float64)
    measured = Measured(
        ("a", "b", "c"), shares, shares, with_one_more, None, shares > 0, True, torch.ones_like(shares), shares[0]
    )
    assert RULE(measured).tolist() == pytest.approx([*coherent_coefficients(known, [0.5, 0.5], True), 1.0])


@pytest.mark.parametrize("name", ["chance", "clear"])
def test_an_option_that_divides_must_not_be_zero(name):
    with pytest.raises(ValueError, match=f"`{name}` must be finite and > 0"):
        Coherence(**{name: 0.0})
