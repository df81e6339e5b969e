"""The recorder: what it holds, when it records, and its table."""

import copy
import gc
import pickle
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
    assert recorder.summary().recorded == 1
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


def test_an_optimizer_without_a_penalty_is_refused():
    plain = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    message = r"^`optimizer` must have a penalty on it\. Got a plain SGD\. Wrap it"
    with pytest.raises(ValueError, match=message):
        Recorder(plain)
    with pytest.raises(
        TypeError, match=r"^`optimizer` must be a torch\.optim\.Optimizer\. Got Linear\."
    ):
        Recorder(nn.Linear(1, 1))


@pytest.mark.parametrize("every", [0, -1, 1.0, True, "2", None])
@pytest.mark.parametrize("ask", [Recorder, lambda _, every: log(every)], ids=["record", "log"])
def test_every_must_be_a_positive_integer(ask, every):
    optimizer, _ = make_penalty()
    is_integer = type(every) is int
    error = ValueError if is_integer else TypeError
    message = "positive" if is_integer else "an integer"
    with pytest.raises(error, match=rf"^`every` must be {message}\. Got {every!r}\. Take 1"):
        ask(optimizer, every=every)


def log(every):
    Recorder(make_penalty()[0]).log_to(print, every=every)


def test_every_may_be_an_integer_of_numpy():
    optimizer, step = make_penalty()
    recorder = Recorder(optimizer, every=np.int64(3))
    for _ in range(5):
        step()
    assert recorded(recorder) == [1, 4]


@pytest.mark.parametrize("copies", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_recorder_is_not_pickled_or_copied(copies):
    optimizer, step = make_penalty()
    recorder = Recorder(optimizer)
    step()
    with pytest.raises(TypeError, match=r"^`Recorder` must not be pickled .* Got .* Save what"):
        copies(recorder)
    assert copies(recorder.summary())


@pytest.mark.parametrize("copies", [lambda o: pickle.loads(pickle.dumps(o)), copy.deepcopy])
def test_a_recorded_optimizer_is_copied_without_its_recorder(copies):
    optimizer, step = make_penalty()
    recorder = Recorder(optimizer)
    step()
    copies(optimizer).step()
    assert recorded(recorder) == [1]
