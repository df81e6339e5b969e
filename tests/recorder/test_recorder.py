"""The recorder: what it holds, when it records, and its table."""

import gc
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gradbalance import Balance, Recorder, attach, rules
from tests.recorder.runs import make_penalty


def recorded(recorder):
    """The steps in the record."""
    return recorder.to_dict()["step"].tolist()


@pytest.mark.parametrize("rule", [rules.Useful(), rules.ConflictAware(), rules.Watch()])
def test_the_record_holds_the_balance_of_every_step(rule):
    optimizer, step = make_penalty(("text", "audio", "visual"), (5.0, 1.0, 3.0), rule)
    recorder = Recorder(optimizer)
    balances = []
    for i in range(5):
        optimizer.observe(text=1.0 + i, audio=2.0, visual=3.0)
        step(scale=1.0 + i)
        balances.append(optimizer.balance)
    record = recorder.to_dict()
    assert set(record) == set(Balance._fields)
    assert record.pop("names").tolist() == ["text", "audio", "visual"]
    for field, values in record.items():
        np.testing.assert_array_equal(values, [getattr(balance, field) for balance in balances])
    assert record["conflicts"].dtype == bool
    assert record["conflicts"].shape == (5, 3, 3)
    assert record["step"].dtype.kind == "i"


def test_an_empty_record_has_the_shapes_of_no_step():
    record = Recorder(make_penalty()[0]).to_dict()
    assert record["step"].shape == (0,)
    assert record["norms"].shape == (0, 2)
    assert record["conflicts"].shape == (0, 2, 2)


@pytest.mark.parametrize("steps", [63, 64, 65, 1000])
def test_a_record_of_any_length_keeps_every_step_in_order(steps):
    optimizer, _ = make_penalty()
    recorder = Recorder(optimizer)
    for i in range(steps):
        optimizer.coefficients_for({"text": 1.0 + i, "audio": 1.0})
    assert recorder.to_dict()["norms"][:, 0].tolist() == [1.0 + i for i in range(steps)]


def test_writing_into_what_to_dict_returns_leaves_the_record_as_it_is():
    optimizer, step = make_penalty()
    recorder = Recorder(optimizer)
    step()
    recorder.to_dict()["norms"][:] = 0.0
    assert (recorder.to_dict()["norms"] > 0).all()


@given(every=st.integers(1, 7), steps=st.integers(0, 20))
def test_every_k_th_step_is_recorded_from_the_first_on(every, steps):
    optimizer, _ = make_penalty()
    recorder = Recorder(optimizer, every=every)
    for i in range(steps):
        optimizer.coefficients_for({"text": 2.0 + i, "audio": 1.0})
    expected = [2.0 + i for i in range(0, steps, every)]
    assert recorder.to_dict()["norms"][:, 0].tolist() == expected


def test_it_takes_a_wrapper_a_handle_and_an_optimizer_with_a_penalty():
    layers = nn.ModuleList([nn.Linear(2, 1), nn.Linear(2, 1)])
    sgd = torch.optim.SGD(layers.parameters(), lr=0.1)
    handle = attach(sgd, {"a": layers[0], "b": layers[1]})
    wrapper, step_wrapper = make_penalty()
    recorders = [Recorder(handle), Recorder(sgd), Recorder(wrapper), Recorder(wrapper.optimizer)]
    (layers[0](torch.ones(1, 2)) + layers[1](torch.ones(1, 2))).sum().backward()
    sgd.step()
    step_wrapper()
    assert [len(recorded(recorder)) for recorder in recorders] == [1, 1, 1, 1]


def test_leaving_the_context_stops_recording_and_keeps_the_record():
    optimizer, step = make_penalty()
    with Recorder(optimizer) as recorder:
        step()
    step()
    recorder.close()
    recorder.close()
    assert recorded(recorder) == [1]


def test_a_recorder_that_is_entered_again_records_again():  # E23
    optimizer, step = make_penalty()
    recorder = Recorder(optimizer)
    for _ in range(2):
        with recorder:
            step()
        step()
    assert recorded(recorder) == [1, 3]


