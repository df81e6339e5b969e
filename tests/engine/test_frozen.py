"""Only parameters that require a gradient count; one frozen or unfrozen later leaves or joins its group."""

import copy

import pytest
import torch
from torch import nn

from gradbalance import ConflictAwarePenalty
from gradbalance.rules import ByHand, Watch
from tests.engine.models import TwoBranches, backward, equal, groups_of, parameters, slow_norm, train

SGD = torch.optim.SGD


def penalised(model, rule=None, make=SGD, **options):
    return ConflictAwarePenalty(make(model.parameters(), lr=0.05), groups_of(model), rule or Watch(), **options)


def norm_of(members):
    return float(torch.stack([p.grad.double().norm() for p in members]).norm())


def test_a_frozen_parameter_counts_in_no_norm_and_in_no_sketch_even_with_a_gradient(model):
    model.text.weight.requires_grad_(False)
    optimizer = ConflictAwarePenalty(SGD(model.parameters(), lr=0.0), groups_of(model), Watch(), smoothing=0.0)
    for step in range(2):
        backward(model, step)
        model.text.weight.grad = torch.full_like(model.text.weight, 1e3)  # left over from before
        optimizer.step()
    assert optimizer.balance.norms.tolist() == pytest.approx([norm_of([model.text.bias]), slow_norm(model.audio)])
    assert abs(optimizer.balance.coherences[0].item()) < 0.999, "the left over gradient alone would give 1"


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("at", [0, 2])
def test_a_parameter_frozen_later_leaves_its_group_and_joins_again(model, at):
    optimizer = penalised(model, smoothing=0.0)
    train(model, optimizer, range(at))
    model.audio.weight.requires_grad_(False)
    train(model, optimizer, [3])
    assert optimizer.balance.norms[1].item() == pytest.approx(norm_of([model.audio.bias]))
    model.audio.weight.requires_grad_(True)
    train(model, optimizer, [4])
    assert optimizer.balance.norms[1].item() == pytest.approx(norm_of(model.audio.parameters()))
    assert optimizer.balance.step == at + 2


@pytest.mark.parametrize("make", [SGD, torch.optim.AdamW, torch.optim.Rprop])
def test_what_is_frozen_during_training_does_not_move_the_others(model, make):
    optimizer = penalised(model, ByHand(text=0.5, audio=2), make)
    plain = copy.deepcopy(model)
    train(model, optimizer, range(2))
    model.text.weight.requires_grad_(False)
    model.text.weight.grad = None
    before = model.text.weight.clone()
    train(model, optimizer, range(2, 4))
    assert torch.equal(model.text.weight, before)
    assert set(optimizer.coefficients().values()) == {0.5, 2.0}
    reference = make(plain.parameters(), lr=0.05)
    train(plain, reference, range(1))
    assert not equal(parameters(plain.head), parameters(model.head))


def test_a_group_frozen_as_a_whole_takes_no_part_and_comes_back(model):
    optimizer = penalised(model, ByHand(text=0.5, audio=0.25))
    train(model, optimizer, range(1))
    model.audio.requires_grad_(False)
    train(model, optimizer, range(1, 3))
    assert optimizer.balance.step == 1, "one group alone has no other to be balanced with"
    assert set(optimizer.coefficients().values()) == {1.0}
    model.audio.requires_grad_(True)
    train(model, optimizer, range(3, 4))
    assert optimizer.coefficients() == {"text": 0.5, "audio": 0.25}
    assert optimizer.balance.step == 2


@pytest.mark.parametrize("mode", ["update", "gradient"])
@pytest.mark.filterwarnings("ignore:No parameter of group")
def test_with_all_parameters_frozen_nothing_happens(model, mode):
    model.requires_grad_(False)
    optimizer = penalised(model, apply_to=mode, noise=1.0, max_norm=1.0)
    optimizer.step()
    assert optimizer.balance.step == 0
    assert set(optimizer.coefficients().values()) == {1.0}


@pytest.mark.usefixtures("host")
def test_members_unfrozen_later_join_their_group(model):
    model.audio.bias.requires_grad_(False)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = ConflictAwarePenalty(SGD(trainable, lr=0.1), groups_of(model), ByHand(audio=0.5))
    train(model, optimizer, range(1))
    model.audio.bias.requires_grad_(True)
    optimizer.add_param_group({"params": [model.audio.bias]})
    before = model.audio.bias.detach().clone()
    train(model, optimizer, range(1, 2))
    assert optimizer.balance.norms[1].item() == pytest.approx(slow_norm(model.audio), rel=1e-6)
    torch.testing.assert_close(model.audio.bias.detach(), before - 0.1 * 0.5 * model.audio.bias.grad)


def test_parameters_of_a_group_added_after_construction_belong_to_none(model):
    optimizer = penalised(model, ByHand(text=0.5, audio=0.5))
    stranger = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [stranger]})
    stranger.grad = torch.ones(3)
    backward(model)
    optimizer.step()
    torch.testing.assert_close(stranger.detach(), torch.full((3,), 0.95))


@pytest.mark.parametrize("members", [1, 2, 3])
def test_the_coherence_goes_on_where_the_sketch_reads_the_same_places(model, members):
    """Freezing text leaves what is remembered of audio."""
    optimizer = penalised(model, smoothing=0.0)
    train(model, optimizer, range(members))
    model.text.weight.requires_grad_(False)
    model.text.weight.grad = None
    backward(model, members - 1)  # the gradient of audio is near the last one
    optimizer.step()
    text, audio = optimizer.balance.coherences.tolist()
    assert audio > 0.9
    assert text != text or members > 1, "of the changed group there is no last gradient"


class LowRank(nn.Module):
    """A frozen weight and a trained product of two thin ones, as LoRA has it."""

    def __init__(self, d, rank=2):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(d)
            self.weight = nn.Parameter(torch.randn(3, d), requires_grad=False)
            self.a, self.b = nn.Parameter(torch.randn(rank, d)), nn.Parameter(torch.zeros(3, rank))

    def forward(self, x):
        return x @ (self.weight + self.b @ self.a).T


@pytest.mark.parametrize("held", ["all parameters", "those trained"])
@pytest.mark.parametrize("make", [SGD, torch.optim.AdamW])
def test_of_a_branch_with_low_rank_adapters_the_adapters_are_balanced(held, make):
    model = TwoBranches()
    model.text, model.audio = LowRank(4), LowRank(5)
    frozen = [model.text.weight.clone(), model.audio.weight.clone()]
    given = [p for p in model.parameters() if p.requires_grad or held == "all parameters"]
    optimizer = ConflictAwarePenalty(make(given, lr=0.05), groups_of(model), ByHand(text=0.5))
    assert "text: 14, audio: 16" in repr(optimizer), "sizes count what is trained"
    train(model, optimizer, range(3))
    assert optimizer.balance.norms.tolist() == pytest.approx(
        [norm_of([m.a, m.b]) for m in (model.text, model.audio)], rel=1e-6
    )
    assert equal(frozen, [model.text.weight, model.audio.weight])
    assert optimizer.balance.coherences.isnan().all(), "factors by hand need none"
    assert optimizer.coefficients() == {"text": 0.5, "audio": 1.0}
