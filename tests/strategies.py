"""Hypothesis strategies shared by the tests."""

import torch
from hypothesis import strategies as st

# Eighths of integers: repeated and zero values are common, and no variance is small by underflow.
_EIGHTHS = st.integers(-8000, 8000).map(lambda n: n / 8)


@st.composite
def samples(draw, shape, dtype=torch.float64):
    """A tensor of the given shape, at an offset from the origin that may be large beside its spread."""
    size = int(torch.Size(shape).numel())
    values = draw(
        st.lists(draw(st.sampled_from([_EIGHTHS, st.sampled_from([0.0, 1.0])])), min_size=size, max_size=size)
    )
    return torch.tensor(values, dtype=dtype).reshape(shape) + draw(st.sampled_from([0.0, -3.0, 1e4]))


@st.composite
def moment_inputs(draw, dtype=torch.float64):
    """Samples ``[B, T, D]`` and a mask ``[B, T]``, None or with any number of valid samples."""
    shape = [draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 3))]
    flags = st.lists(st.booleans(), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1])
    mask = draw(st.none() | flags.map(lambda values: torch.tensor(values).reshape(shape[:2])))
    return draw(samples(shape, dtype)), mask