def test_a_recorder_that_is_entered_inside_itself_records_each_step_once():  # E23
    optimizer, step = make_penalty()
    with Recorder(optimizer) as recorder:
        with recorder:
            step()
        step()
    step()
    assert recorded(recorder) == [1, 2]


@pytest.mark.parametrize("made_from", ["penalty", "wrapper", "optimizer"])
def test_a_penalty_that_was_removed_is_refused(made_from):  # E23
    optimizer, _ = make_penalty()
    penalty = optimizer.penalty
    optimizer.remove()
    source = {"penalty": penalty, "wrapper": optimizer, "optimizer": optimizer.optimizer}[made_from]
    with pytest.raises(ValueError, match=r"^`optimizer` must have a penalty on it\. Got .* Wrap"):
        Recorder(source)


def test_a_recorder_of_a_penalty_that_was_removed_cannot_be_entered_and_keeps_its_record():  # E23
    optimizer, step = make_penalty()
    with Recorder(optimizer) as recorder:
        step()
        optimizer.remove()
        step()
    with pytest.raises(ValueError, match=r"Got one whose penalty was removed\. Wrap it again"):
        recorder.__enter__()
    assert recorded(recorder) == [1]


def test_a_recorder_does_not_keep_the_optimizer_or_the_model():
    optimizer, step = make_penalty()
    recorder = Recorder(optimizer)
    step()
    kept = weakref.ref(optimizer.optimizer)
    kept_parameter = weakref.ref(optimizer.param_groups[0]["params"][0])
    del optimizer, step
    gc.collect()
    assert kept() is None
    assert kept_parameter() is None
    assert recorder.summary().steps == 1
    with pytest.raises(ValueError, match="must have a penalty"):
        recorder.__enter__()


def test_the_last_step_is_in_the_record_where_a_step_is_decided_late():
    optimizer, step = make_penalty(late=True)
    step()
    with Recorder(optimizer) as recorder:
        for scale in (2.0, 3.0):
            step(scale)
            assert recorder.to_dict()["norms"][-1, 1] == pytest.approx(scale * 20**0.5)
        step(4.0)
    step(5.0)
    sizes = recorder.to_dict()["norms"][:, 1] / 20**0.5
    assert sizes.tolist() == pytest.approx([2.0, 3.0, 4.0])


@pytest.mark.parametrize("late", [False, True])
def test_recording_does_not_change_the_training(late):
    weights = []
    for records in (False, True):
        torch.manual_seed(0)
        optimizer, step = make_penalty(rule=rules.Useful(), late=late)
        recorder = Recorder(optimizer) if records else None
        for scale in (1.0, -2.0, 3.0, 1.0):
            step(scale)
            if recorder is not None:
                recorder.to_dict()
        weights.append([p.detach() for group in optimizer.param_groups for p in group["params"]])
    assert all(map(torch.equal, *weights))


def test_the_summary_equals_the_figures_of_the_record():
    rule = rules.ConflictAware(threshold=2.0, eta=0.25)
    optimizer, step = make_penalty(
        ("text", "audio", "visual"), (10.0, 1.0, 4.0), rule, smoothing=0.0
    )
    with Recorder(optimizer) as recorder:
        for scale in (1.0, 2.0, 3.0):
            step(scale)
    summary = recorder.summary()
    unit = 2 * 5**0.5  # the norm of the gradient of a linear layer at two rows of ones
    assert summary.steps == 3
    assert summary.norms == pytest.approx(
        {"text": 20 * unit, "audio": 2 * unit, "visual": 8 * unit}
    )
    assert all(np.isnan(coherence) for coherence in summary.coherences.values())
    assert summary.coefficients == pytest.approx({"text": 0.25, "audio": 1.0, "visual": 0.5})
    assert summary.conflicts == {"text": 1.0, "audio": 0.0, "visual": 1.0}
    assert summary.dominance == pytest.approx(10 / 2.5)
    assert summary.dominance_after == pytest.approx(2.5 / 1.5)


