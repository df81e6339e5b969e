"""Hypothesis strategies shared by the tests."""

import math

import numpy as np
import torch
from hypothesis import strategies as st

from gradbalance.rules import ConflictAware, Measured

# Eighths of integers: repeated and zero values are common, and no variance is small by underflow.
_EIGHTHS = st.integers(-8000, 8000).map(lambda n: n / 8)


@st.composite
def samples(draw, shape, dtype=torch.float64):
    """A tensor of the given shape, at an offset from the origin that may be large beside its spread."""
    size = int(torch.Size(shape).numel())
    values = draw(
        st.lists(
            draw(st.sampled_from([_EIGHTHS, st.sampled_from([0.0, 1.0])])),
            min_size=size,
            max_size=size,
        )
    )
    return torch.tensor(values, dtype=dtype).reshape(shape) + draw(
        st.sampled_from([0.0, -3.0, 1e4])
    )


@st.composite
def moment_inputs(draw, dtype=torch.float64):
    """Samples ``[B, T, D]`` and a mask ``[B, T]``, None or with any number of valid samples."""
    shape = [draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 3))]
    flags = st.lists(st.booleans(), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1])
    mask = draw(st.none() | flags.map(lambda values: torch.tensor(values).reshape(shape[:2])))
    return draw(samples(shape, dtype)), mask


# Thresholds that no ratio of the norms below meets exactly: at a tie the last bit of a sum would decide.
THRESHOLDS = st.sampled_from([1.0, 3.0**0.5, 11.0**0.5])
_NORM = st.one_of(
    st.sampled_from([0.5, 1.0, 2.0]),
    st.integers(1, 10**6).map(lambda n: n / 64),
    st.sampled_from([1e-30, 1e-12, 1e30]),
)
_ERROR = st.integers(0, 400).map(lambda n: n / 64)


@st.composite
def group_norms(draw, min_groups=2, inactive=False):
    """A list of norms >= 0: repeated, tiny and huge ones included, and zeros if ``inactive``."""
    norm = _NORM | st.just(0.0) if inactive else _NORM
    return draw(st.lists(norm, min_size=min_groups, max_size=6))


def group_errors(n, partial=False):
    """A list of ``n`` errors >= 0, with None for at most n - 2 groups if ``partial``."""
    error = _ERROR | st.none() if partial else _ERROR
    return st.lists(error, min_size=n, max_size=n).filter(
        lambda errors: sum(e is not None for e in errors) >= 2
    )


def group_cosines(n):
    """A list of ``n`` cosines between successive gradients."""
    return st.lists(st.integers(-64, 64).map(lambda c: c / 64), min_size=n, max_size=n)


@st.composite
def conflict_aware_rules(draw):
    """The paper's rule over the whole range of its options."""
    return ConflictAware(
        alpha=draw(st.sampled_from([0.0, 0.5, 1.0, 4.0])),
        eta=draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])),
        threshold=draw(THRESHOLDS),
        centred=draw(st.booleans()),
    )


SMOOTHINGS = st.sampled_from([0.0, 0.5, 0.9])
WINDOWS = st.sampled_from([None, (0, 2), (1, 3), (1, None)])


@st.composite
def measurements(draw, n=None, inactive=True, unknown=True):
    """What a rule is given: shares that add up to 1, coherences in [-1, 1], no error."""
    n = draw(st.integers(2, 5)) if n is None else n
    norms = np.array(draw(st.lists(_NORM, min_size=n, max_size=n)))
    coherence = st.floats(-1, 1) | st.floats(0, 0.15) | st.sampled_from([0.0, 0.02, 0.3])
    coherence = coherence | st.just(math.nan) if unknown else coherence
    coherences = np.array(draw(st.lists(coherence, min_size=n, max_size=n)))
    spread = st.floats(0, 0.5) | st.just(math.inf)
    spreads = np.array(draw(st.lists(spread, min_size=n, max_size=n)))
    active = np.ones(n, dtype=bool)
    if inactive:
        active[draw(st.integers(0, n - 1))] = draw(st.booleans()) or n == 2
    shares = norms / norms.sum()
    rate = st.sampled_from([0.0, 1e-5, 1e-4, 1e-3, math.nan])
    rates = draw(st.none() | st.lists(rate, min_size=n, max_size=n))
    return Measured(
        names=tuple("abcde"[:n]),
        norms=np.where(active, norms, 0.0),
        shares=shares,
        coherences=coherences,
        coherence_errors=spreads,
        useful=coherences * shares,
        useful_errors=spreads * shares,
        errors=None,
        active=active,
        scale_free=draw(st.booleans()),
        coefficients=np.ones(n),
        step=9,
        rates=None if rates is None else np.array(rates),
    )
