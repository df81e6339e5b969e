import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.testing import assert_close

from gradbalance.statistics import StatisticalLoss, statistical_loss
from tests.strategies import moment_inputs, samples

from . import reference

NAMES = ("mean", "variance", "skewness", "kurtosis", "covariance")


def batch(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@st.composite
def batches(draw):
    """Two batches of one shape, a predicted variance >= 0 and a mask that may be empty."""
    x, mask = draw(moment_inputs())
    mask = torch.ones(x.shape[:-1], dtype=torch.bool) if mask is None else mask
    return x, draw(samples(x.shape)), draw(samples(x.shape)).abs(), mask


@given(inputs=batches(), mixture=st.booleans(), normalise=st.booleans())
def test_the_loss_of_a_pair_equals_its_definition(inputs, mixture, normalise):
    mean, target, variance, mask = inputs
    found = statistical_loss(
        (mean, variance), target, mask, mixture=mixture, normalise=normalise, eps=0.5
    )
    expected = reference.loss_of_pair(
        mean, variance, target, mask, mixture=mixture, normalise=normalise, eps=0.5
    )
    assert found.item() == pytest.approx(expected, rel=1e-8, abs=1e-8)


@given(inputs=batches(), normalise=st.booleans())
def test_the_loss_of_samples_is_the_squared_difference_of_their_moments(inputs, normalise):
    prediction, target, _, mask = inputs
    found = statistical_loss(
        prediction, target, mask, moments=NAMES[:4], normalise=normalise, eps=0.5, reduction="none"
    )
    predicted, actual = reference.moments(prediction, mask), reference.moments(target, mask)
    scale = reference.scale(actual[1], actual[2], 0.5) if normalise else torch.ones_like(actual[2])
    powers = torch.stack([scale, scale**2, torch.ones_like(scale), torch.ones_like(scale)])
    assert_close(found, ((predicted - actual)[1:].square() / powers).mean(0), rtol=1e-7, atol=1e-7)


@given(inputs=batches(), normalise=st.booleans(), reduction=st.sampled_from(["mean", "none"]))
def test_tensors_of_one_axis_hold_the_samples_of_one_feature(inputs, normalise, reduction):
    prediction, target, variance, mask = (x[0] if x.dim() == 2 else x[0, :, 0] for x in inputs)
    for guess, names in ((prediction, NAMES), ((prediction, variance), NAMES[:2])):
        loss = StatisticalLoss(names, normalise=normalise, reduction=reduction)
        column = guess[:, None] if guess is prediction else tuple(x[:, None] for x in guess)
        assert_close(loss(guess, target, mask), loss(column, target[:, None], mask))


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_covariance_is_deep_coral_with_population_covariances(normalise, offset):
    prediction, target = batch(30, 3) + offset, 2 * batch(40, 3, seed=1) - offset
    difference = reference.covariance(prediction) - reference.covariance(target)
    if normalise:
        scale = reference.covariance(target).diag() + 1e-6
        difference = difference / torch.outer(scale, scale).sqrt()
    loss = StatisticalLoss(["covariance"], normalise=normalise)
    assert_close(loss(prediction, target), difference.square().sum() / (4 * 3**2))


@given(inputs=batches(), normalise=st.booleans())
def test_the_loss_is_never_negative_and_vanishes_with_its_gradient_at_equality(inputs, normalise):
    prediction, target, _, mask = inputs
    assert statistical_loss(prediction, target, mask, moments=NAMES, normalise=normalise) >= 0
    leaf = target.clone().requires_grad_()
    loss = statistical_loss(leaf, target, mask, moments=NAMES, normalise=normalise)
    loss.backward()
    assert loss == 0
    assert not leaf.grad.any()


@given(inputs=batches(), order=st.randoms(use_true_random=False))
def test_padding_and_the_order_of_the_samples_change_nothing(inputs, order):
    prediction, target, variance, mask = inputs
    rows = list(range(len(target)))
    order.shuffle(rows)
    padding = torch.full_like(target, float("nan"))
    longer = torch.cat([mask, torch.zeros_like(mask)], 1)
    for guess in (prediction, (prediction, variance)):
        names = NAMES if guess is prediction else NAMES[:2]
        expected = statistical_loss(guess, target, mask, moments=names)
        padded = torch.cat([prediction, padding], 1), torch.cat([variance, padding], 1)
        padded = padded[0] if guess is prediction else padded
        found = statistical_loss(padded, torch.cat([target, padding], 1), longer, moments=names)
        shuffled = statistical_loss(guess, target[rows], mask, mask[rows], moments=names)
        assert_close(found, expected, rtol=1e-7, atol=1e-7)
        assert_close(shuffled, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("scale", [2.0**-6, 2.0**6])
@pytest.mark.parametrize(
    ("name", "power"),
    [("mean", 2), ("variance", 4), ("covariance", 4), ("skewness", 0), ("kurtosis", 0)],
)
def test_scaling_both_sides_scales_each_part_by_its_power(name, power, scale):
    prediction, target = batch(30, 3) + 0.5, batch(40, 3, seed=1).exp()
    loss = StatisticalLoss([name])
    assert_close(loss(scale * prediction, scale * target), scale**power * loss(prediction, target))
    free = StatisticalLoss([name], normalise=True, eps=1e-30)
    assert_close(free(scale * prediction, scale * target), free(prediction, target))


@pytest.mark.parametrize("dim", [None, 1])
@pytest.mark.parametrize("name", NAMES)
def test_reduction_none_holds_one_value_per_feature_that_averages_to_the_loss(name, dim):
    prediction, target = batch(5, 6, 3), batch(5, 7, 3, seed=1).exp()
    errors = StatisticalLoss([name], dim=dim, reduction="none")(prediction, target)
    assert errors.shape == ((3,) if dim is None else (5, 3))
    assert_close(errors.mean(), StatisticalLoss([name], dim=dim)(prediction, target))


def test_the_target_receives_no_gradient():
    prediction, target = batch(5, 3).requires_grad_(), batch(5, 3, seed=1).requires_grad_()
    statistical_loss(prediction, target, moments=NAMES).backward()
    assert target.grad is None
    assert prediction.grad.any()


def test_a_batch_without_valid_samples_adds_nothing():
    prediction, target = batch(2, 4, 3).requires_grad_(), batch(2, 4, 3, seed=1)
    mask = torch.tensor([[False] * 4, [True] * 4])
    errors = statistical_loss(prediction, target, mask, moments=NAMES, dim=1, reduction="none")
    assert not errors[0].any()
    assert (errors[1] > 0).all()
    for masks in ((~mask & mask, None), (mask, ~mask & mask), (~mask & mask, mask)):
        assert statistical_loss(prediction, target, *masks, moments=NAMES) == 0
    errors.sum().backward()
    assert prediction.grad.isfinite().all()


def test_the_mask_also_holds_for_the_target_unless_it_has_its_own():
    prediction, target, mask = batch(6, 3), batch(6, 3, seed=1), torch.arange(6) > 1
    expected = statistical_loss(prediction[mask], target[mask])
    assert_close(statistical_loss(prediction, target, mask), expected)
    assert_close(statistical_loss(prediction[mask], target, target_mask=mask), expected)


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_of_samples_passes_gradcheck(name, normalise):
    target, mask = batch(4, 5, 3, seed=1).exp(), torch.arange(20).reshape(4, 5) % 4 > 0
    loss = StatisticalLoss([name], normalise=normalise)
    assert gradcheck(lambda x: loss(x, target, mask), batch(4, 5, 3).requires_grad_())


@pytest.mark.parametrize("mixture", [False, True])
@pytest.mark.parametrize("normalise", [False, True])
def test_the_gradient_of_a_pair_passes_gradcheck(mixture, normalise):
    target, mask = batch(4, 5, 3, seed=1).exp(), torch.arange(20).reshape(4, 5) % 4 > 0
    loss = StatisticalLoss(mixture=mixture, normalise=normalise)
    pair = batch(4, 5, 3).requires_grad_(), batch(4, 5, 3, seed=2).exp().requires_grad_()
    assert gradcheck(lambda *pair: loss(pair, target, mask), pair)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_edge_of_half_precision_gives_a_finite_loss_and_no_nan(dtype):
    prediction = torch.tensor([[65504.0], [-65504.0], [65504.0]], dtype=dtype, requires_grad=True)
    loss = statistical_loss(prediction, torch.zeros_like(prediction), moments=NAMES)
    loss.backward()
    assert loss.isfinite()
    assert not prediction.grad.isnan().any()
    assert prediction.grad.any()


@pytest.mark.parametrize("size", [4, 100_000])
@pytest.mark.parametrize("masked", [False, True])
def test_a_scaled_float16_gradient_overflows_where_grad_scaler_looks_for_it(size, masked):
    prediction = torch.zeros(size, 8, dtype=torch.float16, requires_grad=True)
    mask = torch.arange(size) > 0 if masked else None
    loss = statistical_loss(
        prediction, 300 + batch(4, 8), mask, torch.arange(4) > -1, moments=["mean"]
    )
    (65536 * 25_000 * size * loss).backward()
    assert (prediction.grad[1:] == -torch.inf).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("rows", [6, 50_000])
def test_the_loss_of_what_is_not_finite_is_nan(value, side, normalise, rows):
    pair = [batch(rows, 3).float(), batch(rows, 3, seed=1).float()]
    pair[side][2, 1] = value
    for name in NAMES:
        assert statistical_loss(*pair, moments=[name], normalise=normalise).isnan()
    if side == 0:
        means = pair[0], torch.ones(rows, 3)
        assert statistical_loss(means, pair[1], moments=["mean"], normalise=normalise).isnan()


@pytest.mark.parametrize("name", ["mean", "variance", "covariance"])
@pytest.mark.parametrize("constant", [0.0, 0.1, 1234.5])
@pytest.mark.parametrize("rows", [7, 60_000])
def test_a_target_feature_without_spread_is_left_out_of_the_normalised_terms(name, constant, rows):
    prediction, target = batch(rows, 3).float() + 1, 2 * batch(rows, 3, seed=1).float()
    target[:, 1] = constant
    leaf = prediction.clone().requires_grad_()
    loss = StatisticalLoss([name], normalise=True)
    loss(leaf, target).backward()
    others = [0, 2]
    # Two of three features are left, or four of nine of their products.
    share = (2 / 3) ** (2 if name == "covariance" else 1)
    assert_close(loss(prediction, target), share * loss(prediction[:, others], target[:, others]))
    assert not leaf.grad[:, 1].any()
    assert leaf.grad[:, 0].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("noise", "offset", "others"),
    [(1e-8, 0, 1), (3e-7, 0, 1), (1e-8, 0, 1e-3), (3e-7, 0, 30), (1e-8, 5, 1), (1e-9, 0, 1e3)],
)
@pytest.mark.parametrize("name", ["mean", "variance", "covariance"])
def test_a_target_feature_of_rounding_noise_is_one_without_spread(
    dtype, noise, offset, others, name
):
    prediction, target = batch(50, 3) + 1, others * batch(50, 3, seed=1)
    target[:, 1] = offset + noise * target[:, 1] / others
    loss = StatisticalLoss([name], normalise=True)
    constant = target.clone()
    constant[:, 1] = offset
    assert_close(
        loss(prediction.to(dtype), target.to(dtype)), loss(prediction.to(dtype), constant.to(dtype))
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_targets_of_rounding_noise_alone_add_nothing(dtype):
    noise = 1e-8 * batch(50, 2).to(dtype)
    for target in (noise, noise[:, 0]):
        prediction = torch.ones_like(target, requires_grad=True)
        loss = statistical_loss(prediction, target, normalise=True)
        loss.backward()
        assert loss == 0
        assert not prediction.grad.any()


@pytest.mark.parametrize(
    ("scales", "eps"),
    [
        ((1.0, 1e-2, 1e6), 1e-6),
        ((1.0, 1e-2, 1e6), 0.5),
        ((1e-4, 1e-4, 1e-4), 1e-6),
        ((1e-4, 1.0, 1e2), 1e-6),
        ((1e-5, 1.0, 1e3), 1e-12),
    ],
)
def test_a_feature_that_is_far_smaller_than_others_is_not_taken_for_noise(scales, eps):
    scale = torch.tensor(scales)
    prediction, target = scale * (1 + batch(50, 3).float()), scale * batch(50, 3, seed=1).float()
    loss = StatisticalLoss(normalise=True, eps=eps, reduction="none")
    assert (loss(prediction, target) > 0).all()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("normalise", [False, True])
def test_a_kept_axis_without_entries_adds_nothing(reduction, normalise):
    prediction = torch.zeros(0, 5, 3, requires_grad=True)
    for guess, names in ((prediction, NAMES), ((prediction, prediction), NAMES[:2])):
        loss = StatisticalLoss(names, dim=1, normalise=normalise, reduction=reduction)
        found = loss(guess, torch.zeros(0, 5, 3))
        assert found.shape == (() if reduction == "mean" else (0, 3))
        assert found.sum() == 0
        found.sum().backward()


def test_zero_variance_on_either_side_gives_a_finite_loss_and_gradient():
    constant = torch.full((7, 2), 0.1)
    for prediction, target in (
        (constant, constant + 1),
        (constant, batch(7, 2).float()),
        (batch(7, 2).float(), constant),
    ):
        leaf = prediction.clone().requires_grad_()
        loss = statistical_loss(leaf, target, moments=NAMES, normalise=True)
        loss.backward()
        assert loss.isfinite()
        assert leaf.grad.isfinite().all()


@pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning"
)  # torch.compile itself does it
def test_the_loss_compiles_without_a_graph_break():
    target, mask = batch(4, 5, 3, seed=1), torch.arange(20).reshape(4, 5) % 4 > 0
    for prediction, names in (
        (batch(4, 5, 3), NAMES),
        ((batch(4, 5, 3), batch(4, 5, 3).exp()), NAMES[:2]),
    ):
        loss = StatisticalLoss(names)
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        assert_close(compiled(prediction, target, mask), loss(prediction, target, mask))


def test_the_loss_of_samples_works_under_vmap():
    predictions, target = batch(3, 6, 2), batch(5, 2, seed=1)
    loss = StatisticalLoss(NAMES)
    found = torch.func.vmap(torch.func.grad(lambda x: loss(x, target)))(predictions)
    assert_close(
        found, torch.stack([torch.func.grad(lambda x: loss(x, target))(x) for x in predictions])
    )


def test_a_pair_under_vmap_is_refused():
    pair, target = (batch(3, 6, 2), batch(3, 6, 2).exp()), batch(5, 2, seed=1)
    with pytest.raises(RuntimeError, match="data-dependent control flow"):
        torch.func.vmap(lambda *pair: statistical_loss(pair, target))(*pair)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_does_not_lower_the_precision(dtype):
    prediction, target = batch(30, 3).to(dtype), batch(40, 3, seed=1).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = statistical_loss(prediction, target, moments=NAMES)
    assert found.dtype == torch.float32
    assert_close(found, statistical_loss(prediction, target, moments=NAMES))


PAIR = (torch.zeros(4, 5, 3), torch.ones(4, 5, 3))


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (
            lambda x: statistical_loss(x, x[..., :2]),
            ValueError,
            r"`prediction` and `target` must agree .* \[3\] and \[2\]",
        ),
        (
            lambda x: statistical_loss(x, x, torch.ones(4, 4) > 0),
            ValueError,
            r"`mask` must hold one flag per sample, .* Got \[4, 4\]",
        ),
        (
            lambda x: statistical_loss(PAIR, x, torch.ones(4, 4) > 0),
            ValueError,
            r"`mask` must hold one flag",
        ),
        (
            lambda x: statistical_loss(x, x, torch.ones(4, 5)),
            TypeError,
            r"`mask` must be a boolean tensor",
        ),
        (
            lambda x: statistical_loss(x.int(), x),
            TypeError,
            r"`prediction` must be .* Got torch\.int32",
        ),
        (
            lambda x: statistical_loss(x, x.int()),
            TypeError,
            r"`target` must be .* Got torch\.int32",
        ),
        (
            lambda x: statistical_loss(x, x, dim=2, moments=["covariance"]),
            ValueError,
            r"`dim` must leave the last axis",
        ),
        (
            lambda x: statistical_loss(x, x, mixture=True),
            ValueError,
            r"`mixture` must be False for samples",
        ),
        (
            lambda x: statistical_loss([x], x),
            TypeError,
            r"`prediction` must be a tensor, or a pair .* Got list",
        ),
        (
            lambda x: statistical_loss((x, x[..., :1]), x),
            ValueError,
            r"one shape\. Got \[4, 5, 3\] and \[4, 5, 1\]",
        ),
        (
            lambda x: statistical_loss(PAIR, x, moments=["skewness"]),
            ValueError,
            r"for a pair\. Got \['skewness'\]",
        ),
        (lambda x: StatisticalLoss("mean"), ValueError, r"`moments` must hold .* Got 'mean'"),
        (lambda x: StatisticalLoss([]), ValueError, r"`moments` must hold .* Got \[\]"),
        (lambda x: StatisticalLoss(["mean", "mean"]), ValueError, r"`moments` must hold different"),
        (
            lambda x: StatisticalLoss(["median"]),
            ValueError,
            r"`moments` must hold .* Got \['median'\]",
        ),
        (
            lambda x: StatisticalLoss(reduction="sum"),
            ValueError,
            r"`reduction` must be .* Got 'sum'",
        ),
        (lambda x: StatisticalLoss(3), TypeError, r"`moments` must hold .* Got 3\. The default is"),
        (lambda x: StatisticalLoss(None), TypeError, r"`moments` must hold .* Got None\."),
        (
            lambda x: StatisticalLoss([["mean"]]),
            ValueError,
            r"`moments` must .* Got \[\['mean'\]\]\.",
        ),
        (
            lambda x: StatisticalLoss(normalise="no"),
            TypeError,
            r"`normalise` must .* Got 'no'\. The",
        ),
        (lambda x: StatisticalLoss(normalise=1), TypeError, r"`normalise` must .* Got 1\."),
        (lambda x: StatisticalLoss(mixture=None), TypeError, r"`mixture` must .* Got None\."),
        (lambda x: StatisticalLoss(reduction=None), ValueError, r"`reduction` must .* Got None\."),
        (lambda x: StatisticalLoss(dim=1.0), TypeError, r"`dim` must be an axis, .* Got 1\.0\."),
        (
            lambda x: StatisticalLoss(eps="1"),
            TypeError,
            r"`eps` must be a positive .* Got '1'\. The",
        ),
        (lambda x: StatisticalLoss(eps=True), TypeError, r"`eps` must be a positive .* Got True\."),
        (lambda x: StatisticalLoss(eps=10**400), ValueError, r"`eps` must be .* Got 1000"),
        (
            lambda x: statistical_loss(x, x.to("meta")),
            ValueError,
            r"`target` must be on the device of `prediction`\. Got meta and cpu\. Move it",
        ),
        (
            lambda x: statistical_loss(x, x, x[..., 0].to("meta") > 0),
            ValueError,
            r"`mask` must be on the device of `prediction`\. Got meta and cpu",
        ),
        (
            lambda x: statistical_loss(x, x, x[..., 0] == 0, x[..., 0].to("meta") > 0),
            ValueError,
            r"`target_mask` must be on the device of `target`\. Got meta and cpu",
        ),
        (
            lambda x: statistical_loss((x, x.to("meta")), x),
            ValueError,
            r"`prediction\[1\]` must be on the device of `prediction\[0\]`\. Got meta and cpu",
        ),
        (lambda x: StatisticalLoss(eps=float("nan")), ValueError, r"`eps` must be .* Got nan\."),
        (
            lambda x: StatisticalLoss(process_group="gloo"),
            TypeError,
            r"`process_group` .* Got 'gloo'\.",
        ),
        (
            lambda x: statistical_loss(x, x, eps="1"),
            TypeError,
            r"`eps` must be a positive .* Got '1'",
        ),
        (
            lambda x: statistical_loss(x, x[:2], None, torch.ones(4, 5) > 0),
            ValueError,
            r"`target_mask` must hold one flag per sample, \[2, 5\] .* Got \[4, 5\]\. .* fit it to `target`",
        ),
        (
            lambda x: StatisticalLoss(eps=0.0),
            ValueError,
            r"`eps` must be positive and finite\. Got 0\.0",
        ),
    ],
)
def test_bad_input_is_named(call, kind, message):
    with pytest.raises(kind, match=message):
        call(torch.zeros(4, 5, 3))