norm = st.floats(1e-3, 1e3)


@given(norms=st.lists(st.tuples(norm, norm, norm), min_size=1, max_size=5))
def test_dominance_is_the_largest_norm_over_the_mean_of_the_others(norms):
    names = ("a", "b", "c")
    optimizer, _ = make_penalty(names, (1.0, 1.0, 1.0))
    recorder = Recorder(optimizer)
    expected = []
    for row in norms:
        optimizer.coefficients_for(dict(zip(names, row, strict=True)))
        *others, largest = sorted(row)
        expected.append(largest / (sum(others) / 2))
    assert recorder.summary().dominance == pytest.approx(np.median(expected))


def test_dominance_is_infinite_where_only_one_group_is_left():
    optimizer, step = make_penalty(rule=rules.ByHand(audio=0.0))
    recorder = Recorder(optimizer)
    step()
    assert recorder.summary().dominance == pytest.approx(10)
    assert recorder.summary().dominance_after == float("inf")


def test_the_summary_prints_a_row_for_each_group():
    optimizer, step = make_penalty()
    recorder = Recorder(optimizer)
    step()
    header, text, audio, last = str(recorder.summary()).splitlines()
    assert header.split() == ["mean", "norm", "coherence", "coefficient", "in", "conflict"]
    assert text.split() == ["text", "44.7", "-", "0.100", "100.0%"]
    assert audio.split() == ["audio", "4.47", "-", "1.000", "0.0%"]
    assert last == "dominance  10 before, 1 after; steps: 1"
    assert len(header) == len(text) == len(audio)


def test_the_mean_coherence_is_that_of_the_steps_in_which_it_was_known():
    optimizer, step = make_penalty(rule=rules.Watch(), smoothing=0.5)
    recorder = Recorder(optimizer)
    for scale in (1.0, 1.0, -1.0):  # the cosines are 1 and -1, their running means 1 and 0
        step(scale)
    summary = recorder.summary()
    assert summary.coherences == pytest.approx({"text": 0.5, "audio": 0.5}, abs=1e-6)
    assert str(summary).splitlines()[1].split() == ["text", "44.7", "0.500", "1.000", "0.0%"]


def test_steps_that_do_not_count_are_left_out_of_the_summary_and_the_figure(tmp_path):
    optimizer, step = make_penalty()
    recorder = Recorder(optimizer)
    for scale in (1.0, float("nan"), 0.0):
        step(scale)
    assert len(recorded(recorder)) == 3
    assert recorder.summary().steps == 1
    recorder.plot(tmp_path / "figure.png")


@pytest.mark.parametrize("ask", [Recorder.summary, lambda recorder: recorder.plot("never.png")])
def test_a_summary_or_figure_without_a_step_says_what_to_do(ask):
    optimizer, step = make_penalty()
    recorder = Recorder(optimizer)
    with pytest.raises(
        RuntimeError, match=r"^`Recorder` must have seen .* Got 0 steps.* Make it before"
    ):
        ask(recorder)
    step(float("inf"))
    with pytest.raises(RuntimeError, match="Got 1 steps, none such"):
        ask(recorder)


def test_an_optimizer_without_a_penalty_is_refused():
    plain = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    message = r"^`optimizer` must have a penalty on it\. Got a plain SGD\. Wrap it"
    with pytest.raises(ValueError, match=message):
        Recorder(plain)
    with pytest.raises(
        TypeError, match=r"^`optimizer` must be a torch\.optim\.Optimizer\. Got Linear\."
    ):
        Recorder(nn.Linear(1, 1))


@pytest.mark.parametrize("every", [0, -1, 1.0, True])
def test_every_must_be_a_positive_integer(every):
    optimizer, _ = make_penalty()
    with pytest.raises(ValueError, match=r"^`every` must be a positive integer\. Got "):
        Recorder(optimizer, every=every)
