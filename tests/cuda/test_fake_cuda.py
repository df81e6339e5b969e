"""Steps on CUDA devices, simulated on the CPU: the host never waits, and little is launched."""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from tests.cuda.scenarios import AT_ONCE, DEFAULT, FREE, SCENARIOS, WAITING

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or torch.version.cuda is not None,
    reason="The simulation is made for the wheel of torch without CUDA, on Linux.",
)


@pytest.fixture(scope="module")
def shown():
    command = [sys.executable, "-m", "tests.cuda.scenarios"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def trained(shown, name):
    return shown["trained"][name]


def waits(steps):
    return [step["waits"] for step in steps]


def operators(steps):
    return [len(step["operators"]) for step in steps]


def coefficients(steps):
    return [step["coefficients"] for step in steps]


@pytest.mark.parametrize("name", WAITING)
def test_the_simulation_sees_what_waits(shown, name):
    assert len(shown["waits"][name]) == 1


@pytest.mark.parametrize("name", FREE)
def test_the_simulation_sees_no_wait_in_what_does_not(shown, name):
    assert shown["waits"][name] == []


def test_numbers_arrive_when_their_event_was_waited_for(shown):
    assert shown["transfer"] == {"early": "[nan, nan]", "waited": [1.0, 1.0]}


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_penalty_never_waits_for_the_device(trained, name):
    assert waits(trained["late"]) == waits(trained["plain"])


@pytest.mark.parametrize("name", DEFAULT)
def test_a_plain_step_does_not_wait_either(trained, name):
    assert not any(waits(trained["plain"]))


@pytest.mark.parametrize("name", DEFAULT)
def test_the_default_rule_launches_at_most_25_operators(trained, name):
    both = zip(operators(trained["late"]), operators(trained["plain"]), strict=True)
    _, *added = [with_penalty - plain for with_penalty, plain in both]  # the first step sets up
    assert max(added) <= 25


@pytest.mark.parametrize("name", SCENARIOS)
def test_coefficients_are_those_of_the_cpu_one_step_late(trained, name):
    both = zip(coefficients(trained["late"]), coefficients(trained["on the CPU"]), strict=True)
    for here, there in both:
        assert here == pytest.approx(there, rel=1e-4)


@pytest.mark.parametrize("name", AT_ONCE)
def test_a_decision_at_once_waits_once_at_each_measured_step_alone(trained, name):
    every = SCENARIOS[name].options.get("every", 1)
    both = zip(waits(trained["at once"]), waits(trained["plain"]), strict=True)
    added = [len(here) - len(plain) for here, plain in both]
    assert added == [int(step % every == 0) for step in range(len(added))]


@pytest.mark.parametrize("name", DEFAULT)
def test_a_decision_at_once_is_that_of_the_next_step(trained, name):
    at_once = coefficients(trained["at once"])
    late = coefficients(trained["late"])
    for before, here in zip(at_once[:-1], late[1:], strict=True):
        assert here == pytest.approx(before, rel=1e-6)


@pytest.mark.parametrize("name", [name for name in SCENARIOS if name != "watched"])
def test_some_step_is_scaled(trained, name):
    assert any(a != b for step in coefficients(trained["late"]) for a, b in pairwise(step))


def test_recording_launches_at_most_25_operators_more(shown):
    """Three branches of a matrix and a bias: the fewer tensors, the fewer."""
    trained = shown["trained"]
    both = zip(
        operators(trained["recorded"]["late"]), operators(trained["AdamW"]["late"]), strict=True
    )
    _, *added = [recorded - unrecorded for recorded, unrecorded in both]
    assert 0 < max(added) <= 25
