"""The model and the losses of the MOSI example, against the equations of arXiv 2605.28575."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from examples.mosi.config import Config
from examples.mosi.draw import Draw, own_noise
from examples.mosi.losses import entropy, losses
from examples.mosi.model import AME, Adapter, GatedFusion, Latent, Model, pool
from examples.mosi.simulated import simulate
from tests.mosi import samples

WIDTHS = {"audio": 20, "timing": 6}


@pytest.fixture(scope="module")
def data():
    return samples.dataset(simulate())


def built(config=None, widths=None, text=True, seed=0):
    config, widths, draw = (
        config or Config(),
        WIDTHS if widths is None else widths,
        Draw(torch.device("cpu")),
    )
    torch.manual_seed(seed)
    return Model(config, Adapter(8, 16, config.dropout, draw) if text else None, 8, widths, draw)


def batch_of(data, *index, names=tuple(WIDTHS)):
    return data.batch(torch.tensor(index), names)


def drawn(model, batch, seed=0):
    """The output in training, with the random numbers of a seed."""
    model.draw.generator.manual_seed(seed)
    return model.train()(batch)


def test_the_latent_has_the_mean_and_variance_that_the_encoder_puts_out():
    draw = Draw(torch.device("cpu"))
    encoder = AME(4, 8, 3, 0.0, draw, noisy=True)
    draw.size = 20_000
    x = torch.randn(1, 1, 4).expand(20_000, 1, 4)
    z, mean, variance = encoder(x, torch.ones(20_000, 1, dtype=torch.bool))
    assert (variance > 0).all()
    assert_close(z.mean((0, 1)), mean[0, 0], atol=0.03, rtol=0)
    assert_close(z.var((0, 1)), variance[0, 0], atol=0, rtol=0.05)


def test_evaluation_is_the_same_every_time(data):
    model, batch = built(), batch_of(data, 0, 1, 2)
    assert not torch.equal(drawn(model, batch, 1).prediction, drawn(model, batch, 2).prediction)
    model.draw.generator.manual_seed(1)
    first = model.eval()(batch).prediction
    model.draw.generator.manual_seed(2)
    assert torch.equal(model(batch).prediction, first)


def test_evaluation_is_the_mean_of_what_training_predicts(data):
    model, batch = built(Config(dropout=0.0, draws=1000)), batch_of(data, 0, 5)
    with torch.no_grad():
        for (
            value
        ) in model.fusion.values.values():  # far into tanh, so that the mean latent is another one
            value.weight.mul_(5).add_(1)
        passes = torch.stack([drawn(model, batch, seed).prediction for seed in range(1000)])
        evaluated = model.eval()(batch).prediction
        model.noisy = False
        at_mean = model(batch).prediction
    error = passes.std(0) * math.sqrt(2 / 1000)
    assert ((evaluated - passes.mean(0)).abs() < 4 * error).all()
    assert ((at_mean - passes.mean(0)).abs() > 8 * error).any()


def test_the_noise_of_evaluation_is_standard_normal_and_own_to_utterance_and_modality(data):
    batch = batch_of(data, *range(40))
    noise = {
        name: own_noise(name, batch, torch.zeros(40, x.shape[1], 6), 50)
        for name, x in batch.masks.items()
    }
    audio, timing = noise["audio"], noise["timing"][:, batch.mask]
    for values in (audio, timing):
        assert abs(values.mean().item()) < 0.05
        assert values.std().item() == pytest.approx(1, abs=0.02)
    assert not noise["timing"][:, ~batch.mask].any()
    every = torch.cat([audio[:, :, 0].flatten(1), timing[:, :, 0]], 1)
    assert every.unique().numel() > 0.999 * every.numel()


@pytest.mark.parametrize("ame", [True, False])
def test_a_prediction_does_not_depend_on_the_rest_of_the_batch(data, ame):
    model = built(Config(ame=ame)).eval()
    index = data.tokens.lengths.argsort()[[0, 700, 1400, -1]].tolist()
    together = model(batch_of(data, *index)).prediction
    alone = torch.cat([model(batch_of(data, i)).prediction for i in index])
    assert_close(together, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("gated", [True, False])
def test_the_value_of_an_absent_modality_has_no_influence(gated):
    fusion = GatedFusion(WIDTHS, 5, 8, gated)
    zs = {"audio": torch.randn(2, 1, 20), "timing": torch.randn(2, 4, 6, requires_grad=True)}
    masks = {
        "audio": torch.tensor([[True], [False]]),
        "timing": torch.zeros(2, 4, dtype=torch.bool),
    }
    h = fusion(zs, masks, 4)
    h.sum().backward()
    assert not zs["timing"].grad.any()
    expected = (fusion.values["audio"](zs["audio"]).tanh() @ fusion.project.weight.T).tanh()
    assert_close(h[0], expected[0].expand(4, 8))
    assert not h[1].any()


def test_the_fusion_stays_between_the_values_of_the_modalities():
    fusion = GatedFusion(WIDTHS, 5, 5, gated=True)
    torch.nn.init.eye_(fusion.project.weight)
    zs = {"audio": torch.randn(3, 1, 20), "timing": torch.randn(3, 4, 6)}
    masks = {
        "audio": torch.ones(3, 1, dtype=torch.bool),
        "timing": torch.ones(3, 4, dtype=torch.bool),
    }
    mixed = fusion(zs, masks, 4).atanh()
    values = torch.stack([fusion.values[name](z).tanh().expand(3, 4, 5) for name, z in zs.items()])
    assert (mixed <= values.amax(0) + 1e-5).all()
    assert (mixed >= values.amin(0) - 1e-5).all()


def test_modalities_may_be_given_in_any_order(data):
    model, batch = built(), batch_of(data, 0, 5)
    other = built(widths=dict(reversed(WIDTHS.items())))
    weights = model.state_dict()
    for part in ("weight", "bias"):  # one block of rows for each modality's gates
        weights[f"fusion.gates.{part}"] = weights[f"fusion.gates.{part}"].roll(Config().fused, 0)
    weights["fusion.gates.weight"] = weights["fusion.gates.weight"].roll(WIDTHS["timing"], 1)
    other.load_state_dict(weights)
    assert_close(other.eval()(batch).prediction, model.eval()(batch).prediction)


def test_without_weight_the_modalities_leave_the_text_as_it_is(data):
    config = Config(beta=0.0)
    model, alone = built(config).eval(), built(config, widths={}).eval()
    alone.load_state_dict({name: model.state_dict()[name] for name in alone.state_dict()})
    batch = batch_of(data, 0, 1, 2)
    assert_close(model(batch).prediction, alone(batch).prediction)  # a mean of equal ones


@pytest.mark.parametrize(
    ("widths", "text"), [({}, True), ({"audio": 20}, False), ({"timing": 6}, True), (WIDTHS, False)]
)
def test_any_set_of_modalities_trains(data, widths, text):
    config = Config()
    model, batch = built(config, widths, text), batch_of(data, 0, 1, names=tuple(widths))
    terms, errors = losses(drawn(model, batch), batch, config)
    sum(terms.values()).backward()
    assert set(errors) == set(widths) | ({"text"} if text else set())
    assert {"task", "uni"} <= set(terms)
    assert ("stat" in terms) == bool(widths)
    assert all(p.grad is not None for p in model.parameters())
    assert set(model.groups()) == set(errors)


@pytest.mark.parametrize("name", ["uni", "recon", "div", "stat"])
def test_a_loss_of_weight_zero_is_not_built(data, name):
    config, batch = replace(Config(balance="off", latent=4), **{name: 0.0}), batch_of(data, 0, 1)
    model = built(config)
    assert name not in losses(drawn(model, batch), batch, config)[0]
    modules = {"uni": model.heads, "recon": model.decoders, "stat": model.maps}
    assert name == "div" or not len(modules[name])


def test_the_losses_are_those_of_the_equations(data):
    config = Config(task="mse")
    model, batch = built(config), batch_of(data, 3, 4, 5)
    output = drawn(model, batch)
    terms, errors = losses(output, batch, config)
    y = batch.labels
    assert_close(terms["task"], (output.prediction - y).square().mean())
    assert_close(terms["uni"], sum((head - y).square().mean() for head in output.heads.values()))
    recon, stat, div = 0.0, 0.0, 0.0
    for name, (z, mean, variance) in output.latents.items():
        inputs, means, variances = [], [], []
        for i in range(3):
            real = batch.masks[name][i]
            x = batch.features[name][i, real]
            recon += (output.reconstructions[name][i, real] - x).square().mean() / 2 / 3
            p = z[i, real].mean(0).softmax(0)
            div += (p * p.log()).sum() / math.log(len(p)) / 6
            inputs.append(x)
            means.append(mean[i, real])
            variances.append(variance[i, real])
        inputs, means, variances = map(torch.cat, (inputs, means, variances))
        first = (means.mean(0) - inputs.mean(0)).square().mean()
        second = (variances.mean(0) - inputs.var(0, correction=0)).square().mean()
        stat += (first + second) / 4
    assert_close(terms["recon"], torch.as_tensor(recon))
    assert_close(terms["div"], torch.as_tensor(div))
    assert_close(terms["stat"], torch.as_tensor(stat), atol=1e-5, rtol=1e-4)
    assert_close(errors["audio"], (output.heads["audio"] - y).abs().mean())


@pytest.mark.parametrize(("world", "size"), [(2, 7), (3, 7), (2, 1), (3, 1), (3, 2)])
def test_processes_average_to_the_losses_of_the_whole_batch(data, world, size):
    """Also where the batch has fewer utterances than there are processes."""
    config = Config(stat=0.0)
    model, batch = built(config), batch_of(data, *range(size))
    whole, whole_errors = losses(drawn(model, batch), batch, config)
    shards = [batch.shard(rank, world) for rank in range(world)]
    parts = [losses(drawn(model, shard), shard, config) for shard in shards]
    for name, term in whole.items():
        assert_close(sum(terms[name] for terms, _ in parts) / world, term)
    for name, error in whole_errors.items():
        assert_close(sum(errors[name] for _, errors in parts) / world, error)


@given(shift=st.floats(-5, 5), seed=st.integers(0, 99), scale=st.floats(0, 50))
def test_entropy_is_a_share_that_ignores_shifts_and_order(shift, seed, scale):
    z = scale * torch.randn(2, 7, generator=torch.Generator().manual_seed(seed))
    assert ((entropy(z) >= 0) & (entropy(z) <= 1 + 1e-6)).all()
    assert_close(entropy(z + shift), entropy(z), atol=1e-4, rtol=1e-4)
    assert_close(entropy(z.flip(-1)), entropy(z))
    assert_close(entropy(torch.full((1, 7), shift)), torch.ones(1))


def test_a_share_without_utterances_has_no_gradient_and_counts_in_no_statistic(data):
    config = Config()
    model, empty = built(config), batch_of(data, 0).shard(1, 2)
    terms, errors = losses(drawn(model, empty._replace(world=1)), empty._replace(world=1), config)
    sum(terms.values()).backward()
    assert not any(p.grad is not None and p.grad.any() for p in model.parameters())
    assert not any(errors.values())
    assert not any(mask.any() for mask in empty.masks.values())


def test_the_entropy_of_one_feature_is_zero():
    z = torch.randn(3, 1, requires_grad=True)
    entropy(z).sum().backward()
    assert entropy(z).tolist() == [0, 0, 0]
    assert z.grad.tolist() == [[0], [0], [0]]


def test_pooling_ignores_padding_and_is_zero_where_nothing_is_left():
    x, mask = torch.randn(2, 3, 4), torch.tensor([[True, True, False], [False, False, False]])
    assert_close(pool(x, mask), torch.stack([x[0, :2].mean(0), torch.zeros(4)]))


def test_a_latent_of_another_width_is_compared_through_a_linear_map():
    model = built(Config(latent=3))
    mean, variance = torch.randn(2, 4, 3), torch.rand(2, 4, 3)
    mapped_mean, mapped = model.statistic("timing", Latent(mean, mean, variance))
    weight = model.maps["timing"].weight
    covariance = weight @ torch.diag(variance[0, 0]) @ weight.T
    assert_close(mapped[0, 0], covariance.diagonal())
    assert_close(mapped_mean, model.maps["timing"](mean))
    assert_close(model.statistic("timing", Latent(mean, mean, None)), mapped_mean)
