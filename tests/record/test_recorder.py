from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gradbalance import Balance, ConflictAwarePenalty, Recorder, attach, rules
from gradbalance._record.recorder import _BATCH
from gradbalance._record.summary import dominance
from tests import needs

FIELDS = ("norms", "shares", "coherences", "errors", "coefficients", "conflicts")


NORMS_ALONE = rules.ConflictAware(eta=0.1)


def make_penalty(gains=(10.0, 1.0), rule=NORMS_ALONE, **options):
    """A penalty on SGD over one linear layer per gain, and a function that steps it."""
    names = ["text", "audio", "visual", "depth", "touch", "radar"][: len(gains)]
    model = nn.ModuleDict({name: nn.Linear(4, 1) for name in names})
    sgd = torch.optim.SGD(model.parameters(), lr=0.01)
    optimizer = ConflictAwarePenalty(sgd, dict(model.items()), rule, **options)

    def step(scale=1.0):
        optimizer.zero_grad()
        sum(
            gain * scale * model[name](torch.ones(2, 4)).sum() for name, gain in zip(names, gains, strict=True)
        ).backward()
        optimizer.step()

    return optimizer, step


def assert_same(record, balances):
    for field in FIELDS:
        np.testing.assert_array_equal(record[field], [getattr(b, field).numpy() for b in balances])
    assert record["step"].tolist() == [int(b.step) for b in balances]


def test_the_record_holds_the_balance_of_every_step():
    optimizer, step = make_penalty((5.0, 1.0, 3.0), rules.Coherence())
    recorder = Recorder(optimizer)
    balances = []
    for i in range(5):
        optimizer.observe(text=1.0 + i, audio=2.0, visual=3.0)
        step(scale=1.0 + i)
        balances.append(optimizer.balance)
    record = recorder.to_dict()
    assert_same(record, balances)
    assert record["names"].tolist() == ["text", "audio", "visual"]
    assert record["conflicts"].dtype == bool
    assert record["step"].dtype.kind == "i"


@pytest.mark.parametrize("steps", [_BATCH - 1, _BATCH, 2 * _BATCH + 1])
def test_reading_in_batches_keeps_every_step_in_order(steps):
    optimizer, _ = make_penalty()
    recorder = Recorder(optimizer)
    for i in range(steps):
        optimizer.penalty.coefficients_for({"text": 1.0 + i, "audio": 1.0})
    assert len(recorder._waiting) < _BATCH  # what is on the device stays small
    assert recorder.to_dict()["norms"][:, 0].tolist() == [1.0 + i for i in range(steps)]


def test_the_device_is_read_once_a_batch_and_not_at_every_step(monkeypatch):
    optimizer, step = make_penalty(rule=rules.Watch())
    step()
    recorder = Recorder(optimizer)
    reads = []
    for name in ("cpu", "item", "tolist", "numpy", "__bool__", "__float__"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda *a, f=original, n=name: (reads.append(n), f(*a))[1])
    for _ in range(20):
        recorder._record(optimizer.balance)  # not a step, for which the engine itself reads a tensor of the host
    assert reads == []
    recorder.to_dict()
    assert reads == ["cpu", "numpy"]


@given(every=st.integers(1, 7), steps=st.integers(0, 20))
def test_every_k_th_step_is_recorded_from_the_first_on(every, steps):
    optimizer, _ = make_penalty()
    recorder = Recorder(optimizer, every=every)
    for _ in range(steps):
        optimizer.penalty.coefficients_for({"text": 2.0, "audio": 1.0})
    assert recorder.to_dict()["step"].tolist() == list(range(1, steps + 1, every))


def test_it_takes_a_wrapper_a_handle_and_an_optimizer_with_a_penalty():
    layers = nn.ModuleList([nn.Linear(2, 1), nn.Linear(2, 1)])
    sgd = torch.optim.SGD(layers.parameters(), lr=0.1)
    handle = attach(sgd, {"a": layers[0], "b": layers[1]})
    wrapper, step_wrapper = make_penalty()
    recorders = [Recorder(handle), Recorder(sgd), Recorder(wrapper), Recorder(wrapper.optimizer)]
    (layers[0](torch.ones(1, 2)) + layers[1](torch.ones(1, 2))).sum().backward()
    sgd.step()
    step_wrapper()
    assert [len(recorder.to_dict()["step"]) for recorder in recorders] == [1, 1, 1, 1]


