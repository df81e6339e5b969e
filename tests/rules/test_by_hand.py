"""Coefficients that do not depend on what was measured."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradbalance.rules import ByHand, Watch
from tests.rules.asking import Asked
from tests.strategies import group_norms


@given(norms=group_norms(), factors=st.dictionaries(st.sampled_from(["text", "audio"]), st.floats(0, 1e6)))
def test_factors_by_hand_are_the_coefficients_whatever_is_measured(norms, factors):
    asked = Asked(ByHand(**factors), len(norms))
    names = asked.state.names
    assert asked.step(norms).tolist() == [factors.get(name, 1.0) for name in names]
    assert asked.state.balance.conflicts.tolist() == [
        [factors.get(m, 1.0) < factors.get(k, 1.0) for k in names] for m in names
    ], "without conflicts of its own a rule damps whoever moves less for whoever moves more"


@pytest.mark.parametrize("factor", [-0.1, math.nan, math.inf])
def test_a_factor_that_is_none_is_refused_by_name(factor):
    with pytest.raises(ValueError, match=r"`text` must be a finite factor >= 0. Got .*\. Take 1"):
        ByHand(text=factor)


def test_a_factor_of_no_group_is_refused_at_the_first_step():
    with pytest.raises(ValueError, match=r"`ByHand` must name groups. Got video\. The groups are: text, audio\."):
        Asked(ByHand(text=1, video=2), 2).step([1.0, 1.0])


@given(norms=group_norms(inactive=True))
def test_watching_gives_one_and_measures_all(norms):
    asked = Asked(Watch(), len(norms))
    assert asked.step(norms, cosines=[0.5] * len(norms)).tolist() == [1.0] * len(norms)
    assert asked.state.balance.norms.tolist() == norms
    assert not asked.state.balance.conflicts.any()
    if asked.state.balance.step == 1:
        assert asked.state.balance.coherences.tolist() == [0.5] * len(norms)


def test_the_representation_is_what_one_would_write():
    assert repr(ByHand(text=0.1, audio=2)) == "ByHand(text=0.1, audio=2)"
    assert repr(Watch()) == "Watch()"
