"""Whose a parameter is: by identity, whatever becomes of the optimizer and the model after wrapping."""

import copy
import gc
import math
import pickle
import warnings
import weakref

import pytest
import torch
from torch import nn

from gradbalance import ConflictAwarePenalty, attach, groups_by_name
from gradbalance.rules import ByHand, Watch
from tests.engine.models import (
    TwoBranches,
    backward,
    equal,
    fixed_gradients,
    groups_of,
    parameters,
    penalised,
    slow_norm,
    train,
)

SGD = torch.optim.SGD
each_kind = pytest.mark.parametrize(
    "make", [SGD, torch.optim.AdamW, torch.optim.Rprop], ids=["SGD", "AdamW", "displacement"]
)
each_mode = pytest.mark.parametrize("mode", ["update", "gradient"])
each_form = pytest.mark.parametrize("form", ["modules", "lists"])


def in_form(groups, form):
    if form == "modules":
        return groups
    return {name: list(module.parameters()) for name, module in groups.items()}


def moved(module, optimizer, gradients=fixed_gradients, model=None):
    """Which parameters of a module the next step moves."""
    start = parameters(module)
    gradients(model or module, 9)
    optimizer.step()
    return [not torch.equal(p, q) for p, q in zip(module.parameters(), start, strict=True)]


# Order and membership of param_groups.


@each_kind
@each_form
@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_param_group_that_is_taken_out_and_added_again_keeps_its_group(
    model, make, form, steps_before
):
    inner = make([{"params": m.parameters()} for m in model.children()], lr=0.1)
    optimizer = ConflictAwarePenalty(inner, in_form(groups_of(model), form), ByHand(text=0.0))
    train(model, optimizer, range(steps_before), fixed_gradients)
    inner.add_param_group(inner.param_groups.pop(0))
    assert moved(model, optimizer) == [False] * 2 + [True] * 4
    assert optimizer.coefficients() == {"text": 0.0, "audio": 1.0}


@each_kind
@each_form
@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("order", ["reversed", "rotated"])
def test_parameters_in_another_order_keep_their_group(make, form, steps_before, order):
    model = nn.ModuleDict({name: nn.Linear(3, 3) for name in ("text", "audio", "head")})
    groups = in_form({"text": model["text"], "audio": model["audio"]}, form)
    optimizer = penalised(model, ByHand(text=0.0), make, groups)
    train(model, optimizer, range(steps_before), fixed_gradients)
    held = optimizer.param_groups[0]["params"]
    held[:] = held[::-1] if order == "reversed" else [*held[2:], *held[:2]]
    assert moved(model, optimizer) == [False] * 2 + [True] * 4


@each_form
@pytest.mark.parametrize("steps_before", [0, 2])
def test_parameters_that_move_to_another_param_group_keep_their_group(model, form, steps_before):
    optimizer = penalised(model, ByHand(text=0.0), groups=in_form(groups_of(model), form))
    train(model, optimizer, range(steps_before), fixed_gradients)
    held = optimizer.param_groups[0]["params"]
    optimizer.param_groups[0]["params"] = [p for p in held if p.dim() > 1]
    optimizer.add_param_group({"params": [p for p in held if p.dim() == 1], "lr": 0.2})
    assert moved(model, optimizer) == [False] * 2 + [True] * 4


@each_form
@pytest.mark.parametrize("steps_before", [0, 2])
def test_frozen_parameters_that_are_filtered_out_of_the_optimizer_take_no_part(
    model, form, steps_before
):
    optimizer = penalised(model, ByHand(text=0.0), groups=in_form(groups_of(model), form))
    train(model, optimizer, range(steps_before))
    model.text.weight.requires_grad_(False)
    held = optimizer.param_groups[0]["params"]
    optimizer.param_groups[0]["params"] = [p for p in held if p.requires_grad]
    assert moved(model, optimizer) == [False] * 2 + [True] * 4
    assert optimizer.balance.step == steps_before + 1


def test_an_empty_param_group_changes_nothing(model):
    other = copy.deepcopy(model)
    for mode in ("update", "gradient"):
        groups = [{"params": []}, {"params": model.parameters()}, {"params": []}]
        make = SGD if mode == "gradient" else torch.optim.AdamW
        inner = make(groups, lr=0.1)
        optimizer = ConflictAwarePenalty(inner, groups_of(model), ByHand(text=0.5), apply_to=mode)
        twin = penalised(other, ByHand(text=0.5), make, lr=0.1, apply_to=mode)
        train(model, optimizer, range(2))
        train(other, twin, range(2))
        assert equal(parameters(model), parameters(other))
        optimizer.remove()
        twin.remove()