def test_a_negative_predicted_variance_is_counted_and_located_unless_it_is_masked():
    mean, variance = torch.zeros(2, 3, 2), torch.ones(2, 3, 2)
    variance[1, 2] = -0.5
    variance[0, 0, 1] = float("nan")
    mask = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"Got 2 below 0 of 12, the first at \[1, 2, 0\]: -0\.5\."):
        statistical_loss((mean, variance), mean, mask)
    mask[1, 2] = mask[0, 0] = False
    assert statistical_loss((mean, variance), mean, mask) == 0.5
    mask = torch.tensor([True, False])
    assert (
        statistical_loss((torch.zeros(2), torch.tensor([1.0, -1.0])), torch.zeros(2), mask) == 0.5
    )
    with pytest.raises(ValueError, match=r"Got 1 below 0 of 2, the first at \[0\]: -1\."):
        statistical_loss((torch.zeros(2), torch.tensor([-1.0, 1.0])), torch.zeros(2), mask)


@pytest.mark.parametrize("number", [np.float32, np.array, torch.tensor])
def test_options_may_be_numpy_numbers_or_have_no_axes(number):
    prediction, target = batch(6, 5, 3), batch(6, 5, 3, seed=1)
    loss = StatisticalLoss(eps=number(0.5), normalise=np.bool_(True), dim=np.int64(1))
    expected = StatisticalLoss(eps=0.5, normalise=True, dim=1)
    assert_close(loss(prediction, target), expected(prediction, target))
    assert repr(loss) == repr(expected)


