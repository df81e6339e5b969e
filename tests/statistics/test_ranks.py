"""Moments of parts, merged, as those of ranks are."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from gradbalance.statistics._central import Central, merge
from gradbalance.statistics.masked import central_moments, standardise
from tests.strategies import samples

from .reference import gamma


def merged(x, parts, order=4):
    pieces = []
    for part in x.split(parts):
        pieces.append(central_moments(part, None, None, order, covariance=True, precise=True))
    count, mean, powers, covariance = zip(*pieces, strict=True)
    powers = [torch.stack(power) for power in zip(*powers, strict=True)]
    return merge(Central(torch.stack(count), torch.stack(mean), powers, torch.stack(covariance)))


@given(data=st.data(), parts=st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(any))
def test_merged_parts_equal_the_whole(data, parts):
    x = data.draw(samples([sum(parts), 2]))
    found = merged(x, parts)
    whole = central_moments(x, None, None, 4, covariance=True)
    assert_close(found.covariance, whole.covariance, rtol=1e-9, atol=1e-7)
    for value, expected in zip(standardise(found), standardise(whole), strict=True):
        assert_close(value, expected, rtol=1e-8, atol=1e-7)


def test_merged_parts_stay_accurate_ten_thousand_deviations_from_the_origin():
    x = gamma(1000, 3, offset=1.4e4)
    found, exact = standardise(merged(x, 100)), standardise(merged(x.double(), 100))
    for value, expected in zip(found[1:], exact[1:], strict=True):
        assert ((value - expected) / expected).abs().max() <= 1e-5