# Added after wrapping.


@each_kind
@pytest.mark.parametrize("frozen", [False, True], ids=["trained base", "frozen base"])
def test_a_layer_added_to_the_module_of_a_group_belongs_to_it(make, frozen):
    model = nn.ModuleDict(
        {"text": nn.Sequential(nn.Linear(4, 4)), "audio": nn.Linear(4, 4), "head": nn.Linear(4, 4)}
    )
    groups = {"text": model["text"], "audio": model["audio"]}
    optimizer = penalised(model, ByHand(text=0.0), make, groups)
    train(model, optimizer, range(1), fixed_gradients)
    if frozen:
        model["text"].requires_grad_(False)
    model["text"].append(nn.Linear(4, 4))
    optimizer.add_param_group({"params": model["text"][1].parameters()})
    assert not any(moved(model["text"][1], optimizer, model=model))
    assert optimizer.balance.step == 2
    assert optimizer.coefficients() == {"text": 0.0, "audio": 1.0}
    members = model["text"][1] if frozen else model["text"]
    assert optimizer.balance.norms[0] == pytest.approx(slow_norm(members), rel=1e-6)


def test_a_layer_added_under_the_pattern_of_a_group_belongs_to_it():
    model = nn.ModuleDict({"text": nn.Sequential(nn.Linear(4, 4)), "audio": nn.Linear(4, 4)})
    groups = groups_by_name(model, text="text", audio="audio.*")
    optimizer = penalised(model, ByHand(text=0.0), groups=groups)
    model["text"].append(nn.Linear(4, 4))
    optimizer.add_param_group({"params": model["text"][1].parameters()})
    assert not any(moved(model["text"], optimizer, model=model))


def test_parameters_that_are_added_and_belong_to_no_module_of_a_group_belong_to_none(model):
    optimizer = penalised(
        model,
        ByHand(text=0.5, audio=0.5),
        groups={"text": list(model.text.parameters()), "audio": model.audio},
    )
    stranger = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [stranger]})
    stranger.grad = torch.ones(3)
    backward(model)
    optimizer.step()
    torch.testing.assert_close(stranger.detach(), torch.full((3,), 0.95))


# Tensors that nobody knows go by the place in which they stand.


@each_kind
@pytest.mark.parametrize("steps_before", [0, 2])
def test_new_tensors_have_the_group_of_those_in_whose_place_they_stand(model, make, steps_before):
    optimizer = penalised(model, ByHand(text=0.0), make)
    train(model, optimizer, range(steps_before), fixed_gradients)
    others = [nn.Parameter(p.detach().double()) for p in model.parameters()]
    for p in others:
        p.grad = torch.ones_like(p)
    optimizer.param_groups[0]["params"] = others
    optimizer.state.clear()
    start = [p.detach().clone() for p in others]
    optimizer.step()
    assert [torch.equal(p, q) for p, q in zip(others, start, strict=True)] == [True] * 2 + [
        False
    ] * 4


@each_kind
@pytest.mark.parametrize("steps_before", [0, 1])
@pytest.mark.parametrize("late", [False, True], ids=["direct", "late"])
def test_torch_can_swap_the_parameters(model, make, steps_before, late):
    optimizer = penalised(model, ByHand(text=0.0), make, late=late)
    train(model, optimizer, range(steps_before), fixed_gradients)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.zero_grad()
        model.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    optimizer.state.clear()

    def gradients(model, step):
        for p in model.parameters():
            p.grad = torch.full_like(p, 0.5)

    assert model.text.weight.dtype == torch.float64
    assert moved(model, optimizer, gradients) == [False] * 2 + [True] * 4
    optimizer.state_dict()
    assert optimizer.balance.step == steps_before + 1


def test_after_a_cast_the_norms_are_those_of_the_new_dtype(model):
    optimizer = penalised(model, Watch(), lr=0.0, max_norm=1.0)
    train(model, optimizer, range(1))
    model.half()
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e4)
    optimizer.step()
    expected = [1e4 * math.sqrt(15), 1e4 * math.sqrt(18)]
    assert optimizer.balance.norms.tolist() == pytest.approx(expected, rel=1e-3)
    assert slow_norm(model) == pytest.approx(1.0, rel=0.01), "clipped"


