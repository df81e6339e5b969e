import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

from gradbalance.statistics import _central, moments
from tests.strategies import moment_inputs

from . import reference
from .reference import gamma


def jagged(x):
    return torch.nested.nested_tensor([x[0], x[0, :2]], layout=torch.jagged)


DIMS = [None, 0, 1, -1, (0, 1), (1, 2), (0, 2), (-1, 0, 1), ()]
ORDERS = [1, 2, 3, 4]


@pytest.fixture(scope="module", autouse=True, params=[5, 10**9], ids=["blocks", "whole"])
def block(request):
    """Every test of this module runs twice: in blocks of a few numbers, and with all at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_central, "_BLOCK", request.param)
        yield


@given(inputs=moment_inputs(), dim=st.sampled_from(DIMS))
def test_moments_equal_their_definition(inputs, dim):
    x, mask = inputs
    found = moments(x, mask, dim=dim, order=4)
    expected = reference.moments(x, mask, dim)
    assert_close(
        found.count.expand(expected[0].shape) if dim is None else found.count,
        count_of(expected[0], dim, x),
    )
    for value, definition in zip(found[1:], expected[1:], strict=True):
        assert_close(value, definition, rtol=1e-9, atol=1e-9)


def count_of(counts, dim, x):
    if dim is None:
        return counts.long()
    axes = [dim] if isinstance(dim, int) else dim
    return (
        counts.long() if x.dim() - 1 in [axis % x.dim() for axis in axes] else counts[..., 0].long()
    )


@given(inputs=moment_inputs(), order=st.sampled_from(ORDERS))
def test_a_tensor_of_one_axis_holds_the_samples_of_one_feature(inputs, order):
    x, mask = inputs
    x, mask = x[0, :, 0], None if mask is None else mask[0]
    found = moments(x, mask, order=order)
    assert_close(tuple(found), tuple(moments(x[:, None], mask, order=order)))
    for dim in (0, -1, (0,)):
        assert_close(tuple(moments(x, mask, dim=dim, order=order)), tuple(found))


@pytest.mark.parametrize("order", ORDERS)
def test_moments_beyond_the_order_are_none(order):
    assert [value is None for value in moments(gamma(5, 2), order=order)[1:]] == [
        k > order for k in ORDERS
    ]


@given(inputs=moment_inputs(), padding=st.sampled_from([0.0, 1e30, float("nan"), float("inf")]))
def test_appended_padding_changes_neither_value_nor_gradient(inputs, padding):
    x, mask = inputs
    mask = torch.ones(x.shape[:-1], dtype=torch.bool) if mask is None else mask
    leaf = x.clone().requires_grad_()
    longer = torch.cat([x, torch.full_like(x, padding)], 1).requires_grad_()
    found = moments(leaf, mask, order=4)
    same = moments(longer, torch.cat([mask, torch.zeros_like(mask)], 1), order=4)
    assert_close(same, found, rtol=1e-9, atol=1e-9)
    sum(value.sum() for value in found[1:]).backward()
    sum(value.sum() for value in same[1:]).backward()
    assert_close(longer.grad, torch.cat([leaf.grad, torch.zeros_like(x)], 1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dim", [None, 1])
@pytest.mark.parametrize("masked", [False, True])
def test_what_is_not_finite_and_not_masked_makes_all_moments_of_its_feature_nan(value, dim, masked):
    x = gamma(3, 5, 2)
    x[1, 1, 0] = value
    mask = (torch.arange(5) < 4).expand(3, 5) if masked else None
    for order in ORDERS:
        for moment in moments(x, mask, dim=dim, order=order)[1 : order + 1]:
            spoilt = torch.zeros(3, 2, dtype=torch.bool)
            spoilt[1, 0] = True
            assert moment.isnan().tolist() == (spoilt.any(0) if dim is None else spoilt).tolist()


@given(inputs=moment_inputs(), seed=st.integers(0, 9))
def test_the_order_of_the_samples_is_irrelevant(inputs, seed):
    x, mask = inputs
    order = torch.randperm(x.shape[0], generator=torch.Generator().manual_seed(seed))
    shuffled = moments(x[order], None if mask is None else mask[order], order=4)
    assert_close(shuffled, moments(x, mask, order=4), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dim", [None, 1])
@pytest.mark.parametrize("order", [2, 4])
def test_float32_stays_accurate_ten_thousand_deviations_from_the_origin(order, masked, dim):
    x = gamma(4, 1000, 16, offset=1.4e4)
    mask = torch.rand(4, 1000, generator=torch.Generator().manual_seed(1)) > 0.3 if masked else None
    found = moments(x, mask, dim=dim, order=order)
    expected = moments(x.double(), mask, dim=dim, order=order)
    for value, exact in zip(found[1 : order + 1], expected[1 : order + 1], strict=True):
        assert ((value - exact) / exact).abs().max() <= 1e-5


@pytest.mark.parametrize("dim", [None, 1])
@pytest.mark.parametrize("masked", [False, True])
def test_the_first_samples_may_lie_far_from_the_others(dim, masked):
    x = gamma(2, 4_000, 3)
    x[:, :33] += 57.0
    mask = torch.ones(2, 4_000, dtype=torch.bool) if masked else None
    found, exact = (moments(part, mask, dim=dim, order=4) for part in (x, x.double()))
    for value, expected in zip(found[1:], exact[1:], strict=True):
        assert ((value - expected) / expected).abs().max() <= 1e-6


def test_the_gradient_stays_accurate_far_from_the_origin():
    x = gamma(1000, 16, offset=1.4e4)
    gradients = []
    for dtype in (torch.float32, torch.float64):
        leaf = x.to(dtype, copy=True).requires_grad_()
        sum(value.sum() for value in moments(leaf, order=4)[1:]).backward()
        gradients.append(leaf.grad.double())
    assert (gradients[0] - gradients[1]).norm() <= 1e-5 * gradients[1].norm()


@pytest.mark.parametrize(("dtype", "largest"), [(torch.float16, 65504.0), (torch.bfloat16, 1e4)])
def test_half_precision_is_accumulated_in_float32(dtype, largest):
    x = (torch.linspace(-1, 1, 3000) * largest).to(dtype)[:, None]
    found, expected = moments(x, order=4), moments(x.double(), order=4)
    assert all(value.dtype == torch.float32 for value in found[1:])
    assert_close(found[2:], expected[2:], rtol=1e-5, atol=1e-5, check_dtype=False)


def test_a_float16_gradient_that_does_not_fit_is_infinite():
    x = torch.tensor([[-65504.0], [65504.0], [0.0]], dtype=torch.float16, requires_grad=True)
    moments(x).variance.square().sum().backward()
    assert x.grad.dtype == torch.float16
    assert x.grad.flatten().tolist() == [-torch.inf, torch.inf, 0.0]


@pytest.mark.parametrize("value", [0.0, 0.1, 1234.567, -3e4])
@pytest.mark.parametrize("masked", [False, True])
def test_zero_variance_gives_zero_higher_moments_and_a_finite_gradient(value, masked):
    x = torch.full((97, 2), value, requires_grad=True)
    found = moments(x, torch.arange(97) > 3 if masked else None, order=4)
    assert found.skewness.tolist() == found.kurtosis.tolist() == [0.0, 0.0]
    assert (found.variance >= 0).all()
    sum(part.sum() for part in found[2:]).backward()
    assert x.grad.abs().max() <= 1e-6 * max(1, abs(value))


@pytest.mark.parametrize("spread", [1e-12, 1e-20, 1e-38])
def test_a_spread_too_small_for_float32_counts_as_zero_variance(spread):
    x = torch.tensor([[0.0], [0.0], [spread]], requires_grad=True)
    found = moments(x, order=4)
    assert found.skewness == found.kurtosis == 0
    (found.skewness + found.kurtosis).sum().backward()
    assert not x.grad.any()


@pytest.mark.parametrize("dim", [None, 1])
@pytest.mark.parametrize("shape", [(3, 4, 2), (3, 0, 2)])
def test_without_valid_samples_every_moment_and_its_gradient_are_zero(shape, dim):
    x = torch.full(shape, float("nan"), requires_grad=True)
    found = moments(x, torch.zeros(shape[:2], dtype=torch.bool), dim=dim, order=4)
    assert all(not value.any() for value in found)
    sum(value.sum() for value in found[1:]).backward()
    assert not x.grad.any()
    if 0 in shape:
        assert all(not value.any() for value in moments(x, dim=dim, order=4))


def test_an_axis_of_no_groups_gives_empty_moments():
    x = torch.zeros(0, 4, 2, requires_grad=True)
    found = moments(x, dim=1, order=3)
    assert found.skewness.shape == (0, 2)
    found.skewness.sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dim", [None, 1, (0, 2)])
@pytest.mark.parametrize("masked", [False, True])
def test_first_and_second_derivatives_pass_gradcheck(order, dim, masked):
    x = gamma(4, 5, 2).double().requires_grad_()
    mask = torch.rand(4, 5, generator=torch.Generator().manual_seed(2)) > 0.3 if masked else None

    def run(x):
        return moments(x, mask, dim=dim, order=order)[1 : order + 1]

    assert gradcheck(run, x)
    assert gradgradcheck(run, x)


@pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning"
)  # torch.compile itself does it
@pytest.mark.parametrize("dim", [None, 1, (0, 2)])
@pytest.mark.parametrize("masked", [False, True])
def test_moments_compile_without_a_graph_break(dim, masked):
    torch.compiler.reset()  # or the cases would count as recompilations of one function
    x = gamma(4, 6, 3).requires_grad_()
    mask = torch.arange(24).reshape(4, 6) % 3 > 0 if masked else None

    def run(x):
        return moments(x, mask, dim=dim, order=4)

    found, expected = torch.compile(run, fullgraph=True, backend="aot_eager")(x), run(x)
    assert_close(tuple(found), tuple(expected))
    gradients = [
        torch.autograd.grad(sum(v.sum() for v in value[1:]), x)[0] for value in (found, expected)
    ]
    assert_close(*gradients)


@pytest.mark.parametrize("in_dims", [(0, 0), (1, None), (None, 0), (2, 1)])
def test_vmap_equals_a_loop(in_dims):
    x, mask = gamma(3, 3, 3, 2).double(), torch.arange(27).reshape(3, 3, 3) % 4 > 0
    x = x[0] if in_dims[0] is None else x
    mask = mask[0] if in_dims[1] is None else mask

    def run(x, mask):
        return moments(x, mask, order=4)[:4]

    def gradient(x, mask):
        return torch.func.grad(lambda x: sum(value.sum() for value in run(x, mask)[1:]))(x)

    for function in (run, gradient):
        found = torch.func.vmap(function, in_dims=in_dims)(x, mask)
        singles = [
            function(
                *(
                    t if d is None else t.select(d, i)
                    for t, d in zip((x, mask), in_dims, strict=True)
                )
            )
            for i in range(3)
        ]
        expected = (
            torch.stack(singles)
            if function is gradient
            else tuple(map(torch.stack, zip(*singles, strict=True)))
        )
        assert_close(found, expected)


def test_unmasked_vmap_equals_a_loop():
    x = gamma(3, 4, 2)
    assert_close(
        torch.func.vmap(lambda x: moments(x).variance)(x),
        torch.stack([moments(part).variance for part in x]),
    )


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (
            lambda x: moments(x.long()),
            TypeError,
            r"`x` must be a floating-point tensor\. Got torch\.int64\.",
        ),
        (lambda x: moments([1.0]), TypeError, r"Got list\."),
        (
            lambda x: moments(jagged(x)),
            TypeError,
            r"`x` must be a dense tensor\. Got a nested one\. Pass x\.val",
        ),
        (
            lambda x: moments(x.to_sparse()),
            TypeError,
            r"`x` must be a dense tensor\. Got torch\.sparse_coo\.",
        ),
        (lambda x: moments(x, [True]), TypeError, r"`mask` must be a boolean tensor\. Got list\."),
        (
            lambda x: moments(x[0, 0], torch.ones(2) > 0),
            ValueError,
            r"\[3\] for samples of shape \[3\]\. Got \[2\]",
        ),
        (
            lambda x: moments(x, torch.ones(4, 5)),
            TypeError,
            r"`mask` must be a boolean tensor\. Got torch\.float32\.",
        ),
        (
            lambda x: moments(x, torch.ones(5, 4) > 0),
            ValueError,
            r"`mask` must hold one flag per sample, \[4, 5\] for samples of shape \[4, 5, 3\]\. Got \[5, 4\]\. Leave",
        ),
        (lambda x: moments(x, order=5), ValueError, r"`order` must be 1, 2, 3 or 4\. Got 5\."),
        (lambda x: moments(x, order=0), ValueError, r"`order` must be 1, 2, 3 or 4\. Got 0\."),
        (
            lambda x: moments(x, order=2.0),
            TypeError,
            r"`order` must be an integer.* Got 2\.0\. The",
        ),
        (lambda x: moments(x, order=True), TypeError, r"`order` must be an integer.* Got True\."),
        (lambda x: moments(x, order="2"), TypeError, r"`order` must be an integer.* Got '2'\."),
        (lambda x: moments(x, order=None), TypeError, r"`order` must be an integer.* Got None\."),
        (lambda x: moments(x, dim=0.0), TypeError, r"`dim` must be an axis, .* Got 0\.0\. Name"),
        (lambda x: moments(x, dim=True), TypeError, r"`dim` must be an axis, .* Got True\."),
        (lambda x: moments(x, dim="0"), TypeError, r"`dim` must be an axis, .* Got '0'\."),
        (lambda x: moments(x, dim=(0, None)), TypeError, r"`dim` must be .* Got \(0, None\)\."),
        (
            lambda x: moments(x, dim=3),
            ValueError,
            r"`dim` must hold different axes from -3 to 2 .* Got 3\.",
        ),
        (lambda x: moments(x, dim=(0, -3)), ValueError, r"Got \(0, -3\)\. Name each axis once"),
        (lambda x: moments(x[0, 0, 0]), ValueError, r"\[\.\.\., D\], D >= 1\. Got \[\]"),
        (lambda x: moments(x[..., :0]), ValueError, r"Got \[4, 5, 0\]"),
    ],
)
def test_bad_input_is_named(call, kind, message):
    with pytest.raises(kind, match=message):
        call(torch.zeros(4, 5, 3))


@pytest.mark.parametrize("one", [np.int64(1), np.array(1), torch.tensor(1)], ids=repr)
def test_an_integer_option_may_be_a_numpy_integer_or_have_no_axes(one):
    x = gamma(4, 5, 3)
    for dim, same in ((one, 1), ([one, 0], (0, 1)), (np.array([0, 1]), (0, 1))):
        assert_close(tuple(moments(x, dim=dim)), tuple(moments(x, dim=same)))
    assert moments(x, order=one).variance is None
