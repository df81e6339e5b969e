"""The rivals of the benchmark of balancing do what their papers say."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from benchmarks.balancing import rivals, rules, runs, testbeds
from benchmarks.balancing.runs import Run, train
from gradbalance.rules import OGM, Epochwise, Measured, Useful
from tests.benchmarks.tiny import TINY, model_and_batch


@pytest.fixture(autouse=True)
def tiny_bed(monkeypatch):
    monkeypatch.setitem(testbeds.TESTBEDS, "tiny", TINY)


def measured(norms=(1.0, 1.0), coherences=(0.0, 0.0), errors=None):
    norms, coherences = np.array(norms), np.array(coherences)
    shares = norms / norms.sum()
    return Measured(
        names=("a", "b", "c")[: len(norms)],
        norms=norms,
        shares=shares,
        coherences=coherences,
        coherence_errors=np.zeros(len(norms)),
        useful=np.resize(coherences, len(norms)) * shares,
        useful_errors=np.zeros(len(norms)),
        errors=None if errors is None else np.array(errors),
        active=norms > 0,
        scale_free=True,
        coefficients=np.ones(len(norms)),
        step=1,
    )


def gradients_of(rival, knob=None):
    """The gradients that a rival leaves when the learning rate is 0."""
    model, part = model_and_batch()
    torch.manual_seed(1)
    rivals.RIVALS[rival].step(model, runs.optimizer_for("SGD", model, 0.0), knob)(*part)
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in model.named_parameters()
    }


def test_ogm_damps_the_branch_of_the_higher_score_by_one_minus_tanh():
    found = OGM(0.5)(measured(errors=[0.1, 0.7]))
    assert found.tolist() == pytest.approx([1 - math.tanh(1.5), 1.0])


def test_ogm_compares_with_the_mean_of_several_others():
    found = OGM(1.0)(measured((1.0, 1.0, 1.0), errors=[0.4, 0.9, 0.8]))
    assert found.tolist() == pytest.approx([1 - math.tanh(0.6 / 0.15), 1.0, 1.0])


def test_ogm_scores_by_the_probability_of_the_class_in_each_contribution():
    model, part = model_and_batch()
    step = rivals.Rival(
        lambda *_: OGM(0.3),
        options={"smoothing": 0.0, "apply_to": "gradient"},
        observe="missed",
    )
    plain = gradients_of("none")
    run = step.step(model, runs.optimizer_for("SGD", model, 0.0), None)
    with torch.no_grad():
        parts = model.contributions(model.features(part.inputs))
        scores = torch.stack([p.softmax(1).gather(1, part.target[:, None]).mean() for p in parts])
    run(*part)
    expected = OGM(0.3)(measured(errors=(1 - scores).tolist()))
    assert expected.min() < 1
    for name, k in zip("ab", expected.tolist(), strict=True):
        assert_close(
            model.encoders[name][0][0].weight.grad, k * plain[f"encoders.{name}.0.0.weight"]
        )


def test_clipping_by_group_leaves_each_branch_with_the_norm_asked_for():
    clipped, plain = gradients_of("clip groups", 1e-3), gradients_of("none")
    for name in "ab":
        length = torch.stack(
            [g.norm() for key, g in clipped.items() if key.startswith(f"encoders.{name}")]
        ).norm()
        assert_close(length, torch.tensor(1e-3), rtol=1e-3, atol=0)
    assert_close(clipped["joint.weight"], plain["joint.weight"])


def test_noise_alone_leaves_the_joint_layer_alone_and_no_branch():
    noisy, plain = gradients_of("noise alone"), gradients_of("none")
    assert_close(noisy["joint.weight"], plain["joint.weight"])
    key = "encoders.a.0.0.weight"
    assert_close((noisy[key] - plain[key]).std(), plain[key].std(), rtol=0.2, atol=0)


def test_the_epochwise_rule_halves_the_branch_that_is_used_by_more_than_its_lead():
    rule = Epochwise(lead=0.2)
    assert rule(measured(errors=[0.3, 0.6])).tolist() == [0.5, 1.0]
    assert rule(measured(errors=[0.5, 0.6])).tolist() == [1.0, 1.0]
    assert rule(measured()).tolist() == [1.0, 1.0]


def test_the_signal_of_adam_is_1_where_all_gradients_are_alike_and_that_of_chance_where_they_are_not():
    alike, noisy = (torch.nn.Parameter(torch.zeros(2000)) for _ in range(2))
    adam = torch.optim.Adam([{"params": [alike]}, {"params": [noisy]}], lr=0.0, betas=(0.9, 0.9))
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        alike.grad, noisy.grad = torch.ones(2000), torch.randn(2000, generator=generator)
        adam.step()
    seen = []
    rule = rules.SignalToNoise(adam.param_groups, adam.state, lambda m: seen.append(m.coherences))
    rule(measured())
    assert seen[0].tolist() == pytest.approx([1 - 0.1 / 1.9, 0.0], abs=0.02)


def test_the_update_goes_with_the_signal_or_against_it():
    clear = measured(coherences=(0.4, 0.1))
    for power, order in ((1.0, [True, False]), (-1.0, [False, True])):
        found = rules.in_proportion(power)(clear)
        assert (found > 1).tolist() == order


def test_hypergradient_descent_multiplies_by_the_cosine_of_each_step():
    rule = rules.Hypergradient(0.1)
    assert rule(measured(coherences=(0.5, -0.5))).tolist() == pytest.approx([1.05, 0.95])
    assert rule(measured(coherences=(0.5, -0.5))).tolist() == pytest.approx([1.05**2, 0.95**2])
    assert rule(measured(coherences=(math.nan, 0.0))).tolist() == pytest.approx([1.05**2, 0.95**2])


def test_without_shrinkage_the_default_rule_takes_every_mean_for_certain():
    unsure = measured(coherences=(0.4, 0.2))
    unsure = unsure._replace(coherence_errors=np.full(2, 0.2), useful_errors=np.full(2, 0.1))
    assert Useful()(unsure).tolist() == [1.0, 1.0]
    assert rules.certain(Useful())(unsure).tolist() == [1.0, 0.5]


def test_the_useful_part_alone_does_not_spare_a_clear_branch_of_small_gradients():
    small = measured(norms=(0.9, 0.1), coherences=(0.1, 0.4))
    assert Useful()(small).tolist() == [1.0, 1.0]
    assert rules.UsefulAlone()(small).tolist() == pytest.approx([1.0, 4 / 9])


def test_the_noisy_branch_alone_is_slowed_where_it_is_known(monkeypatch):
    model, _ = model_and_batch()
    rival = rivals.RIVALS["a slower noisy branch"]
    assert rival.rule(model, None, 0.3).factors == {}
    monkeypatch.setattr(model, "testbed", dataclasses.replace(TINY, noisy="b"))
    assert rival.rule(model, None, 0.3).factors == {"b": 0.3}


def test_a_watch_gives_constant_factors_of_which_the_largest_is_one():
    run = Run("tiny", "watched for 1 epoch", "AdamW", 1e-2, None, 0)
    long = dataclasses.replace(TINY, size=64 * 20)
    known = long.parts(long, 0)["train"]
    factors = runs.watched(run, long, known, 2)
    assert set(factors) == {"a", "b"}
    assert max(factors.values()) == 1
    rule = rivals.by_hand(factors).rule(None, None, None)
    assert rule.factors == factors


def test_dropout_acts_in_training_alone():
    model, part = model_and_batch()
    rivals.RIVALS["dropout"].step(model, runs.optimizer_for("SGD", model, 0.0), 0.5)
    (whole, _), (again, _) = model.eval().features(part.inputs), model.features(part.inputs)
    assert_close(whole, again)
    dropped = model.train().features(part.inputs)[0]
    share = (dropped == 0).double().mean() - (whole == 0).double().mean()
    assert 0.1 < share < 0.5


def test_weight_decay_reaches_every_param_group():
    model, _ = model_and_batch()
    optimizer = runs.optimizer_for("AdamW", model, 1e-3)
    rivals.RIVALS["weight decay"].step(model, optimizer, 0.1)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1, 0.1]


def test_by_hand_sets_the_ratio_of_the_first_branch_to_the_others():
    model, _ = model_and_batch()
    optimizer = runs.optimizer_for("AdamW", model, 1e-3)
    rule = rivals.RIVALS["by hand"].rule(model, optimizer, 10.0)
    assert rule.factors["a"] / rule.factors["b"] == pytest.approx(10.0)


@pytest.mark.filterwarnings("ignore:`apply_to")  # under AdamW: their authors' way all the same
@pytest.mark.parametrize("rival", rivals.RIVALS)
def test_every_rival_trains(rival, monkeypatch):
    if rivals.RIVALS[rival].watch:  # a factor needs a few steps
        longer = dataclasses.replace(TINY, size=64 * 8)
        monkeypatch.setitem(testbeds.TESTBEDS, "tiny", longer)
    found = train(Run("tiny", rival, "AdamW", 1e-3, rivals.RIVALS[rival].knobs[0], 0))
    assert len(found["coefficients"]) == 2
    assert math.isfinite(found["test"])
