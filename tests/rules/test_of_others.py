"""The rules of others: each equals its equations, and has an answer where not all is known."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradbalance import attach
from gradbalance.rules import OGM, ClipGroups, Epochwise
from tests.reference import clipped, epochwise_coefficients, ogm_coefficients
from tests.rules.asking import NAMES, Asked
from tests.strategies import group_norms

ALPHAS = st.sampled_from([0.1, 0.3, 1.0, 50.0])
LEADS = st.sampled_from([0.0, 0.2, 0.7])
FACTORS = st.sampled_from([0.0, 0.5, 1.0])
MOSTS = st.sampled_from([1e-30, 0.3, 1.0, 1e30])
RULES = [OGM(0.3), Epochwise(), ClipGroups(1.0)]
_PROBABILITY = st.integers(0, 64).map(lambda k: k / 64)  # exact, so that 1 - e is


@st.composite
def observed(draw, n, at_least=0):
    """An error in [0, 1] or None for each of ``n`` groups."""
    errors = st.lists(_PROBABILITY | st.none(), min_size=n, max_size=n)
    return draw(errors.filter(lambda some: sum(e is not None for e in some) >= at_least))


def measured_by(rule, norms, errors=None):
    """What the engine gives ``rule`` at a first step."""
    seen = []

    def spy(measured):
        seen.append(measured)
        return rule(measured)

    spy.needs_coherence = getattr(rule, "needs_coherence", True)
    Asked(spy, len(norms)).step(norms, errors)
    return seen[0]


@given(data=st.data(), norms=group_norms(inactive=True), alpha=ALPHAS)
def test_ogm_equals_its_equations(data, norms, alpha):
    if sum(norm > 0 for norm in norms) < 2:
        norms = [1.0] * len(norms)
    errors = data.draw(observed(len(norms), at_least=2))
    active = [norm > 0 for norm in norms]
    expected = ogm_coefficients(errors, active, alpha)
    c = Asked(OGM(alpha), len(norms)).step(norms, errors)
    assert c.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@given(data=st.data(), n=st.integers(2, 6), lead=LEADS, factor=FACTORS)
def test_epochwise_equals_its_equations(data, n, lead, factor):
    errors = data.draw(observed(n, at_least=2))
    expected = epochwise_coefficients(errors, lead, factor)
    assert Asked(Epochwise(lead, factor), n).step([1.0] * n, errors).tolist() == expected


@given(norms=st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=6), most=MOSTS)
def test_clipping_groups_equals_clipping_each_by_itself(norms, most):
    parameters = [torch.nn.Parameter(torch.zeros(3, dtype=torch.float64)) for _ in norms]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    groups = {name: [p] for name, p in zip(NAMES, parameters, strict=False)}
    attach(optimizer, groups, ClipGroups(most), apply_to="gradient")
    gradients = [[norm, -norm / 2, 0.0] for norm in norms]
    for p, gradient in zip(parameters, gradients, strict=True):
        p.grad = torch.tensor(gradient, dtype=torch.float64)
    optimizer.step()
    for p, expected in zip(parameters, clipped(gradients, most), strict=True):
        assert (-p.detach()).tolist() == pytest.approx(expected, rel=1e-9)


@given(norms=group_norms(inactive=True), most=MOSTS)
def test_no_group_is_longer_than_the_limit_and_a_shorter_one_is_left_alone(norms, most):
    measured = measured_by(ClipGroups(most), [*norms, 1.0, 1.0][:6])
    with np.errstate(all="raise", under="ignore"):
        c = ClipGroups(most)(measured)
    assert (measured.norms * c <= most * (1 + 1e-12)).all()
    assert (c[measured.norms <= most] == 1).all()


@pytest.mark.parametrize("rule", RULES[:2], ids=repr)
def test_before_anything_is_observed_every_coefficient_is_one(rule):
    assert Asked(rule, 3).step([9.0, 1.0, 0.5]).tolist() == [1.0] * 3


@pytest.mark.parametrize("rule", RULES[:2], ids=repr)
def test_what_was_observed_only_in_a_step_that_did_not_count_changes_nothing(rule):
    asked = Asked(rule, 3)
    asked.step([math.nan, 1.0, 1.0], [0.0, 0.5, 1.0])
    assert asked.step([1.0, 1.0, 1.0]).tolist() == [1.0] * 3


@pytest.mark.parametrize("rule", RULES[:2], ids=repr)
@given(data=st.data(), n=st.integers(2, 5))
def test_a_group_that_is_not_observed_has_one_and_changes_nothing_for_the_others(rule, data, n):
    errors = data.draw(st.lists(_PROBABILITY, min_size=n, max_size=n))
    place = data.draw(st.integers(0, n))
    alone = Asked(rule, n).step([1.0] * n, errors).tolist()
    beside = Asked(rule, n + 1).step([1.0] * (n + 1), [*errors[:place], None, *errors[place:]])
    assert beside.tolist() == [*alone[:place], 1.0, *alone[place:]]


def test_ogm_compares_only_groups_that_have_a_gradient():
    c = Asked(OGM(0.3), 3).step([1.0, 1.0, 0.0], [0.5, 0.6, 0.0])
    assert c.tolist() == pytest.approx([1 - math.tanh(0.3 * 1.25), 1.0, 1.0])


def test_epochwise_compares_a_group_that_has_no_gradient_at_this_step_too():
    assert Asked(Epochwise(), 3).step([1.0, 1.0, 0.0], [0.5, 0.5, 1.0]).tolist() == [0.5, 0.5, 1.0]


@given(n=st.integers(2, 6), error=st.floats(0, 1), alpha=ALPHAS, lead=LEADS)
def test_equal_errors_give_exactly_one(n, error, alpha, lead):
    for rule in (OGM(alpha), Epochwise(lead)):
        assert Asked(rule, n).step([1.0] * n, [error] * n).tolist() == [1.0] * n


@pytest.mark.parametrize("rule", RULES, ids=repr)
@given(data=st.data(), norms=group_norms())
def test_permuting_the_groups_permutes_the_coefficients(rule, data, norms):
    errors = data.draw(observed(len(norms), at_least=2))
    order = data.draw(st.permutations(range(len(norms))))
    c = Asked(rule, len(norms)).step(norms, errors)
    moved = Asked(rule, len(norms)).step([norms[i] for i in order], [errors[i] for i in order])
    assert moved.tolist() == pytest.approx(c[order].tolist(), rel=1e-9)


@given(
    data=st.data(),
    n=st.sampled_from([2, 3, 40]),
    alpha=st.sampled_from([1e-300, 0.3, 1e300]),
)
def test_the_answer_is_finite_whatever_was_observed(data, n, alpha):
    error = st.sampled_from([0.0, 1.0, 1 + 1e-9, 5e-324, 1 - 2**-53, math.nan])
    measured = measured_by(OGM(1.0), [1.0, 1.0])._replace(
        names=tuple(map(str, range(n))),
        norms=np.ones(n),
        errors=np.array(data.draw(st.lists(error, min_size=n, max_size=n))),
        active=np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n))),
    )
    with np.errstate(all="raise", under="ignore"):
        for rule in (OGM(alpha), Epochwise(), ClipGroups(1.0)):
            c = rule(measured)
            assert c.shape == (n,)
            assert np.isfinite(c).all()
            assert ((c >= 0) & (c <= 1)).all()


@pytest.mark.parametrize("others", [1.0, 1 + 1e-9, 1 - 2**-53])
@pytest.mark.parametrize("alpha", [1.0, 1e300])
def test_ogm_stops_a_branch_beside_others_that_score_nothing(others, alpha):
    measured = measured_by(OGM(1.0), [1.0] * 3, [0.5, others, others])
    with np.errstate(all="raise", under="ignore"):
        assert OGM(alpha)(measured).tolist() == [0.0, 1.0, 1.0]


@pytest.mark.parametrize("errors", [[1.5, 0.2], [1.5, 0.2, None]])
def test_ogm_refuses_errors_that_are_no_probabilities(errors):
    message = r"`observe` must be told errors in \[0, 1\] for OGM\. Got 1\.5\. Pass 1 minus the"
    with pytest.raises(ValueError, match=message):
        Asked(OGM(0.3), len(errors)).step([1.0] * len(errors), errors)


def test_epochwise_takes_a_branch_without_which_the_model_is_better():
    assert Asked(Epochwise(0.2, 0.25), 2).step([1.0, 1.0], [1.1, 0.95]).tolist() == [1.0, 1.0]
    assert Asked(Epochwise(0.2, 0.25), 2).step([1.0, 1.0], [1.1, 0.85]).tolist() == [1.0, 0.25]


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_none_of_them_measures_coherence(rule):
    assert measured_by(rule, [1.0, 1.0], [0.5, 0.5]).coherences is None


@pytest.mark.parametrize(
    ("make", "name", "value", "contract"),
    [
        (OGM, "alpha", 0.0, "finite and > 0"),
        (OGM, "alpha", math.nan, "finite and > 0"),
        (OGM, "alpha", math.inf, "finite and > 0"),
        (ClipGroups, "most", 0, "finite and > 0"),
        (ClipGroups, "most", -1.0, "finite and > 0"),
        (ClipGroups, "most", math.inf, "finite and > 0"),
        (Epochwise, "lead", -0.1, "finite and >= 0"),
        (Epochwise, "lead", math.inf, "finite and >= 0"),
        (Epochwise, "factor", 1.1, "in [0, 1]"),
        (Epochwise, "factor", math.nan, "in [0, 1]"),
    ],
)
def test_an_option_out_of_range_is_refused_by_name(make, name, value, contract):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the message is compared
        make(**{name: value})
    assert str(caught.value).startswith(f"`{name}` must be {contract}. Got {value}. ")


@pytest.mark.parametrize(
    ("make", "name"),
    [(OGM, "alpha"), (ClipGroups, "most"), (Epochwise, "lead"), (Epochwise, "factor")],
)
@pytest.mark.parametrize("value", ["0.5", None, True, 1j])
def test_an_option_that_is_no_number_is_refused_by_name(make, name, value):
    with pytest.raises(TypeError, match=rf"`{name}` must be a number\. Got .*\. Pass a Python"):
        make(**{name: value})


def test_the_representation_is_what_one_would_write():
    assert repr(RULES) == "[OGM(alpha=0.3), Epochwise(lead=0.2, factor=0.5), ClipGroups(most=1.0)]"
