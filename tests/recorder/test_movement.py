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
def test_of_a_long_record_one_step_in_seven_is_read_and_shown_until_the_next(options):
    model = Matrices()
    optimizer = AdamW(model.parameters(), lr=0.02)
    attach(optimizer, model.groups(), WATCH, **options)
    moved, expected, _ = train(model, optimizer, steps=30)
    read = [0, 1, 2, 3, 4, 5, 6, 13, 20, 27]
    last_read = [max(i for i in read if i <= step) for step in range(29)]
    np.testing.assert_allclose(moved, expected[last_read], rtol=1e-6)


@pytest.mark.parametrize("period", [2, 3, 4, 5, 6])
def test_groups_that_take_turns_are_seen_to_move(period):
    """Each stands still but at one step of a period."""
    names = [f"group{m}" for m in range(period)]
    groups = {name: [nn.Parameter(torch.ones(3)) for _ in "ab"] for name in names}
    optimizer = SGD([p for group in groups.values() for p in group], lr=0.01)
    attach(optimizer, groups, WATCH)
    recorder = Recorder(optimizer)
    steps = 7 * 6 * period
    for step in range(steps):
        for name in names:
            strength = float(name == names[step % period])
            for p in groups[name]:
                p.grad = torch.full((3,), strength)
        groups[names[(step + 1) % period]][0].grad[0] = 1e-30  # as two groups count
        optimizer.step()
    means = [row.moved for row in recorder.summary().rows.values()]
    assert max(means) < 2 * min(means)
    assert sum(means) == pytest.approx(0.01, rel=0.3)


def test_a_second_record_is_read_from_its_first_step_on():
    model = Matrices()
    optimizer = AdamW(model.parameters(), lr=0.02)
    attach(optimizer, model.groups(), WATCH)
    for _ in range(2):
        with Recorder(optimizer) as recorder:
            for step in range(9):
                optimizer.zero_grad()
                model.loss(step).backward()
                optimizer.step()
        moved = recorder.to_dict()["moved"][:, 0]
        assert len(set(moved[1:8])) == 7
        optimizer.step()  # which nobody records


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
