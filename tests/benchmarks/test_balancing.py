"""The testbeds, the rivals and the grid of the benchmark of balancing do what they say."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from benchmarks._statistics import interval
from benchmarks.balancing import cells, data, goals, grid, report, rivals, runs, testbeds
from benchmarks.balancing.data import gaussians
from benchmarks.balancing.model import Model, losses, probe, score
from benchmarks.balancing.runs import APART, Results, Run, train
from benchmarks.balancing.testbeds import Bed, Branch
from gradbalance.rules import Measured

TINY = Bed("tiny", "", (Branch("a", 1, 0.5, 2.0), Branch("b", 2, 0.5)), gaussians, size=64, epochs=2, width=8)


@pytest.fixture(autouse=True)
def tiny_bed(monkeypatch):
    monkeypatch.setitem(testbeds.BEDS, "tiny", TINY)


def measured(norms=(1.0, 1.0), coherences=(0.0, 0.0), errors=None):
    norms = torch.tensor(norms, dtype=torch.float64)
    errors = None if errors is None else torch.tensor(errors, dtype=torch.float64)
    return Measured(
        names=("a", "b", "c")[: len(norms)],
        norms=norms,
        shares=norms / norms.sum(),
        coherences=torch.tensor(coherences, dtype=torch.float64),
        errors=errors,
        active=norms > 0,
        scale_free=True,
        coefficients=torch.ones_like(norms),
        step=torch.tensor(1),
    )


def model_and_batch():
    torch.manual_seed(0)
    part = gaussians(TINY, seed=0)["train"]
    return Model(TINY, [x.shape[1] for x in part.inputs], 10), part


def gradients_of(rival, knob=None):
    """The gradients that a rival leaves when the learning rate is 0."""
    model, part = model_and_batch()
    torch.manual_seed(1)
    rivals.RIVALS[rival].step(model, runs.optimizer_for("SGD", model, 0.0), knob)(*part)
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}


def test_ogm_damps_the_branch_of_the_higher_score_by_one_minus_tanh():
    found = rivals.OGM(0.5)(measured(errors=[0.1, 0.7]))
    assert_close(found, torch.tensor([1 - math.tanh(1.5), 1.0], dtype=torch.float64))


def test_ogm_compares_with_the_mean_of_several_others():
    found = rivals.OGM(1.0)(measured((1.0, 1.0, 1.0), errors=[0.4, 0.9, 0.8]))
    assert_close(found, torch.tensor([1 - math.tanh(0.6 / 0.15), 1.0, 1.0], dtype=torch.float64))


def test_ogm_scores_by_the_probability_of_the_class_in_each_contribution():
    model, part = model_and_batch()
    step = rivals.Rival(
        lambda *_: rivals.OGM(0.3), options={"smoothing": 0.0, "apply_to": "gradient"}, observe="missed"
    )
    plain = gradients_of("none")
    run = step.step(model, runs.optimizer_for("SGD", model, 0.0), None)
    with torch.no_grad():
        parts = model.contributions(model.features(part.inputs))
        scores = torch.stack([p.softmax(1).gather(1, part.target[:, None]).mean() for p in parts])
    run(*part)
    expected = rivals.OGM(0.3)(measured(errors=(1 - scores).tolist()))
    assert expected.min() < 1
    for name, k in zip("ab", expected.float(), strict=True):
        assert_close(model.encoders[name][0][0].weight.grad, k * plain[f"encoders.{name}.0.0.weight"])


def test_clipping_by_group_leaves_each_branch_with_the_norm_asked_for():
    clipped, plain = gradients_of("clip groups", 1e-3), gradients_of("none")
    for name in "ab":
        length = torch.stack([g.norm() for key, g in clipped.items() if key.startswith(f"encoders.{name}")]).norm()
        assert_close(length, torch.tensor(1e-3), rtol=1e-3, atol=0)
    assert_close(clipped["joint.weight"], plain["joint.weight"])


def test_noise_alone_leaves_the_joint_layer_alone_and_no_branch():
    noisy, plain = gradients_of("noise alone"), gradients_of("none")
    assert_close(noisy["joint.weight"], plain["joint.weight"])
    key = "encoders.a.0.0.weight"
    assert_close((noisy[key] - plain[key]).std(), plain[key].std(), rtol=0.2, atol=0)


def test_the_epochwise_rule_halves_the_branch_that_is_used_by_more_than_its_lead():
    rule = rivals.Epochwise(lead=0.2)
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
    rule = rivals.SignalToNoise(adam.param_groups, adam.state, lambda m: seen.append(m.coherences) or m.norms)
    rule(measured())
    assert seen[0].tolist() == pytest.approx([1 - 0.1 / 1.9, 0.0], abs=0.02)


def test_the_update_goes_with_the_signal_or_against_it():
    clear = measured(coherences=(0.4, 0.1))
    for power, order in ((1.0, [True, False]), (-1.0, [False, True])):
        found = rivals.in_proportion(power)(clear)
        assert (found > 1).tolist() == order


def test_by_hand_sets_the_ratio_of_the_first_branch_to_the_others():
    model, _ = model_and_batch()
    optimizer = runs.optimizer_for("AdamW", model, 1e-3)
    rule = rivals.RIVALS["by hand"].rule(("a", "b"), optimizer, 10.0)
    assert rule.factors["a"] / rule.factors["b"] == pytest.approx(10.0)


@pytest.mark.filterwarnings("ignore:`apply_to")  # under AdamW: their authors' way all the same
@pytest.mark.parametrize("rival", rivals.RIVALS)
def test_every_rival_trains(rival):
    found = train(Run("tiny", rival, "AdamW", 1e-3, rivals.RIVALS[rival].knobs[0], 0))
    assert len(found["probes"]) == len(found["missing"]) == len(found["coefficients"]) == 2
    assert math.isfinite(found["test"])


def test_contributions_add_up_to_the_joint_output():
    model, part = model_and_batch()
    features = model.features(part.inputs)
    assert_close(sum(model.contributions(features)), model.output(features))


def test_a_missing_branch_is_the_mean_of_its_features():
    model, part = model_and_batch()
    features = model.features(part.inputs)
    first, second = model.without(features, features)
    assert_close(first, model.output([features[0].mean(0).expand_as(features[0]), features[1]]))
    assert_close(second, model.output([features[0], features[1].mean(0).expand_as(features[1])]))


def test_encoders_trained_apart_have_a_score_each():
    found = train(Run("tiny", APART, "AdamW", 1e-3, None, 0))
    assert len(found["alone"]) == len(found["probes"]) == 2


def test_a_regression_scores_by_correlation_whatever_the_scale():
    target = torch.randn(50, 3)
    assert score(2 * target + 1, target) == pytest.approx(1)
    assert score(-target, target) == pytest.approx(-1)
    assert_close(losses(target + 2, target), torch.full((50,), 4.0))


def test_the_probe_recovers_a_linear_map():
    x = torch.randn(200, 5)
    target = x @ torch.randn(5, 2) + 3
    assert_close(probe(x[:150], target[:150], x[150:], ridge=0.0), target[150:], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("kind", "rows"), [("perceptron", 1), ("convolutional", 8), ("transformer", 8)])
def test_every_kind_of_encoder_gives_features_of_the_width(kind, rows):
    branch = Branch("a", 2, kind=kind, rows=rows)
    model = Model(replace(TINY, branches=(branch,)), [64], 10)
    assert model.features([torch.randn(3, 64)])[0].shape == (3, 8)


def test_a_branch_alone_sees_the_data_of_the_joint_run():
    joint, alone = gaussians(TINY, seed=3), TINY.alone(TINY.branches[1])
    part = alone.parts(alone, 3)["test"]
    assert_close(part.inputs, joint["test"].inputs[1:])
    assert_close(part.target, joint["test"].target)


def test_redundancy_makes_the_noise_common():
    bed = replace(TINY, branches=(Branch("a", 1, 1e3), Branch("b", 1, 1e3)), size=2000)

    def correlation(redundancy):
        a, b = gaussians(bed, 0, redundancy)["train"].inputs
        return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])

    assert correlation(0.0) == pytest.approx(0, abs=0.02)
    assert correlation(0.7) == pytest.approx(0.7, abs=0.02)


def test_noise_stands_beside_the_data_and_leaves_them_as_they_are():
    wide = replace(TINY, branches=(*TINY.branches, Branch("noise", 1)))
    found = data.beside_noise(gaussians, 5)(wide, 0)["train"]
    assert_close(found.inputs[:2], gaussians(TINY, 0)["train"].inputs)
    assert found.inputs[2].shape == (64, 5)


def test_the_narrow_branch_tells_the_class_by_products_unless_it_is_useless():
    bed = replace(TINY, size=2000)

    def accuracy(amplitude):
        part = data.interpolating(bed, 0, amplitude)["train"]
        x = part.inputs[1]
        bits = [(x[:, 2 * k] * x[:, 2 * k + 1] < 0).long() for k in range(2)]
        return float((bits[0] + 2 * bits[1] == part.target).double().mean())

    assert accuracy(1.0) > 0.8
    assert accuracy(0.0) < 0.3


def test_missing_data_says_what_to_set(monkeypatch, tmp_path):
    monkeypatch.setattr(data, "DATA", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"`GRADBALANCE_DATA` must be a folder with pom.npz"):
        data.pom(testbeds.BEDS["POM"], 0)


RUNS = [Run("tiny", "none", "SGD", 0.02, None, seed) for seed in range(4)]


def test_a_killed_benchmark_goes_on_where_it_stopped(monkeypatch, tmp_path):
    trained = []

    def interrupted(run):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(run)
        return run._asdict() | {"valid": 0.5}

    monkeypatch.setattr(runs, "train", interrupted)
    path = tmp_path / "runs.jsonl"
    with pytest.raises(KeyboardInterrupt):
        Results(path).complete(RUNS)
    path.write_text(path.read_text() + '{"bed": "tiny", "ru')  # killed while it wrote a line
    results = Results(path)
    assert list(results) == RUNS[:2]

    monkeypatch.setattr(runs, "train", lambda run: trained.append(run) or run._asdict() | {"valid": 0.5})
    results.complete(RUNS)
    assert trained == RUNS
    assert list(Results(path)) == RUNS


def test_what_stands_in_the_record_is_not_run_again(monkeypatch, tmp_path):
    record = tmp_path / "record.jsonl"
    record.write_text(json.dumps(RUNS[0]._asdict() | {"valid": 0.5}) + "\n")
    monkeypatch.setattr(runs, "train", lambda run: run._asdict() | {"valid": 0.6})
    results = Results(tmp_path / "runs.jsonl", record)
    results.complete(RUNS[:2])
    assert [found["valid"] for found in results.values()] == [0.5, 0.6]
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 1


def test_the_learning_rate_and_the_knob_are_those_best_on_validation(monkeypatch, tmp_path):
    def fake(run):
        return run._asdict() | {"valid": {0.04: 0.6}.get(run.lr, 0.5) + {3.0: 0.1}.get(run.knob, 0.0)}

    monkeypatch.setattr(runs, "train", fake)
    results = Results(tmp_path / "runs.jsonl")
    grid.measure(results, grid.Part("SGD", ("tiny",), ("none", "by hand"), seeds=range(2)))
    chosen = {run[1:5] for run in results if run.seed not in grid.TUNING}
    assert chosen == {("none", "SGD", 0.04, None), ("by hand", "SGD", 0.04, 3.0)}


def test_a_rate_that_is_given_is_not_tuned(monkeypatch, tmp_path):
    monkeypatch.setattr(runs, "train", lambda run: run._asdict() | {"valid": 0.5})
    results = Results(tmp_path / "runs.jsonl")
    grid.measure(results, grid.Part("SGD", ("tiny",), ("none",), lr=0.5, seeds=range(2)))
    assert [(run.lr, run.seed) for run in results] == [(0.5, 0), (0.5, 1)]


def test_a_rule_with_a_rate_of_its_own_takes_the_best_one_for_itself(monkeypatch, tmp_path):
    def fake(run):
        return run._asdict() | {"valid": float(run.lr == (0.01 if run.rule == "Coherence" else 0.04)), "test": run.lr}

    monkeypatch.setattr(runs, "train", fake)
    results = Results(tmp_path / "runs.jsonl")
    for own, rules in ((False, ("none",)), (True, ("Coherence",))):
        grid.measure(results, grid.Part("SGD", ("tiny",), rules, seeds=range(200, 202), own=own))
    known = cells.Cells(results)
    assert [known.rate("tiny", "SGD", rule) for rule in ("none", "Coherence")] == [0.04, 0.01]
    assert known.own("tiny", "Coherence", "SGD").mean == pytest.approx(100 * (0.01 - 0.04))


def test_every_part_of_the_grid_names_testbeds_and_rivals():
    for part in grid.PARTS:
        assert set(part.beds) <= set(testbeds.BEDS)
        assert set(part.rules) <= {*rivals.RIVALS, APART}


def test_the_interval_is_students():
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 4.302653 / 3**0.5))
    assert math.isnan(interval([1.0])[1])


def found(rule, seed, test, bed="C0", **others):
    base = {"bed": bed, "rule": rule, "optimizer": "AdamW", "lr": 1e-2, "knob": None, "seed": seed, "seconds": 1.0}
    scores = {"test": test, "valid": test, "probes": [test, 0.1], "missing": [0.1, test], "coefficients": [2.0, 1.0]}
    return base | scores | others


def as_runs(lines):
    return {Run(*(line[field] for field in Run._fields)): line for line in lines}


LINES = [
    found("none", 90, 0.6),
    found("none", 90, 0.5, lr=1e-3),
    *(found("none", s, t) for s, t in ((200, 0.5), (201, 0.7))),
    *(found("Coherence", s, t) for s, t in ((201, 0.9), (200, 0.6), (202, 0.0))),
    *(found(APART, s, 0.8, alone=[0.9, 0.1]) for s in (200, 201)),
]


def test_changes_pair_the_seeds_of_a_rule_with_those_without_balancing():
    known = cells.Cells(as_runs(LINES))
    assert known.rate("C0", "AdamW") == 1e-2
    change = known.change("C0", "Coherence")
    assert (change.mean, change.seeds) == (pytest.approx(15), 2)
    whole, probes = known.headroom("C0")
    assert whole.mean == pytest.approx(30)  # the best alone is more than what they add up to
    assert probes[0].mean == pytest.approx(20)


def test_a_goal_is_met_or_not_by_the_mean():
    met = {goal.what: goal.met for goal in goals.goals(cells.Cells(as_runs(LINES)))}
    assert met == {
        "AdamW, speech beside noise (C0) at 0.01: at least +6.0": True,
        "AdamW: nowhere significantly worse by more than 0.3": True,
    }


def test_the_report_tells_every_table_out_of_a_few_runs():
    text = report.describe(as_runs(LINES))
    assert "+15.0 ± 63.5 (n=2)" in text
    assert "2 of 2 met" in text