def test_repr_shows_the_options():
    assert repr(StatisticalLoss(["mean"], dim=1)) == (
        "StatisticalLoss(('mean',), dim=1, normalise=False, mixture=False, reduction='mean', eps=1e-06)"
    )


RANKS, SPLIT = 2, (3, 5)


def losses_and_gradients(rows, group):
    """Loss and parameter gradients of an encoder for each kind of prediction, on some of the rows of one batch."""
    encoder = torch.nn.Linear(4, 6, dtype=torch.float64)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.copy_(batch(*parameter.shape, seed=7))
    x, target = batch(8, 4, 4)[rows], batch(8, 4, 3, seed=1)[rows].exp() + 1e3
    mask = (torch.arange(32).reshape(8, 4) % 3 > 0)[rows]
    found = []
    for normalise in (False, True):
        for case in ("samples", "pair", "mixture"):
            mean, spread = encoder(x).chunk(2, -1)
            names = NAMES if case == "samples" else NAMES[:2]
            loss = StatisticalLoss(
                names, normalise=normalise, mixture=case == "mixture", process_group=group
            )
            value = loss(mean if case == "samples" else (mean, spread.exp()), target, mask)
            encoder.zero_grad()
            value.backward()
            found += [
                value.detach(),
                *(parameter.grad.clone() for parameter in encoder.parameters()),
            ]
    return found


def run_rank(rank, folder):
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS
    )
    start = sum(SPLIT[:rank])
    found = losses_and_gradients(slice(start, start + SPLIT[rank]), dist.group.WORLD)
    for value in found:
        dist.all_reduce(value)  # what DistributedDataParallel does with gradients
        value /= RANKS
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_distributed_loss_and_averaged_gradients_equal_those_of_the_whole_batch(tmp_path):
    mp.spawn(run_rank, (str(tmp_path),), RANKS)
    expected = losses_and_gradients(slice(None), None)
    for rank in range(RANKS):
        for found, whole in zip(torch.load(tmp_path / f"{rank}.pt"), expected, strict=True):
            assert (found - whole).norm() <= 1e-6 * whole.norm()
