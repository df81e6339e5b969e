"""Coefficients that do not depend on what was measured."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradbalance.rules import ByHand, ConflictAware, Watch
from tests.rules.asking import Asked
from tests.strategies import group_norms


@given(
    norms=group_norms(),
    factors=st.dictionaries(st.sampled_from(["text", "audio"]), st.floats(0, 1e6)),
)
def test_factors_by_hand_are_the_coefficients_whatever_is_measured(norms, factors):
    asked = Asked(ByHand(**factors), len(norms))
    expected = [factors.get(name, 1.0) for name in asked.penalty.names]
    assert asked.step(norms).tolist() == expected
    assert asked.penalty.balance.conflicts.tolist() == [
        [c < k for k in expected] for c in expected
    ], "without conflicts of its own a rule damps whoever moves less for whoever moves more"


@pytest.mark.parametrize("factor", [-0.1, math.nan, math.inf])
def test_a_factor_out_of_range_is_refused_by_name(factor):
    with pytest.raises(ValueError, match=r"`text` must be a finite factor >= 0. Got .*\. Take 1"):
        ByHand(text=factor)


@pytest.mark.parametrize("factor", ["0.1", None, 1j])
def test_a_factor_that_is_no_number_is_refused_by_name(factor):
    with pytest.raises(TypeError, match=r"`text` must be a number\. Got .*\. Pass a Python number"):
        ByHand(text=factor)


def test_a_factor_of_no_group_is_refused_at_construction_of_the_penalty():
    message = r"`ByHand` must name groups. Got video\. The groups are: text, audio\."
    with pytest.raises(ValueError, match=message):
        Asked(ByHand(text=1, video=2), 2)


def test_a_group_may_be_called_self():
    assert ByHand(self=0.5).factors == {"self": 0.5}


@given(norms=group_norms(inactive=True))
def test_watching_gives_one_and_measures_all(norms):
    asked = Asked(Watch(), len(norms))
    for _ in range(2):
        assert asked.step(norms, cosines=[0.5] * len(norms)).tolist() == [1.0] * len(norms)
    balance = asked.penalty.balance
    assert balance.norms.tolist() == pytest.approx(norms, rel=1e-12)
    assert not balance.conflicts.any()
    if balance.step == 2:
        expected = [0.5 if norm > 0 else math.nan for norm in norms]
        assert balance.coherences.tolist() == pytest.approx(expected, rel=1e-12, nan_ok=True)


def test_what_a_watched_rule_proposes_is_shown_and_not_applied():
    asked = Asked(Watch(ConflictAware(eta=0.5)), 2)
    assert asked.step([2.0, 1.0]).tolist() == [1.0, 1.0]
    assert asked.penalty.balance.proposed.tolist() == [0.5, 1.0]
    assert asked.penalty.balance.conflicts.tolist() == [[False, True], [False, False]]


def test_the_representation_is_what_one_would_write():
    assert repr(ByHand(text=0.1, audio=2)) == "ByHand(text=0.1, audio=2)"
    assert repr(Watch()) == "Watch()"
    assert repr(Watch(ByHand(text=0.1))) == "Watch(ByHand(text=0.1))"
