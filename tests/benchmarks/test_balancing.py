import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from benchmarks import dominance, dominance_report, rivals, testbeds
from benchmarks.dominance import Results, Run, train
from benchmarks.testbeds import Bed, Branch, Model, gaussians, losses, probe, score

TINY = Bed("tiny", "", (Branch("a", 1, 0.5, 2.0), Branch("b", 2, 0.5)), gaussians, size=64, epochs=2, width=8)


@pytest.fixture(autouse=True)
def tiny_bed(monkeypatch):
    monkeypatch.setitem(testbeds.BEDS, "tiny", TINY)


def model_and_batch():
    torch.manual_seed(0)
    part = gaussians(TINY, seed=0)["train"]
    return Model(TINY, [x.shape[1] for x in part.inputs], 10), part


def gradients_of(make_step, knob):
    """The gradients that a rule leaves when the learning rate is 0."""
    model, part = model_and_batch()
    optimizer = dominance.optimizer_for("SGD", model, 0.0)
    torch.manual_seed(1)
    make_step(model, optimizer, knob)(*part)
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}


def norm(gradients, prefix):
    return torch.stack([g.norm() for name, g in gradients.items() if name.startswith(prefix)]).norm()


def test_ogm_damps_the_branch_of_the_higher_score_by_one_minus_tanh():
    assert_close(rivals.ogm_coefficients(torch.tensor([3.0, 1.0]), 0.5), torch.tensor([1 - math.tanh(1.5), 1.0]))


def test_ogm_compares_with_the_mean_of_several_others():
    expected = torch.tensor([1 - math.tanh(6 / 1.5), 1.0, 1.0])
    assert_close(rivals.ogm_coefficients(torch.tensor([6.0, 1.0, 2.0]), 1.0), expected)


def test_ogm_scores_by_the_probability_of_the_class_in_each_contribution():
    model, part = model_and_batch()
    plain, modulated = gradients_of(rivals.plain, None), gradients_of(rivals.ogm, 0.3)
    with torch.no_grad():
        features = model.features(part.inputs)
        a, b = (
            (f @ w.T + model.joint.bias / 2).softmax(1).gather(1, part.target[:, None]).sum()
            for f, w in zip(features, model.joint.weight.split(8, 1), strict=True)
        )
    k = rivals.ogm_coefficients(torch.stack([a, b]), 0.3)
    assert k.min() < 1
    for i, name in enumerate("ab"):
        key = f"encoders.{name}.0.0.weight"
        assert_close(modulated[key], k[i] * plain[key])


def test_the_noise_of_ogm_ge_has_the_spread_of_the_scaled_gradient():
    scaled, noisy = gradients_of(rivals.ogm, 0.3), gradients_of(rivals.RULES["OGM-GE"].step, 0.3)
    key = "encoders.a.0.0.weight"
    assert_close((noisy[key] - scaled[key]).std(), scaled[key].std(), rtol=0.2, atol=0)


def test_contributions_add_up_to_the_joint_output():
    model, part = model_and_batch()
    features = model.features(part.inputs)
    assert_close(sum(model.contributions(features)), model.joint(torch.cat(features, 1)))


def test_clipping_by_group_leaves_each_branch_with_the_norm_asked_for():
    clipped = gradients_of(rivals.clip_groups, 1e-3)
    assert_close(norm(clipped, "encoders.a"), torch.tensor(1e-3), rtol=1e-2, atol=0)
    assert_close(norm(clipped, "encoders.b"), torch.tensor(1e-3), rtol=1e-2, atol=0)
    assert norm(clipped, "joint") > 1e-2


def test_global_clipping_clips_all_parameters_at_once():
    assert_close(norm(gradients_of(rivals.clip_global, 1e-3), ""), torch.tensor(1e-3), rtol=1e-2, atol=0)


def test_the_factor_set_by_hand_slows_the_first_branch_alone():
    model, _ = model_and_batch()
    optimizer = dominance.optimizer_for("SGD", model, 1.0)
    rivals.slower_first(model, optimizer, 0.1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 1.0, 1.0]
    assert optimizer.param_groups[0]["params"] == list(model.encoders["a"].parameters())


def test_gradnorm_with_weights_that_stay_is_the_sum_of_the_losses():
    pytest.importorskip("gradnorm_pytorch")
    assert_close(gradients_of(rivals.gradnorm, 0.0), gradients_of(rivals.own_heads, 1.0))


def test_jacobian_descent_that_adds_is_the_sum_of_the_losses():
    pytest.importorskip("torchjd")
    assert_close(gradients_of(rivals.jacobian_descent("Sum"), None), gradients_of(rivals.own_heads, 1.0))


def test_a_regression_scores_by_correlation_whatever_the_scale():
    target = torch.randn(50, 3)
    assert score(2 * target + 1, target) == pytest.approx(1)
    assert score(-target, target) == pytest.approx(-1)
    assert_close(losses(target + 2, target), torch.full((50,), 4.0))


