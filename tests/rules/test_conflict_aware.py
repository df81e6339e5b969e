"""The paper's rule, on parameters whose gradients have given norms."""

import math
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from gradbalance import PAPER
from gradbalance.rules import ConflictAware
from tests.reference import Reference, SlowConflictAware, paper_coefficients
from tests.rules.asking import Asked
from tests.strategies import SMOOTHINGS, WINDOWS, conflict_aware_rules, group_errors, group_norms


def coefficients(norms, errors=None, **options):
    """The coefficients of a first step, as a list."""
    return Asked(ConflictAware(**options), len(norms)).step(norms, errors).tolist()


def some_errors(data, norms, partial=False):
    return data.draw(st.none() | group_errors(len(norms), partial))


@given(data=st.data(), rule=conflict_aware_rules(), smoothing=SMOOTHINGS, window=WINDOWS)
def test_the_fast_rule_equals_the_slow_loops_over_many_steps(data, rule, smoothing, window):
    n = data.draw(st.integers(2, 5))
    fast, slow = (
        Asked(rule, n, smoothing, window),
        Reference(SlowConflictAware(rule), smoothing, window),
    )
    for _ in range(data.draw(st.integers(1, 5))):
        norm = st.floats(0.125, 1e3) | st.sampled_from([0.0, math.nan, math.inf])
        norms = data.draw(st.lists(norm, min_size=n, max_size=n))
        errors = data.draw(st.none() | group_errors(n, partial=True))
        expected = slow.step(norms, errors)
        assert fast.step(norms, errors).tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)
        assert fast.penalty.balance.step == slow.steps


# What version 0.1 gave for `PAPER`, printed to the last digit: norms, errors, coefficients.
BEFORE = [
    ([3.0, 1.0], None, [0.5, 1.0]),
    ([3.0, 1.0], [0.5, 1.0], [0.01798621066859979, 1.0]),
    ([1.0, 3.0], [0.5, 1.0], [0.03597242133719958, 1.0]),
    ([3.0, 1.0], [1.0, 0.5], [1.0, 0.03597242133719958]),
    ([0.7, 0.2, 1.3], [0.31, 0.9, 0.62], [0.012289666220804126, 1.0, 0.7071067811865476]),
    ([0.7, 0.2, 1.3], [None, 0.45, 0.62], [1.0, 0.11954731989361522, 1.0]),
    ([0.7, 0.0, 1.3], [0.31, 0.9, 0.62], [0.03597242220324193, 1.0, 1.0]),
    ([4.0, 2.0, 1.0, 8.0], None, [0.6299605249474366, 0.7937005259840998, 1.0, 0.5]),
    (
        [4.0, 2.0, 1.0, 8.0],
        [0.1, 0.0, 2.0, 0.4],
        [0.7937005259840998, 0.0, 1.0, 0.7937005259840998],
    ),
]


@pytest.mark.parametrize(("norms", "errors", "expected"), BEFORE)
def test_the_settings_of_the_paper_give_what_the_first_version_gave(norms, errors, expected):
    assert Asked(PAPER["rule"], len(norms)).step(norms, errors).tolist() == pytest.approx(
        expected, rel=1e-12, abs=1e-12
    )


@given(
    norms=st.tuples(st.floats(0.01, 100), st.floats(0.01, 100)),
    errors=st.tuples(st.floats(0.01, 10), st.floats(0.01, 10)),
    alpha=st.floats(0.1, 3),
    eta=st.sampled_from([0.1, 0.5, 1.0]),
)
def test_two_groups_give_the_formula_of_the_paper(norms, errors, alpha, eta):
    assume(abs(errors[0] - errors[1]) > 1e-4 * max(errors))  # outside the dead band
    c = coefficients(norms, errors, alpha=alpha, eta=eta)
    assert c == pytest.approx(paper_coefficients(norms, errors, alpha, eta), rel=1e-12)
    modulated = coefficients(norms, errors, alpha=alpha, eta=1.0)
    assert all(a == b or b < 1 for a, b in zip(c, modulated, strict=True)), (
        "a penalty without a modulation"
    )


@given(data=st.data(), norms=group_norms(inactive=True), rule=conflict_aware_rules())
def test_coefficients_lie_between_zero_and_one(data, norms, rule):
    c = Asked(rule, len(norms)).step(norms, some_errors(data, norms, partial=True))
    assert ((c >= 0) & (c <= 1)).all()


@given(
    n=st.integers(2, 6),
    norm=st.floats(1e-6, 1e6),
    error=st.none() | st.floats(0, 1e3),
    rule=conflict_aware_rules(),
)
def test_equal_norms_and_equal_errors_give_exactly_one(n, norm, error, rule):
    errors = None if error is None else [error] * n
    assert Asked(rule, n).step([norm] * n, errors).tolist() == [1.0] * n


