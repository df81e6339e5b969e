"""Moments of parts, merged."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from gradbalance._moments import one_pass
from gradbalance._moments.ranks import merge
from gradbalance._moments.statistics import Central, central_moments, standardise
from tests.strategies import samples


@given(data=st.data(), parts=st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(any))
def test_merged_parts_equal_the_whole(data, parts):
    x = data.draw(samples([sum(parts), 2]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(one_pass, "_PILOT", 1)  # or the shift would be the mean itself
        pieces = [central_moments(part, order=4, covariance=True, in_two_parts=True) for part in x.split(parts)]
    count, shift, remainder, powers, covariance = zip(*pieces, strict=True)
    powers = [torch.stack(power) for power in zip(*powers, strict=True)]
    merged = merge(Central(*map(torch.stack, (count, shift, remainder)), powers, torch.stack(covariance)))
    whole = central_moments(x, order=4, covariance=True)
    assert_close(merged.covariance, whole.covariance, rtol=1e-9, atol=1e-7)
    for value, expected in zip(standardise(merged), standardise(whole), strict=True):
        assert_close(value, expected, rtol=1e-8, atol=1e-7)