def test_what_is_remembered_of_coherence_survives_a_step_that_reads_other_places(model):
    """Freezing text leaves what is remembered of audio."""
    optimizer = penalised(model, Watch(), smoothing=0.0)
    train(model, optimizer, range(2))
    model.text.weight.requires_grad_(False)
    model.text.weight.grad = None
    backward(model, 1)  # the gradient of audio is near the last one
    optimizer.step()
    text, audio = optimizer.balance.coherences.tolist()
    assert audio > 0.9
    assert text < 0.999, "the mean of before: of the changed group there is no last gradient"


# Only parameters that require a gradient count; one frozen or unfrozen later leaves or joins its group.


def test_a_frozen_parameter_counts_in_no_norm_and_in_no_coherence_even_with_a_gradient(model):
    model.text.weight.requires_grad_(False)
    optimizer = penalised(model, Watch(), lr=0.0, smoothing=0.0)
    for step in range(2):
        backward(model, step)
        model.text.weight.grad = torch.full_like(model.text.weight, 1e3)  # left over from before
        optimizer.step()
    expected = [slow_norm(model.text.bias), slow_norm(model.audio)]
    assert optimizer.balance.norms.tolist() == pytest.approx(expected, rel=1e-6)
    assert abs(optimizer.balance.coherences[0]) < 0.999, "the left over gradient alone gives 1"


@pytest.mark.parametrize("at", [0, 2])
def test_a_parameter_frozen_later_leaves_its_group_and_joins_again(model, at):
    optimizer = penalised(model, Watch(), smoothing=0.0)
    train(model, optimizer, range(at))
    model.audio.weight.requires_grad_(False)
    train(model, optimizer, [3])
    assert optimizer.balance.norms[1] == pytest.approx(slow_norm(model.audio.bias), rel=1e-6)
    model.audio.weight.requires_grad_(True)
    train(model, optimizer, [4])
    assert optimizer.balance.norms[1] == pytest.approx(slow_norm(model.audio), rel=1e-6)
    assert optimizer.balance.step == at + 2


@pytest.mark.parametrize(
    ("make", "mode"),
    [(SGD, "update"), (torch.optim.Rprop, "update"), (SGD, "gradient")],
    ids=["rate", "displacement", "gradient"],
)
def test_a_parameter_frozen_after_backward_is_scaled_in_no_mode(model, make, mode):
    """Plain optimizers still step it, as its gradient is there."""
    plain = copy.deepcopy(model)
    optimizer = penalised(model, ByHand(text=0.5), make, apply_to=mode)
    reference = make(plain.parameters(), lr=0.05)
    for m in (model, plain):
        fixed_gradients(m)
        m.text.weight.requires_grad_(False)
    optimizer.step()
    reference.step()
    assert torch.equal(model.text.weight, plain.text.weight)
    assert not torch.equal(model.text.bias, plain.text.bias)
    assert optimizer.balance.norms[0] < slow_norm(plain.text), "it takes no part in the norm either"


@each_kind
def test_what_is_frozen_during_training_does_not_move_and_the_others_do(model, make):
    optimizer = penalised(model, ByHand(text=0.5, audio=2), make)
    train(model, optimizer, range(2))
    model.text.weight.requires_grad_(False)
    model.text.weight.grad = None
    start = parameters(model)
    train(model, optimizer, range(2, 4))
    same = [torch.equal(p, q) for p, q in zip(model.parameters(), start, strict=True)]
    assert same == [True] + [False] * 5
    assert optimizer.coefficients() == {"text": 0.5, "audio": 2.0}


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


@each_mode
@pytest.mark.filterwarnings("ignore:No parameter of group")
def test_with_all_parameters_frozen_nothing_happens(model, mode):
    model.requires_grad_(False)
    optimizer = penalised(model, Watch(), apply_to=mode, noise=1.0, max_norm=1.0)
    optimizer.step()
    assert optimizer.balance.step == 0
    assert set(optimizer.coefficients().values()) == {1.0}