@given(data=st.data(), norms=group_norms())
def test_alpha_zero_and_eta_one_give_exactly_one(data, norms):
    assert coefficients(norms, some_errors(data, norms), alpha=0, eta=1) == [1.0] * len(norms)


@given(data=st.data(), norms=group_norms(), rule=conflict_aware_rules())
def test_the_group_with_the_worst_error_keeps_its_step(data, norms, rule):
    errors = data.draw(group_errors(len(norms)))
    c = Asked(rule, len(norms)).step(norms, errors)
    assert c[max(range(len(norms)), key=errors.__getitem__)] == 1


@given(norms=group_norms(), rule=conflict_aware_rules())
def test_without_errors_the_smallest_norm_keeps_its_step(norms, rule):
    c = Asked(rule, len(norms)).step(norms)
    assert c[min(range(len(norms)), key=norms.__getitem__)] == 1


@given(data=st.data(), norms=group_norms(inactive=True), rule=conflict_aware_rules())
def test_permuting_the_groups_permutes_the_coefficients_and_the_conflicts(data, norms, rule):
    n, errors = len(norms), some_errors(data, norms)
    order = data.draw(st.permutations(range(n)))
    plain, permuted = Asked(rule, n), Asked(rule, n)
    c = plain.step(norms, errors)
    moved = permuted.step(
        [norms[i] for i in order], None if errors is None else [errors[i] for i in order]
    )
    assert moved.tolist() == pytest.approx(c[order].tolist(), rel=1e-9)
    expected = plain.penalty.balance.conflicts[order][:, order]
    assert permuted.penalty.balance.conflicts.tolist() == expected.tolist()


@given(
    data=st.data(),
    norms=group_norms(),
    rule=conflict_aware_rules(),
    scale=st.sampled_from([2.0**-20, 0.25, 2.0**20]),
)
def test_the_scale_of_the_loss_does_not_change_the_coefficients(data, norms, rule, scale):
    errors = some_errors(data, norms)
    one, other = (
        Asked(rule, len(norms)).step([f * n for n in norms], errors) for f in (1.0, scale)
    )
    assert other.tolist() == pytest.approx(one.tolist(), rel=1e-12)


@given(
    data=st.data(),
    norms=group_norms(),
    rule=conflict_aware_rules(),
    scale=st.sampled_from([0.25, 3.0, 17.0]),
)
def test_the_unit_of_the_errors_does_not_change_the_coefficients(data, norms, rule, scale):
    errors = [1.0 + e for e in data.draw(group_errors(len(norms)))]  # beside these eps is nothing
    one, other = (
        Asked(rule, len(norms)).step(norms, [f * e for e in errors]) for f in (1.0, scale)
    )
    assert other.tolist() == pytest.approx(one.tolist(), rel=1e-6, abs=1e-9)


@given(
    data=st.data(), norms=group_norms(), factor=st.floats(1.0, 100.0), rule=conflict_aware_rules()
)
def test_a_larger_norm_lowers_only_its_own_coefficient(data, norms, factor, rule):
    errors, m = some_errors(data, norms), data.draw(st.integers(0, len(norms) - 1))
    raised = [n * factor if i == m else n for i, n in enumerate(norms)]
    before, after = (Asked(rule, len(norms)).step(v, errors) for v in (norms, raised))
    assert after[m] <= before[m]
    assert all(after[k] >= before[k] for k in range(len(norms)) if k != m)


@given(data=st.data(), norms=group_norms(), rule=conflict_aware_rules())
def test_a_lower_error_never_raises_the_own_coefficient(data, norms, rule):
    errors = data.draw(group_errors(len(norms)))
    m = data.draw(st.integers(0, len(norms) - 1))
    lowered = [
        e * data.draw(st.sampled_from([0.0, 0.3, 0.9])) if i == m else e
        for i, e in enumerate(errors)
    ]
    before, after = (Asked(rule, len(norms)).step(norms, v) for v in (errors, lowered))
    assert after[m] <= before[m] + 1e-12


def test_a_group_that_was_not_observed_is_left_alone():
    assert coefficients([9.0, 2.0, 1.0], [None, 0.5, 1.0], eta=0.5, alpha=0.0) == [1.0, 0.5, 1.0]


@pytest.mark.parametrize("centred", [True, False])
def test_a_group_that_was_not_observed_changes_nothing_for_the_others(centred):
    c = coefficients([9.0, 2.0, 1.0, 1.0], [None, 0.5, 1.0, 0.8], centred=centred)
    assert c == [1.0, *coefficients([2.0, 1.0, 1.0], [0.5, 1.0, 0.8], centred=centred)]