def test_the_probe_recovers_a_linear_map():
    x = torch.randn(200, 5)
    target = x @ torch.randn(5, 2) + 3
    assert_close(probe(x[:150], target[:150], x[150:], ridge=0.0), target[150:], rtol=1e-3, atol=1e-3)


def test_watching_without_balancing_changes_no_score(monkeypatch):
    run = Run("tiny", "none", "SGD", 0.05, None, seed=dominance.WATCHED)
    watched = train(run)
    monkeypatch.setattr(dominance, "WATCHED", -1)
    plain = train(run)
    assert "dominance" in watched
    assert "dominance" not in plain
    assert [plain[key] for key in ("test", "valid", "probes")] == [watched[key] for key in ("test", "valid", "probes")]


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


def test_missing_data_says_what_to_set(monkeypatch, tmp_path):
    monkeypatch.setattr(testbeds, "DATA", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"`GRADBALANCE_DATA` must be a folder with pom.npz"):
        testbeds.pom(testbeds.BEDS["POM"], 0)


RUNS = [Run("tiny", "none", "SGD", 0.02, None, seed) for seed in range(4)]


def test_a_killed_benchmark_goes_on_where_it_stopped(monkeypatch, tmp_path):
    trained = []

    def interrupted(run):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(run)
        return run._asdict() | {"valid": 0.5}

    monkeypatch.setattr(dominance, "train", interrupted)
    path = tmp_path / "runs.jsonl"
    with pytest.raises(KeyboardInterrupt):
        Results(path).complete(RUNS)
    path.write_text(path.read_text() + '{"bed": "tiny", "ru')  # killed while it wrote a line
    results = Results(path)
    assert list(results) == RUNS[:2]

    monkeypatch.setattr(dominance, "train", lambda run: trained.append(run) or run._asdict() | {"valid": 0.5})
    results.complete(RUNS)
    assert trained == RUNS
    assert list(Results(path)) == RUNS


def test_the_learning_rate_and_the_knob_are_those_best_on_validation(monkeypatch, tmp_path):
    def fake(run):
        return run._asdict() | {"valid": {0.04: 0.6}.get(run.lr, 0.5) + {0.03: 0.1}.get(run.knob, 0.0)}

    monkeypatch.setattr(dominance, "train", fake)
    results = Results(tmp_path / "runs.jsonl")
    dominance.measure(results, ["tiny"], ["none", "slower by hand"], None)
    chosen = {run[1:5] for run in results if run.seed in dominance.SEEDS and not run.rule.startswith("alone")}
    assert chosen == {("none", "SGD", 0.04, None), ("slower by hand", "SGD", 0.04, 0.03)}
    alone = {(run.rule, run.lr, run.seed) for run in results if run.rule.startswith("alone")}
    assert alone == {(f"alone: {b}", 0.04, seed) for b in "ab" for seed in dominance.ALONE}


def test_a_rule_with_a_rate_of_its_own_takes_the_best_one_for_itself(monkeypatch, tmp_path):
    def fake(run):
        best = 0.01 if run.rule == "default, own rate" else 0.04
        return run._asdict() | {"valid": float(run.lr == best)}

    monkeypatch.setattr(dominance, "train", fake)
    results = Results(tmp_path / "runs.jsonl")
    dominance.measure(results, ["tiny"], ["default", "default, own rate"], None)
    rates = {(run.rule, run.lr) for run in results if run.seed in dominance.SEEDS}
    assert rates == {("default", 0.04), ("default, own rate", 0.01)}


def test_the_interval_is_students():
    found = dominance_report.interval([0.01, 0.02, 0.03])
    assert found == pytest.approx((2.0, 4.302653 / 3**0.5, 3))
    assert not found.worse


def test_the_report_pairs_the_seeds_of_a_rule_with_those_without_balancing():
    def found(rule, seed, test, probes):
        return {"bed": "tiny", "rule": rule, "optimizer": "SGD", "seed": seed, "test": test, "probes": probes}

    runs = {
        i: found(*cells)
        for i, cells in enumerate(
            [
                ("none", 0, 0.5, [0.5, 0.3]),
                ("none", 1, 0.7, [0.5, 0.5]),
                ("default", 1, 0.9, [0.4, 0.6]),
                ("default", 0, 0.6, [0.4, 0.4]),
                ("default", 2, 0.0, [0.0, 0.0]),
                *[(f"alone: {b}", seed, 0.6, [0.6]) for b in "ab" for seed in (0, 1)],
            ]
        )
    }
    measured = dominance_report.Measured(runs, range(3))
    assert measured.accuracy("tiny", "default").mean == pytest.approx(15)
    assert measured.headroom("tiny")[1].mean == pytest.approx(20)
    assert measured.recovered("tiny", "default").mean == pytest.approx(50)
    assert measured.first("tiny", "default").mean == pytest.approx(-10)
