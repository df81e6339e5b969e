"""The testbed of fine-tuning: a pretrained branch beside a new one, in miniature."""

import pytest
import torch

from benchmarks.balancing import finetune
from benchmarks.balancing.finetune import Inputs


def inputs(n):
    generator = torch.Generator().manual_seed(n)
    mask = torch.ones(n, 4, dtype=torch.long)
    mask[::2, 2:] = 0
    features = torch.randn(n, 384, generator=generator)
    states = torch.randn(n, 4, 384, generator=generator)
    return Inputs(states, mask, features, features[:, :1])


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(finetune, "EPOCHS", 2)
    monkeypatch.setattr(finetune, "BATCH", 8)
    monkeypatch.setattr(
        finetune, "parts", lambda: {"train": inputs(40), "valid": inputs(16), "test": inputs(17)}
    )


def test_the_mean_leaves_padding_out():
    states = torch.tensor([[[1.0], [2.0], [90.0]], [[4.0], [6.0], [8.0]]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert finetune.pooled(states, mask).tolist() == [[1.5], [6.0]]


def test_rows_keep_no_padding_that_none_of_them_needs():
    short = finetune.rows(inputs(6), torch.tensor([0, 2, 4]))
    assert short.states.shape == (3, 2, 384)
    assert short.mask.all()


def test_a_seed_gives_the_same_run_and_no_rule_raises_a_branch(small):
    plain = finetune.train("none", 1e-4, 1e-3, seed=0)
    assert [found["coefficients"] for found in plain["history"]] == [[1.0, 1.0]] * 2
    again = finetune.train("none", 1e-4, 1e-3, seed=0)
    assert again["history"] == plain["history"]
    balanced = finetune.train("Useful", 1e-4, 1e-3, seed=0)
    assert all(max(found["coefficients"]) == 1 for found in balanced["history"])


@pytest.mark.parametrize("alone", finetune.ALONE)
def test_a_branch_alone_does_not_see_the_other(small, alone):
    model = finetune.Model().eval()
    given = inputs(4)
    other = {"text": "features", "features": "states"}[alone]
    changed = given._replace(**{other: torch.zeros_like(getattr(given, other))})
    with torch.no_grad():
        assert torch.equal(model(given, alone), model(changed, alone))
        assert not torch.equal(model(given), model(changed))


def test_the_table_pairs_the_runs_by_seed():
    def line(arm, seed, mae):
        return {
            "arm": arm,
            "encoder_lr": 1e-4,
            "lr": 1e-3,
            "seed": seed,
            "history": [{"test": {"mae": mae}}],
        }

    lines = [
        line("none", 0, 1.0),
        line("none", 1, 1.2),
        line("Useful", 1, 1.3),
        line("Useful", 0, 1.1),
    ]
    assert "| Useful | 1.200 ± 0.141 | +0.100 ± 0.000 | 2 |" in finetune.describe(lines)