def test_errors_stay_in_force_until_the_next_observation():
    asked = Asked(ConflictAware(eta=0.5, alpha=0.0), 2)
    assert asked.step([2.0, 1.0], [1.0, 0.5]).tolist() == [1.0, 1.0]
    assert asked.step([2.0, 1.0]).tolist() == [1.0, 1.0]
    assert asked.step([2.0, 1.0], [0.5, 1.0]).tolist() == [0.5, 1.0]


def test_the_norms_decide_where_all_errors_fell_into_steps_that_did_not_count():
    asked = Asked(ConflictAware(eta=0.5), 2)
    asked.step([math.nan, 1.0], [0.1, 1.0])
    assert asked.step([2.0, 1.0]).tolist() == [0.5, 1.0]


def test_the_penalty_grows_with_the_fraction_of_the_peers_in_conflict():
    assert coefficients([4.0, 2.0, 1.0], eta=0.25) == [0.25, 0.5, 1.0]
    assert coefficients([8.0, 0.0, 2.0, 2.0, 1.0], eta=0.125, threshold=3.0) == pytest.approx(
        [0.125, 1, 1, 1, 1]
    )
    assert coefficients([8.0, 4.0, 4.0, 1.0], eta=0.125, threshold=3.0) == pytest.approx(
        [0.5, 0.5, 0.5, 1.0]
    )


@pytest.mark.parametrize(("centred", "start"), [(True, 1.0), (False, 0.0)])
def test_the_modulation_is_by_the_lead_over_the_mean_of_the_peers(centred, start):
    c = coefficients([1.0, 1.0, 1.0], [1.0, 2.0, 4.0], alpha=0.3, eta=1.0, centred=centred)
    lead = 1.0 / ((0.5 + 0.25) / 2) - start
    assert c == pytest.approx([1 - math.tanh(0.3 * lead), 1.0, 1.0], rel=1e-6)


def test_a_tie_is_no_conflict():
    assert coefficients([2.0, 1.0], threshold=2.0, eta=0.5) == [1.0, 1.0]
    assert coefficients([2.0, 1.0], [0.5, 0.5], eta=0.5) == [1.0, 1.0]


def test_a_lead_of_one_ulp_is_no_lead():
    assert coefficients([1.0, 1.0, 1.0], [0.1, 0.1, math.nextafter(0.1, 1)]) == [1.0, 1.0, 1.0]


def test_an_error_of_zero_is_an_error():
    assert coefficients([2.0, 1.0], [0.0, 1.0], eta=0.5, alpha=0.0) == [0.5, 1.0]
    assert coefficients([2.0, 1.0], [0.0, 1.0], eta=1.0) == [0.0, 1.0]


def test_a_conflict_is_shown_for_whose_sake_a_group_is_damped():
    asked = Asked(ConflictAware(eta=0.5, threshold=2.0), 3)
    asked.step([9.0, 6.0, 2.0])
    assert asked.penalty.balance.conflicts.tolist() == [
        [False, False, True],
        [False, False, True],
        [False] * 3,
    ]


def test_neither_coherence_nor_the_optimizer_matters():
    rule, norms = ConflictAware(eta=0.5), [2.0, 1.0]
    for cosines in (None, [0.9, -0.9]):
        for scale_free in (True, False):
            assert Asked(rule, 2, scale_free=scale_free).step(norms, None, cosines).tolist() == [
                0.5,
                1.0,
            ]
    assert rule.needs_coherence is False


@pytest.mark.parametrize(
    ("option", "interval"),
    [
        ({"alpha": -1}, "[0, inf]"),
        ({"alpha": math.inf}, "[0, inf]"),
        ({"alpha": math.nan}, "[0, inf]"),
        ({"eta": -0.1}, "[0, 1]"),
        ({"eta": 1.1}, "[0, 1]"),
        ({"threshold": 0.5}, "[1, inf]"),
        ({"threshold": math.inf}, "[1, inf]"),
    ],
)
def test_an_option_out_of_range_is_refused_by_name(option, interval):
    ((name, value),) = option.items()
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the message is compared
        ConflictAware(**option)
    assert str(caught.value).startswith(f"`{name}` must be finite and in {interval}. Got {value}. ")


def test_an_option_that_is_no_number_is_refused_by_name():
    with pytest.raises(
        TypeError, match=r"`eta` must be a number. Got '0.5'\. Pass a Python number"
    ):
        ConflictAware(eta="0.5")


def test_the_ends_of_the_ranges_are_inside_them():
    ConflictAware(alpha=0, eta=0, threshold=1)
    assert replace(ConflictAware(), eta=1).eta == 1


def test_the_rule_of_the_paper_has_its_settings():
    assert PAPER["rule"] == ConflictAware(alpha=1.0, eta=0.5, threshold=1.0, centred=False)