@pytest.mark.parametrize("of", ["a module", "a list"])
def test_members_unfrozen_later_join_their_group(model, of):
    model.audio.bias.requires_grad_(False)
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = groups_of(model)
    if of == "a list":
        groups = {name: list(module.parameters()) for name, module in groups.items()}
    optimizer = ConflictAwarePenalty(SGD(trainable, lr=0.1), groups, ByHand(audio=0.5))
    train(model, optimizer, range(1))
    model.audio.bias.requires_grad_(True)
    optimizer.add_param_group({"params": [model.audio.bias]})
    before = model.audio.bias.detach().clone()
    train(model, optimizer, range(1, 2))
    assert optimizer.balance.norms[1] == pytest.approx(slow_norm(model.audio), rel=1e-6)
    expected = before - 0.1 * 0.5 * model.audio.bias.grad
    torch.testing.assert_close(model.audio.bias.detach(), expected)


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
@each_kind
def test_of_a_branch_with_low_rank_adapters_the_adapters_are_balanced(held, make):
    model = TwoBranches()
    model.text, model.audio = LowRank(4), LowRank(5)
    frozen = [model.text.weight.clone(), model.audio.weight.clone()]
    given = [p for p in model.parameters() if p.requires_grad or held == "all parameters"]
    optimizer = ConflictAwarePenalty(make(given, lr=0.05), groups_of(model), ByHand(text=0.5))
    assert "text: 14, audio: 16" in repr(optimizer), "sizes count what is trained"
    train(model, optimizer, range(3))
    expected = [slow_norm(m.a, m.b) for m in (model.text, model.audio)]
    assert optimizer.balance.norms.tolist() == pytest.approx(expected, rel=1e-6)
    assert equal(frozen, [model.text.weight, model.audio.weight])
    assert optimizer.coefficients() == {"text": 0.5, "audio": 1.0}


# Branches that are absent from some steps.


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("late", [False, True], ids=["direct", "late"])
def test_a_branch_in_every_second_batch_has_the_coherence_with_its_own_last_gradient(
    set_to_none, late
):
    model = nn.ModuleDict({name: nn.Linear(3, 1) for name in ("text", "audio", "visual")})
    optimizer = penalised(model, Watch(), torch.optim.AdamW, dict(model), smoothing=0.98, late=late)
    generator = torch.Generator().manual_seed(0)
    last, cosines = None, []
    for step in range(7):
        loss = 0.0
        for name, branch in model.items():
            if name != "audio" or step % 2 == 0:
                loss = loss + branch(torch.randn(8, 3, generator=generator)).square().mean()
        optimizer.zero_grad(set_to_none=set_to_none)
        loss.backward()
        if step % 2 == 0:
            now = torch.cat([p.grad.flatten() for p in model["audio"].parameters()]).double()
            if last is not None:
                cosines.append(torch.cosine_similarity(now, last, dim=0).item())
            last = now
        optimizer.step()
    optimizer.state_dict()
    expected = sum(cosines) / len(cosines)
    assert len(cosines) == 3
    assert optimizer.balance.coherences[1] == pytest.approx(expected, rel=1e-5)


