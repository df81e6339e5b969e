"""How far the groups move at a step beside the size of their parameters, against a full copy of these."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.optim import SGD, AdamW

from gradbalance import Recorder, attach, rules
from tests.contract.branches import NAMES, Branches, batch, losses, share
from tests.contract.ranks import on_ranks
from tests.old_torch import has_torch, needs_torch

OPTIMIZERS = {
    "AdamW": partial(AdamW, lr=0.02, weight_decay=0.1),
    "SGD": partial(SGD, lr=0.1, momentum=0.9),
}
if has_torch("torch.optim.Muon"):
    OPTIMIZERS["Muon"] = partial(torch.optim.Muon, lr=0.02)
HALVES = rules.ByHand(text=0.5)
WATCH = rules.Watch()


class Matrices(nn.Module):
    """Two branches without biases, which Muon would not take."""

    def __init__(self, width=8, depth=1):
        super().__init__()
        torch.manual_seed(0)
        for name in ("text", "audio"):
            layers = [nn.Linear(width, width, bias=False) for _ in range(depth)]
            setattr(self, name, nn.Sequential(*layers))

    def groups(self):
        return {"text": self.text, "audio": self.audio}

    def loss(self, step):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(4, self.text[0].in_features, generator=generator)
        return (self.text(x) - 2 * self.audio(x).sin() - x).square().mean()


def copies(groups):
    """All parameters of each group, one after the other."""
    flat = {}
    for name, module in groups.items():
        flat[name] = torch.cat([p.detach().double().flatten() for p in module.parameters()])
    return flat


def ratios(before, after):
    return [((after[name] - before[name]).norm() / before[name].norm()).item() for name in before]


def train(model, optimizer, steps=5):
    """What was recorded, one step late, and what full copies show."""
    recorder = Recorder(optimizer)
    expected = []
    for step in range(steps):
        optimizer.zero_grad()
        model.loss(step).backward()
        before = copies(model.groups())
        optimizer.step()
        expected.append(ratios(before, copies(model.groups())))
    moved = recorder.to_dict()["moved"]
    assert np.isnan(moved[0]).all()
    return moved[1:], np.array(expected)[:-1], recorder


@pytest.mark.parametrize("options", [{}, {"late": True}], ids=["direct", "late"])
@pytest.mark.parametrize("apply_to", ["learning_rate", "displacement"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_movement_of_a_small_model_is_that_of_a_full_copy(name, apply_to, options):
    model = Matrices()
    optimizer = OPTIMIZERS[name](model.parameters())
    attach(optimizer, model.groups(), HALVES, apply_to=apply_to, **options)
    moved, expected, recorder = train(model, optimizer)
    np.testing.assert_allclose(moved, expected, rtol=1e-6)
    rows = recorder.summary().rows
    means = [rows["text"].moved, rows["audio"].moved]
    np.testing.assert_allclose(means, expected.mean(0), rtol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_movement_of_large_matrices_is_within_5_percent(name):
    """Of 4 samples, whose gradient has few large rows and columns."""
    model = Matrices(width=1024)
    optimizer = OPTIMIZERS[name](model.parameters())
    attach(optimizer, model.groups(), WATCH)
    moved, expected, _ = train(model, optimizer, steps=3)
    np.testing.assert_allclose(moved, expected, rtol=0.05)


@pytest.mark.parametrize("options", [{}, {"late": True}], ids=["direct", "late"])
def test_of_a_long_record_about_one_step_of_seven_is_read_and_shown_until_the_next(options):
    model = Matrices()
    optimizer = AdamW(model.parameters(), lr=0.02)
    attach(optimizer, model.groups(), WATCH, **options)
    moved, expected, _ = train(model, optimizer, steps=200)
    np.testing.assert_allclose(moved[:32], expected[:32], rtol=1e-6)
    read = 0
    for step in range(32, len(moved)):
        if moved[step, 0] == moved[step - 1, 0]:
            continue
        read += 1
        np.testing.assert_allclose(moved[step], expected[step], rtol=1e-6)
    assert 20 <= read <= 28


def stepper(names, lr=0.01):
    """Groups of three ones, an optimizer that is watched, and a step with gradients of ones for some groups."""
    groups = {name: [nn.Parameter(torch.ones(3))] for name in names}
    rows = [{"params": group} for group in groups.values()]
    optimizer = SGD(rows, lr=lr)
    attach(optimizer, groups, WATCH)

    def step(present):
        for name, (p,) in groups.items():
            p.grad = torch.ones(3) if name in present else None
        optimizer.step()

    return optimizer, step


@pytest.mark.parametrize("period", [2, 3, 5, 7, 14, 21])
def test_groups_that_take_turns_are_all_seen_to_move(period):
    names = ["trunk", *(f"head{m}" for m in range(period))]
    optimizer, step = stepper(names, lr=1e-4)
    recorder = Recorder(optimizer)
    for number in range(40 * period):
        step({"trunk", names[1 + number % period]})
    summary = recorder.summary()
    assert not summary.warnings
    for row in summary.rows.values():
        assert row.moved == pytest.approx(1e-4, rel=0.05)


@pytest.mark.filterwarnings("ignore:No parameter of")
def test_a_group_that_seldom_has_a_gradient_is_not_said_to_stand_still():
    for seed in range(5):
        draws = np.random.default_rng(seed)
        names = ["trunk", "common", "rare", "rarer"]
        optimizer, step = stepper(names)
        recorder = Recorder(optimizer)
        for _ in range(200):
            step({"trunk", draws.choice(names[1:], p=[0.96, 0.02, 0.02])})
        assert not any("does not move" in w for w in recorder.summary().warnings)


def test_a_schedule_of_any_period_is_seen():
    optimizer, step = stepper(["a", "b"])
    recorder = Recorder(optimizer)
    for number in range(700):
        optimizer.param_groups[1]["lr"] = 0.01 * max(0.0, 1 - (number % 7) / 6)
        step({"a", "b"})
    rows = recorder.summary().rows
    assert rows["a"].moved / rows["b"].moved < 10


@pytest.mark.parametrize("gap", [0, 1])
def test_a_second_record_shows_its_own_steps_alone(gap):
    optimizer, step = stepper(["a", "b"])
    optimizer.param_groups[1]["lr"] = 0.0
    with Recorder(optimizer) as recorder:
        for _ in range(50):
            step({"a", "b"})
    assert any("does not move" in warning for warning in recorder.summary().warnings)
    for _ in range(gap):
        step({"a", "b"})
    optimizer.param_groups[1]["lr"] = 0.01
    with Recorder(optimizer) as recorder:
        for _ in range(6):
            step({"a", "b"})
    moved = recorder.to_dict()["moved"]
    assert np.isnan(moved[0]).all()
    assert (moved[1:] > 0).all()
    assert not recorder.summary().warnings


def test_a_record_that_begins_beside_another_is_read_from_its_first_step_on():
    optimizer, step = stepper(["a", "b"])
    with Recorder(optimizer):
        for _ in range(50):
            step({"a", "b"})
        optimizer.param_groups[1]["lr"] = 0.0
        with Recorder(optimizer) as inner:
            for _ in range(6):
                step({"a", "b"})
    assert (inner.to_dict()["moved"][1:, 1] == 0).all()


def test_what_was_read_before_other_parameters_are_held_is_not_shown():
    optimizer, step = stepper(["a", "b"])
    recorder = Recorder(optimizer)
    for _ in range(50):
        step({"a", "b"})
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    step({"a", "b"})
    p = optimizer.param_groups[1]["params"][0]
    for _ in range(3):
        p.requires_grad_(not p.requires_grad)
        step({"a", "b"})
    moved = recorder.to_dict()["moved"]
    assert np.isfinite(moved[1:50]).all()
    assert np.isnan(moved[50:]).all()


def test_with_every_the_movement_is_that_of_the_measured_step_before():
    model = Matrices()
    optimizer = AdamW(model.parameters(), lr=0.02)
    attach(optimizer, model.groups(), WATCH, every=3)
    recorder = Recorder(optimizer)
    expected = []
    for step in range(7):
        optimizer.zero_grad()
        model.loss(step).backward()
        before = copies(model.groups())
        optimizer.step()
        expected.append(ratios(before, copies(model.groups())))
    moved = recorder.to_dict()["moved"]
    np.testing.assert_allclose(moved[1:], [expected[0], expected[3]], rtol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_the_scaler_skips_do_not_count_as_steps_without_movement(fused):
    model = Matrices()
    optimizer = AdamW(model.parameters(), lr=0.02, fused=fused)
    attach(optimizer, model.groups(), WATCH)
    recorder = Recorder(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    expected = []
    for step in range(5):
        optimizer.zero_grad()
        scaler.scale(model.loss(step)).backward()
        if step == 2:
            model.text[0].weight.grad[0, 0] = torch.inf
        before = copies(model.groups())
        scaler.step(optimizer)
        scaler.update()
        if step != 2:
            expected.append(ratios(before, copies(model.groups())))
    rows = recorder.summary().rows
    means = [rows["text"].moved, rows["audio"].moved]
    np.testing.assert_allclose(means, np.mean(expected[:-1], axis=0), rtol=1e-6)


def test_nothing_is_read_while_nobody_records():
    model = Matrices()
    optimizer = AdamW(model.parameters(), lr=0.02)
    penalty = attach(optimizer, model.groups(), WATCH)
    for records in (False, True, False):
        if records:
            recorder = Recorder(optimizer)
        seen = []
        for step in range(4):
            optimizer.zero_grad()
            model.loss(step).backward()
            optimizer.step()
            seen.append(np.isfinite(penalty.balance.moved).all())
        assert seen[1:] == [records] * 3
        if records:
            recorder.close()


def test_loading_a_checkpoint_is_no_movement():
    model = Matrices()
    optimizer = AdamW(model.parameters(), lr=0.02)
    penalty = attach(optimizer, model.groups(), WATCH)
    saved = None
    with Recorder(optimizer):
        for step in range(4):
            optimizer.zero_grad()
            model.loss(step).backward()
            optimizer.step()
            if saved is None:
                saved = optimizer.state_dict()
        optimizer.load_state_dict(saved)
        with torch.no_grad():
            model.text[0].weight.mul_(100.0)
        optimizer.step()
        assert np.isnan(penalty.balance.moved).all()
        optimizer.step()
        assert np.isfinite(penalty.balance.moved).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex64, torch.float64])
def test_parameters_of_any_dtype_are_read(dtype):
    groups = {}
    for name in ("text", "audio"):
        groups[name] = [nn.Parameter(torch.full((4, 3), 2.0, dtype=dtype)) for _ in "ab"]
    optimizer = SGD([p for group in groups.values() for p in group], lr=0.25)
    penalty = attach(optimizer, groups, WATCH)
    recorder = Recorder(optimizer)
    for _ in range(2):
        for p in groups["text"] + groups["audio"]:
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert penalty.balance.moved.tolist() == [0.125, 0.125]
    assert recorder.summary().rows["text"].moved == 0.125


def test_a_group_that_begins_with_zeros_has_moved_infinitely_far_which_does_not_count():
    groups = {"zeros": [nn.Parameter(torch.zeros(3))], "ones": [nn.Parameter(torch.ones(3))]}
    optimizer = SGD([*groups["zeros"], *groups["ones"]], lr=1.0)
    attach(optimizer, groups, WATCH)
    recorder = Recorder(optimizer)
    for _ in range(3):
        groups["zeros"][0].grad = torch.ones(3)
        groups["ones"][0].grad = torch.ones(3) / 2
        optimizer.step()
    rows = recorder.summary().rows
    assert rows["zeros"].moved == 1.0  # of the second step
    assert rows["ones"].moved == pytest.approx((1 / 2 + 1) / 2)


# Over ranks.


def one_process():
    return Branches(), partial(AdamW, lr=0.01), batch


def fully_sharded():
    model = Branches()
    for module in (model.text, model.audio, model.visual, model):
        fully_shard(module)
    return model, partial(AdamW, lr=0.01), lambda step: share(batch(step))


def partly_sharded():
    """Sharded text beside plain branches on all samples."""
    model = Branches()
    fully_shard(model.text)
    return model, partial(AdamW, lr=0.01), batch


def zero_redundancy():
    from torch.distributed.optim import ZeroRedundancyOptimizer

    make = partial(
        ZeroRedundancyOptimizer, optimizer_class=AdamW, lr=0.01, parameters_as_bucket_view=True
    )
    return Branches(), make, batch


def record(engine, recording, late=False, steps=16):
    """The table and the record of a rank, if it records."""
    model, make, part = engine()
    optimizer = make(model.parameters())
    attach(optimizer, model.groups(), rules.Watch(rules.Useful()), smoothing=0.5, late=late)
    rank = dist.get_rank() if dist.is_initialized() else 0
    recorder = Recorder(optimizer) if rank in recording else None
    for step in range(steps):
        optimizer.zero_grad()
        losses(model, *part(step))[0].backward()
        optimizer.step()
    if recorder is None:
        return None
    return recorder.to_dict()["moved"], str(recorder.summary())


@pytest.mark.parametrize("engine", [fully_sharded, partly_sharded, zero_redundancy])
def test_distributed_the_movement_and_the_table_are_those_of_one_process(engine):
    if engine is not zero_redundancy:
        needs_torch("FSDP2 on the CPU")
    moved, table = record(one_process, [0])
    assert np.isfinite(moved[1:]).all()
    for found, printed in on_ranks(partial(record, engine), 2, [0, 1]):
        np.testing.assert_allclose(found, moved, rtol=1e-6)
        assert printed == table


@pytest.mark.parametrize("late", [False, True])
def test_distributed_one_rank_alone_may_record(late):
    needs_torch("FSDP2 on the CPU")
    moved, _ = record(one_process, [0], late, 6)
    first, second = on_ranks(partial(record, fully_sharded), 2, [0], late, 6)
    assert second is None
    # Late, that somebody records is known to the other ranks one step later.
    np.testing.assert_allclose(first[0][1 + late :], moved[1 + late :], rtol=1e-6)


def test_the_names_of_the_branches_are_in_the_table():
    _, table = record(one_process, [0])
    assert [line.split()[0] for line in table.splitlines()[1:4]] == list(NAMES)
