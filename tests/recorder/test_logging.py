"""`Recorder.log_to`: a TensorBoard writer, a folder, a function of a dict."""

from pathlib import Path

import pytest

from gradbalance import Recorder, rules
from tests import needs
from tests.recorder.runs import make_penalty


class Writer:
    """Anything with `add_scalar`."""

    def __init__(self):
        self.scalars = []

    def add_scalar(self, *scalar):
        self.scalars.append(scalar)


def test_each_step_is_logged_once():
    optimizer, step = make_penalty()
    recorder, writer = Recorder(optimizer), Writer()
    step()
    recorder.log_to(writer, every=1)
    values = {tag: value for tag, value, at in writer.scalars if at == 1}
    assert values == pytest.approx(
        {
            "gradbalance/norms/text": 44.721,
            "gradbalance/norms/audio": 4.472,
            "gradbalance/shares/text": 10 / 11,
            "gradbalance/shares/audio": 1 / 11,
            "gradbalance/coefficients/text": 0.1,
            "gradbalance/coefficients/audio": 1.0,
            "gradbalance/proposed/text": 0.1,
            "gradbalance/proposed/audio": 1.0,
        },
        rel=1e-4,
    )
    assert len(writer.scalars) == len(values)
    writer.scalars.clear()
    optimizer.observe(text=2.0, audio=3.0)
    step()
    recorder.log_to(writer, every=1)
    recorder.log_to(writer, every=1)
    assert len(writer.scalars) == 12
    assert ("gradbalance/errors/text", 2.0, 2) in writer.scalars
    assert ("gradbalance/errors/audio", 3.0, 2) in writer.scalars
    moved = optimizer.balance.moved
    assert moved[0] > 0
    assert ("gradbalance/moved/text", moved[0], 2) in writer.scalars


def test_a_function_is_called_once_for_each_step():
    optimizer, step = make_penalty(rule=lambda measured: [0.5, 1.0])
    recorder = Recorder(optimizer)
    lines = []
    for _ in range(2):
        step()
        step()
        recorder.log_to(lines.append, every=1)
    assert [line["gradbalance/step"] for line in lines] == [1, 2, 3, 4]
    assert lines[-1]["gradbalance/norms/text"] == pytest.approx(44.721, rel=1e-4)
    assert lines[-1]["gradbalance/coefficients/text"] == 0.5
    assert lines[-1]["gradbalance/coherences/audio"] == pytest.approx(1.0)
    assert "gradbalance/errors/text" not in lines[-1]  # not observed
    assert {type(value) for value in lines[-1].values()} == {int, float}


@pytest.mark.parametrize("calls", [1, 7], ids=["at the end", "after each step"])
@pytest.mark.parametrize("late", [False, True])
def test_one_of_so_many_steps_is_logged_from_the_first_on(calls, late):
    optimizer, step = make_penalty(late=late)
    lines = []
    with Recorder(optimizer) as recorder:
        for i in range(7):
            step()
            if i + calls >= 7:
                recorder.log_to(lines.append, every=3)
    recorder.log_to(lines.append, every=3)
    assert [line["gradbalance/step"] for line in lines] == [1, 4, 7]


def test_one_of_50_steps_is_logged_unless_told_otherwise():
    optimizer, _ = make_penalty()
    recorder = Recorder(optimizer)
    lines = []
    for _ in range(101):
        optimizer.coefficients_for({"text": 2.0, "audio": 1.0})
        recorder.log_to(lines.append)
    assert [line["gradbalance/step"] for line in lines] == [1, 51, 101]


def test_a_step_whose_function_raised_is_logged_by_the_next_call():
    optimizer, step = make_penalty()
    recorder = Recorder(optimizer)
    step()
    step()
    lines = []

    def fails_at_the_second(line):
        if lines:
            raise ConnectionError
        lines.append(line)

    with pytest.raises(ConnectionError):
        recorder.log_to(fails_at_the_second, every=1)
    recorder.log_to(lines.append, every=1)
    assert [line["gradbalance/step"] for line in lines] == [1, 2]


def test_what_a_watched_rule_proposes_is_logged():
    class Halves:
        acts = False

        def __call__(self, measured):
            return [0.5, 1.0]

    optimizer, step = make_penalty(rule=Halves())
    recorder = Recorder(optimizer)
    step()
    lines = []
    recorder.log_to(lines.append)
    assert lines[0]["gradbalance/proposed/text"] == 0.5
    assert lines[0]["gradbalance/coefficients/text"] == 1.0


def test_a_tensorboard_writer_takes_the_record(tmp_path):
    accumulator = needs("tensorboard.backend.event_processing.event_accumulator")
    from torch.utils.tensorboard import SummaryWriter

    optimizer, step = make_penalty()
    with Recorder(optimizer) as recorder, SummaryWriter(tmp_path) as writer:
        for _ in range(3):
            step()
        recorder.log_to(writer, every=1)
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("gradbalance/norms/text")] == [1, 2, 3]


@pytest.mark.parametrize("kind", [str, Path])
def test_a_folder_is_as_good_as_a_writer(kind, tmp_path):
    accumulator = needs("tensorboard.backend.event_processing.event_accumulator")
    optimizer, step = make_penalty(rule=rules.Watch())
    recorder = Recorder(optimizer)
    for _ in range(2):
        step()
        recorder.log_to(kind(tmp_path / "runs" / "x"), every=1)
    folder = accumulator.EventAccumulator(str(tmp_path / "runs" / "x")).Reload()
    assert [event.step for event in folder.Scalars("gradbalance/norms/text")] == [1, 2]
    assert [event.step for event in folder.Scalars("gradbalance/coherences/audio")] == [2]


@pytest.mark.parametrize("writer", [3, None, [], Writer, dict])
def test_what_cannot_be_written_to_is_refused(writer):
    optimizer, step = make_penalty()
    recorder = Recorder(optimizer)
    step()
    with pytest.raises(TypeError, match=r"^`writer` must be a folder, have .* Got .*\. Pass a "):
        recorder.log_to(writer)