def warned(model, optimizer, steps, silent):
    """The warnings of steps in which the branch ``silent(step)``, or none of them, has no gradient."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(steps):
            fixed_gradients(model, step)
            for name in silent(step):
                for p in model[name].parameters():
                    p.grad = None
            optimizer.step()
    return [str(warning.message) for warning in caught]


def three_branches(**options):
    model = nn.ModuleDict({name: nn.Linear(2, 1) for name in ("text", "audio", "visual")})
    return model, penalised(model, Watch(), groups=dict(model), **options)


@pytest.mark.parametrize("late", [False, True], ids=["direct", "late"])
def test_one_branch_a_batch_in_turn_is_one_warning_that_says_why(late):
    model, optimizer = three_branches(late=late)
    names = list(model)
    (message,) = warned(
        model, optimizer, 250, lambda step: [names[step % 3], names[(step + 1) % 3]]
    )
    assert "No step has counted for 100 measured steps" in message
    assert "Fewer than two groups have a gradient in the same step" in message


@pytest.mark.parametrize("late", [False, True], ids=["direct", "late"])
def test_a_branch_that_never_has_a_gradient_is_one_warning_that_names_it(late):
    model, optimizer = three_branches(late=late)
    (message,) = warned(model, optimizer, 250, lambda step: ["audio"])
    assert "`audio`" in message
    assert "`text`" not in message
    assert "Was a module replaced after the optimizer was wrapped" in message
    optimizer.state_dict()
    assert optimizer.balance.step == 250


def test_a_branch_that_is_silent_for_less_than_a_hundred_steps_is_no_warning():
    model, optimizer = three_branches()
    assert warned(model, optimizer, 300, lambda step: [] if step % 100 == 99 else ["audio"]) == []


def test_a_frozen_branch_is_no_warning_at_a_step():
    model, optimizer = three_branches()
    model["audio"].requires_grad_(False)
    assert warned(model, optimizer, 150, lambda step: ["audio"]) == []


def test_a_module_replaced_after_wrapping_is_a_warning_that_names_its_group(model):
    optimizer = penalised(model, Watch())
    model.audio = nn.Linear(5, 3)
    with pytest.warns(UserWarning, match="No parameter of `audio` has a gradient"):
        train(model, optimizer, range(120))


# Refusals name the cause that the user has.


def test_a_removed_penalty_can_be_put_on_again_with_other_groups(model):
    optimizer = SGD(model.parameters(), lr=0.1)
    attach(optimizer, groups_of(model), ByHand(text=0.0)).remove()
    attach(optimizer, {"head": model.head, "audio": model.audio}, ByHand(audio=0.0))
    assert moved(model, optimizer) == [True] * 2 + [False] * 2 + [True] * 2


@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("swap", ["a flat one for each", "a flat one", "none"])
def test_a_step_without_the_parameters_of_the_groups_says_what_the_optimizer_holds(
    model, swap, steps_before
):
    optimizer = penalised(model, ByHand(text=0.5))
    train(model, optimizer, range(steps_before))
    flat = [nn.Parameter(torch.zeros(10)) for _ in range(6)]
    replaced = {"a flat one for each": flat, "a flat one": flat[:1], "none": []}[swap]
    for p in replaced:
        p.grad = torch.ones_like(p)
    optimizer.param_groups[0]["params"] = replaced
    with pytest.raises(RuntimeError) as caught:
        optimizer.step()
    got = "empty `param_groups`"
    if replaced:
        got = f"{len(replaced)} tensors, the first of shape (10,)"
    message = str(caught.value)
    assert message.startswith(
        "The optimizer must hold the parameters of the groups. Those of `text`, `audio` are gone. "
        f"Got {got}. Call `remove()` and wrap the optimizer again"
    )
    assert all(not p.any() for p in replaced)


def test_a_step_in_which_flat_tensors_took_the_place_of_one_group_names_it(model):
    optimizer = penalised(model, ByHand(text=0.5))
    held = optimizer.param_groups[0]["params"]
    held[:2] = [nn.Parameter(torch.ones(15))]
    with pytest.raises(RuntimeError, match=r"Those of `text` are gone\. Got 5 tensors"):
        train(model, optimizer, range(1))


def test_a_param_group_that_is_gone_is_no_error_as_long_as_it_took_no_group_along(model):
    inner = SGD([{"params": m.parameters()} for m in model.children()], lr=0.1)
    optimizer = ConflictAwarePenalty(inner, groups_of(model), ByHand(text=0.0))
    del inner.param_groups[2]
    assert moved(model, optimizer) == [False] * 2 + [True] * 2 + [False] * 2


# Several changes at once.


def two_branches_apart(form="lists"):
    """Two branches in a param_group each, and SGD by which audio alone is to move."""
    text, audio = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer = SGD([{"params": text.parameters()}, {"params": audio.parameters()}], lr=0.1)
    groups = {"text": text, "audio": audio}
    if form == "lists":
        groups = {name: list(module.parameters()) for name, module in groups.items()}
    attach(optimizer, groups, ByHand(text=0))
    return text, audio, optimizer


def feed(optimizer):
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)


def which_move(optimizer, *modules):
    """Whether each of the modules moves in a step."""
    feed(optimizer)
    before = [module.weight.detach().clone() for module in modules]
    optimizer.step()
    return [
        not torch.equal(module.weight, old) for module, old in zip(modules, before, strict=True)
    ]


each_copy = pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))], ids=["copy", "pickle"]
)


@each_copy
@pytest.mark.parametrize("form", ["lists", "modules"])
@pytest.mark.parametrize("steps_before", [0, 1])
def test_a_copy_made_after_the_param_groups_were_reordered_keeps_the_groups(
    copied, form, steps_before
):
    text, audio, optimizer = two_branches_apart(form)
    for _ in range(steps_before):
        feed(optimizer)
        optimizer.step()
    optimizer.param_groups.reverse()
    text, audio, optimizer = copied((text, audio, optimizer))
    assert which_move(optimizer, text, audio) == [False, True]


@each_copy
def test_an_optimizer_that_has_lost_a_group_can_be_copied(copied):
    a, b, c = (nn.Parameter(torch.ones(2)) for _ in "abc")
    optimizer = SGD([{"params": [p]} for p in (a, b, c)], lr=0.1)
    attach(optimizer, {"a": [a], "b": [b], "c": [c]}, ByHand(a=0.5))
    optimizer.param_groups.pop()
    twin = copied(optimizer)
    feed(twin)
    twin.step()
    assert [p.tolist() for g in twin.param_groups for p in g["params"]] == [
        pytest.approx([0.95, 0.95]),
        pytest.approx([0.9, 0.9]),
    ]


@pytest.mark.parametrize("form", ["lists", "modules"])
@pytest.mark.parametrize("change", ["cast", "resize"])
def test_a_change_of_the_data_and_of_the_order_at_once_keep_the_groups(form, change):
    text, audio, optimizer = two_branches_apart(form)
    feed(optimizer)
    optimizer.step()
    for module in (text, audio):
        if change == "cast":
            module.double()
        else:
            module.weight.data = torch.ones(3, 2)
            module.weight.grad = None
    optimizer.param_groups.reverse()
    assert which_move(optimizer, text, audio) == [False, True]


@pytest.mark.filterwarnings("ignore:The optimizer holds no parameter")
@pytest.mark.parametrize("form", ["lists", "modules"])
@pytest.mark.parametrize("steps_before", [0, 1])
@pytest.mark.parametrize("one", [True, False], ids=["one of them", "all of them"])
def test_parameters_that_leave_the_optimizer_for_a_step_and_come_back_keep_their_group(
    form, steps_before, one
):
    text, audio, optimizer = two_branches_apart(form)
    for _ in range(steps_before):
        feed(optimizer)
        optimizer.step()
    parameters = optimizer.param_groups[0]["params"]
    optimizer.param_groups[0]["params"] = parameters[1:] if one else []
    feed(optimizer)
    optimizer.step()
    optimizer.param_groups[0]["params"] = parameters
    assert which_move(optimizer, text, audio) == [False, True]


def test_parameters_of_a_module_that_left_the_optimizer_are_not_kept_alive():
    *_, optimizer = two_branches_apart("modules")
    adapter = nn.Parameter(torch.ones(3))
    alive = weakref.ref(adapter)
    optimizer.add_param_group({"params": [adapter]})
    feed(optimizer)
    optimizer.step()
    optimizer.param_groups.pop()
    feed(optimizer)
    optimizer.step()
    del adapter
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("steps_before", [0, 1])
def test_a_tensor_that_gets_the_id_of_one_that_left_a_module_does_not_get_its_group(steps_before):
    layer = nn.Linear(2, 2, bias=False)
    text, audio = nn.Sequential(nn.Linear(2, 2), layer), nn.Linear(2, 2)
    kept = [*text[0].parameters(), *audio.parameters()]
    optimizer = SGD([{"params": layer.parameters()}, {"params": kept}], lr=0.1)
    attach(optimizer, {"text": text, "audio": audio}, ByHand(text=0))
    for _ in range(steps_before):
        feed(optimizer)
        optimizer.step()
        feed(optimizer)
    optimizer.param_groups.pop(0)
    optimizer.state.clear()
    del text[1]
    if steps_before:
        optimizer.step()
    values = list(torch.ones(10_000, 2, 2))
    weight = layer.weight
    del layer
    gc.collect()
    left = id(weight)
    others = []
    del weight  # what is made next is most likely put into its place
    while not others or id(others[-1]) != left:
        assert len(others) < 10_000
        others.append(nn.Parameter(values[len(others)]))
    optimizer.add_param_group({"params": others[-1:]})
    feed(optimizer)
    optimizer.step()
    assert others[-1].tolist() == [[pytest.approx(0.9)] * 2] * 2


@pytest.mark.parametrize(
    "tensors",
    [
        lambda module: list(module.state_dict().values()),
        lambda module: [p.data for p in module.parameters()],
        lambda module: [p.detach() for p in module.parameters()],
    ],
    ids=["state_dict", "data", "detach"],
)
def test_tensors_that_share_the_memory_of_parameters_are_refused(tensors):
    text, audio = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer = SGD([*text.parameters(), *audio.parameters()], lr=0.1)
    with pytest.raises(ValueError, match=r"`groups\['text'\]` must hold parameters\. Got tensors"):
        attach(optimizer, {"text": tensors(text), "audio": audio})


def test_a_warning_in_a_step_points_at_the_line_of_the_user():
    _, audio, optimizer = two_branches_apart()
    for p in audio.parameters():
        p.grad = torch.ones_like(p)
    for _ in range(99):
        optimizer.step()
    with pytest.warns(UserWarning, match="No step has counted") as caught:
        optimizer.step()
    assert [warning.filename for warning in caught] == [__file__]