def test_leaving_the_context_stops_recording_and_keeps_the_record():
    optimizer, step = make_penalty()
    with Recorder(optimizer) as recorder:
        step()
    step()
    recorder.close()
    assert recorder.to_dict()["step"].tolist() == [1]
    assert optimizer.penalty._engine.listeners == []


def test_recording_does_not_change_the_training():
    weights = []
    for records in (False, True):
        torch.manual_seed(0)
        optimizer, step = make_penalty()
        recorder = Recorder(optimizer) if records else None
        for _ in range(3):
            step()
        weights.append([p.detach().clone() for group in optimizer.param_groups for p in group["params"]])
    assert recorder is not None
    assert all(map(torch.equal, *weights))


def test_the_record_goes_on_when_the_device_or_precision_changes():
    optimizer, _ = make_penalty()
    recorder = Recorder(optimizer)
    row = Balance(*torch.ones(5, 2), torch.ones(2, 2) > 0, torch.tensor(1.0), optimizer.penalty.names)
    for moved in (row, Balance(*(t.to("meta") for t in row[:-1]), row.names)):
        waiting = len(recorder._waiting)
        recorder._record(moved)
    assert waiting == 1
    assert [t.device.type for t in recorder._waiting] == ["meta"]
    assert len(recorder._read) == 1


@given(norms=st.lists(st.lists(st.floats(1e-3, 1e3), min_size=3, max_size=3), min_size=1, max_size=5))
def test_dominance_is_the_largest_norm_over_the_mean_of_the_others(norms):
    expected = []
    for row in norms:
        *others, largest = sorted(row)
        expected.append(largest / (sum(others) / 2))
    np.testing.assert_allclose(dominance(np.array(norms)), expected, rtol=1e-9)


def test_dominance_over_nothing_is_infinite_and_that_of_nothing_unknown():
    np.testing.assert_array_equal(dominance(np.array([[2.0, 0.0], [0.0, 0.0], [1e30, 1e-3]])), [np.inf, np.nan, 1e33])


def test_the_summary_equals_the_figures_of_the_record():
    optimizer, step = make_penalty((10.0, 1.0, 4.0), rules.ConflictAware(threshold=2.0, eta=0.25), smoothing=0.0)
    with Recorder(optimizer) as recorder:
        for scale in (1.0, 2.0, 3.0):
            step(scale)
    summary = recorder.summary()
    unit = 2 * 5**0.5  # the norm of the gradient of a linear layer at two rows of ones
    assert summary.steps == 3
    assert summary.norms == pytest.approx({"text": 20 * unit, "audio": 2 * unit, "visual": 8 * unit})
    assert all(np.isnan(coherence) for coherence in summary.coherences.values())
    assert summary.coefficients == pytest.approx({"text": 0.25, "audio": 1.0, "visual": 0.5})
    assert summary.conflicts == {"text": 1.0, "audio": 0.0, "visual": 1.0}
    assert summary.dominance == pytest.approx(10 / 2.5)
    assert summary.dominance_after == pytest.approx(2.5 / 1.5)


def test_the_summary_prints_a_row_for_each_group():
    optimizer, step = make_penalty()
    recorder = Recorder(optimizer)
    step()
    header, text, audio, last = str(recorder.summary()).splitlines()
    assert header.split() == ["mean", "norm", "coherence", "coefficient", "in", "conflict"]
    assert text.split() == ["text", "44.7", "-", "0.100", "100.0%"]
    assert audio.split() == ["audio", "4.47", "-", "1.000", "0.0%"]
    assert last == "dominance  10 before, 1 after; steps: 1"


def test_the_mean_coherence_is_that_of_the_steps_in_which_it_was_known():
    optimizer, step = make_penalty(rule=rules.Watch(), smoothing=0.5)
    recorder = Recorder(optimizer)
    for scale in (1.0, 1.0, -1.0):  # the cosines are 1 and -1, their running means 1 and 0
        step(scale)
    assert recorder.summary().coherences == pytest.approx({"text": 0.5, "audio": 0.5}, abs=1e-6)
    assert str(recorder.summary()).splitlines()[1].split() == ["text", "44.7", "0.500", "1.000", "0.0%"]


