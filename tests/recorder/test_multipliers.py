"""Factors for the learning rates out of a record."""

import numpy as np
import pytest
import torch
from torch import nn

from gradbalance import Recorder, attach, groups_by_name, rules
from tests.recorder.runs import make_penalty


class Given:
    """A rule that gives rows in turn, whatever is measured."""

    def __init__(self, rows, needs_coherence=False):
        self.rows = iter(rows)
        self.needs_coherence = needs_coherence

    def __call__(self, measured):
        return next(self.rows)


def multipliers(rows, smoothing=0.0, needs_coherence=False, watched=False, steps=None):
    rule = Given(np.asarray(rows), needs_coherence)
    optimizer, step = make_penalty(
        rule=rules.Watch(rule) if watched else rule, smoothing=smoothing, apply_to="gradient"
    )
    recorder = Recorder(optimizer)
    for _ in range(steps or len(rows)):
        if needs_coherence or watched:
            step()
        else:
            optimizer.coefficients_for({"text": 1.0, "audio": 1.0})
    return recorder.multipliers()


def draws(steps, means=(0.2, 0.5), noise=0.05, seed=0):
    return np.random.default_rng(seed).normal(means, noise, size=(steps, 2))


@pytest.mark.parametrize("watched", [True, False])
def test_the_factor_is_the_mean_of_the_proposals_over_the_largest(watched):
    rows = draws(50)
    factors = multipliers(rows, watched=watched)
    means = rows.mean(0)
    assert list(factors) == ["text", "audio"]
    assert factors["audio"] == (1.0, 0.0)
    factor, error = factors["text"]
    assert factor == pytest.approx(means[0] / means[1])
    deviations = rows[:, 0] - factor * rows[:, 1]
    assert error == pytest.approx(deviations.std() / means[1] / np.sqrt(50))


def test_the_error_respects_the_memory_of_the_running_means():
    alone = multipliers(draws(500))["text"][1]
    together = multipliers(draws(500), smoothing=0.9)["text"][1]
    assert together == pytest.approx(alone * np.sqrt(1.9 / 0.1))
    longer = multipliers(draws(500), smoothing=0.9999)["text"][1]
    assert longer == pytest.approx(alone * np.sqrt(500))  # worth one value at least


def test_the_error_covers_the_spread_of_repeated_runs():
    """Of exponential means of white noise, as the rules look at."""
    smoothing, steps, found = 0.9, 400, []
    for seed in range(20):
        noise = draws(steps, seed=seed, noise=0.04)
        for i in range(1, steps):
            noise[i] = smoothing * noise[i - 1] + (1 - smoothing) * noise[i]
        found.append(multipliers(noise, smoothing)["text"])
    factors, errors = np.array(found).T
    assert 0.6 < errors.mean() / factors.std() < 1.6


def test_a_factor_that_cannot_be_told_from_1_is_1():
    assert multipliers(draws(50, (0.49, 0.5), 0.2))["text"][0] == 1.0
    assert multipliers(draws(50, (0.49, 0.5), 0.001))["text"][0] == pytest.approx(0.98, abs=0.01)


def test_steps_before_standard_errors_are_known_are_left_out():
    rows = [[1.0, 1.0]] * 3 + [[0.25, 0.5]] * 7
    assert multipliers(rows, 0.5, needs_coherence=True)["text"][0] == pytest.approx(0.5)
    with pytest.raises(RuntimeError, match=r"^`multipliers` must have seen .* Got 3 steps that"):
        multipliers(rows, 0.5, needs_coherence=True, steps=3)


def test_a_rule_that_proposes_nothing_has_no_multipliers():
    optimizer, step = make_penalty(rule=rules.Watch())
    recorder = Recorder(optimizer)
    step()
    message = r"^`multipliers` must have a rule .* Got Watch\(\)\. Build .*Watch\(rules\.Useful"
    with pytest.raises(RuntimeError, match=message):
        recorder.multipliers()


@pytest.mark.parametrize("kind", ["modules", "lists", "names"])
def test_what_is_printed_are_param_groups(kind):
    model = nn.ModuleDict({"text 1": nn.Linear(2, 1), 'au"dio': nn.Linear(2, 1)})
    groups = dict(model)
    if kind == "lists":
        groups = {name: list(module.parameters()) for name, module in model.items()}
    elif kind == "names":
        groups = groups_by_name(model, **{name: name for name in model})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    attach(optimizer, groups, rules.Watch(rules.ByHand(**{"text 1": 0.123})))
    recorder = Recorder(optimizer)
    sum(module(torch.ones(1, 2)).sum() for module in model.values()).backward()
    optimizer.step()
    param_groups = eval(str(recorder.multipliers()), {"groups": groups, "lr": 0.1})
    fresh = torch.optim.AdamW(param_groups, lr=0.1)
    assert [group["lr"] for group in fresh.param_groups] == pytest.approx([0.0123, 0.1])
    for group, module in zip(fresh.param_groups, model.values(), strict=True):
        assert list(map(id, group["params"])) == list(map(id, module.parameters()))