def test_steps_that_do_not_count_are_left_out_of_the_summary_and_the_figure(tmp_path):
    optimizer, step = make_penalty()
    recorder = Recorder(optimizer)
    for scale in (1.0, float("nan"), 0.0):
        step(scale)
    assert len(recorder.to_dict()["step"]) == 3
    assert recorder.summary().steps == 1
    recorder.plot(tmp_path / "figure.png")


@pytest.mark.parametrize("ask", [Recorder.summary, lambda recorder: recorder.plot("never.png")])
def test_a_summary_or_figure_without_a_step_says_what_to_do(ask):
    optimizer, step = make_penalty()
    recorder = Recorder(optimizer)
    with pytest.raises(RuntimeError, match=r"^`Recorder` must have seen .* Got 0 steps.* Make it before"):
        ask(recorder)
    step(float("inf"))
    with pytest.raises(RuntimeError, match="Got 1 steps, none such"):
        ask(recorder)


def test_an_optimizer_without_a_penalty_is_refused():
    plain = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    with pytest.raises(ValueError, match=r"^`optimizer` must have a penalty on it\. Got a plain SGD\. Wrap it"):
        Recorder(plain)
    optimizer, _ = make_penalty()
    optimizer.remove()
    with pytest.raises(ValueError, match="must have a penalty"):
        Recorder(optimizer)
    with pytest.raises(TypeError, match=r"^`optimizer` must be a torch\.optim\.Optimizer\. Got Linear\."):
        Recorder(nn.Linear(1, 1))


@pytest.mark.parametrize("every", [0, -1, 1.0, True])
def test_every_must_be_a_positive_integer(every):
    optimizer, _ = make_penalty()
    with pytest.raises(ValueError, match=r"^`every` must be a positive integer\. Got "):
        Recorder(optimizer, every=every)


class Writer:
    def __init__(self):
        self.scalars = []

    def add_scalar(self, *scalar):
        self.scalars.append(scalar)


def test_each_step_is_logged_once():
    optimizer, step = make_penalty()
    recorder, writer = Recorder(optimizer), Writer()
    step()
    recorder.log_to(writer)
    assert [(tag, at) for tag, _, at in writer.scalars] == [
        ("gradbalance/norms/text", 1),
        ("gradbalance/norms/audio", 1),
        ("gradbalance/coefficients/text", 1),
        ("gradbalance/coefficients/audio", 1),
    ]
    assert [value for _, value, _ in writer.scalars] == pytest.approx([44.721, 4.472, 0.1, 1.0], rel=1e-4)
    writer.scalars.clear()
    optimizer.observe(text=2.0, audio=3.0)
    step()
    recorder.log_to(writer)
    recorder.log_to(writer)
    assert {at for _, _, at in writer.scalars} == {2}
    assert [scalar[:2] for scalar in writer.scalars[2:4]] == [
        ("gradbalance/errors/text", 2.0),
        ("gradbalance/errors/audio", 3.0),
    ]
    assert len(writer.scalars) == 6


def test_a_tensorboard_writer_takes_the_record(tmp_path):
    accumulator = needs("tensorboard.backend.event_processing.event_accumulator")
    from torch.utils.tensorboard import SummaryWriter

    optimizer, step = make_penalty()
    with Recorder(optimizer) as recorder, SummaryWriter(tmp_path) as writer:
        for _ in range(3):
            step()
        recorder.log_to(writer)
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("gradbalance/norms/text")] == [1, 2, 3]


@pytest.mark.parametrize("kind", [str, Path])
def test_a_folder_is_as_good_as_a_writer(kind, tmp_path):
    accumulator = needs("tensorboard.backend.event_processing.event_accumulator")
    optimizer, step = make_penalty(rule=rules.Watch())
    recorder = Recorder(optimizer)
    for _ in range(2):
        step()
        recorder.log_to(kind(tmp_path / "runs" / "x"))
    folder = accumulator.EventAccumulator(str(tmp_path / "runs" / "x")).Reload()
    assert [event.step for event in folder.Scalars("gradbalance/norms/text")] == [1, 2]
    assert [event.step for event in folder.Scalars("gradbalance/coherences/audio")] == [2]


@pytest.mark.parametrize("writer", [3, None, []])
def test_what_cannot_be_written_to_is_refused(writer):
    optimizer, _ = make_penalty()
    with pytest.raises(TypeError, match=r"^`writer` must be a folder, or have .* Got (int|NoneType|list)\. Pass a "):
        Recorder(optimizer).log_to(writer)
