"""The benchmarks for a GPU, in miniature on the CPU: each part in a process of its own, whatever becomes of the others."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import _markdown
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import loops, parts
from benchmarks.moments import measure as moments
from benchmarks.moments.report import TRITON
from benchmarks.overhead import measure as overhead
from tests.cuda.scenarios import SCENARIOS

ROOT = Path(__file__).parents[2]


def run(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip


def test_a_part_that_dies_leaves_its_error_and_the_others_go_on(tmp_path):
    done = run("--smoke", "--out", str(tmp_path), "environment", "fault", "operations")
    assert done.returncode == 0, done.stderr
    found = _markdown.gpu_results(tmp_path)
    assert set(found) == {"environment", "fault", "operations"}
    assert found["environment"]["torch"] == torch.__version__
    assert found["fault"]["error"].startswith("died with exit code -")
    assert found["operations"]["ratios"][overhead.CLIP] == [1.0, 1.0, 1.0]
    assert [line.split(":")[0] for line in done.stderr.splitlines()][:2] == ["environment", "fault"]


def test_a_part_that_takes_too_long_is_stopped_and_says_so(tmp_path):
    error = command.run("environment", tmp_path, 0.01, ["--smoke"])
    assert error == "took longer than 0 s"
    assert _markdown.gpu_results(tmp_path) == {"environment": {"error": error}}


def test_every_part_is_measured_by_some_function_and_triton_comes_last():
    assert {*command.SECONDS, command.FAULT} == set(parts.parts("cpu", is_smoke=True))
    assert list(command.SECONDS)[-1] == "triton"
    assert sum(command.SECONDS.values()) <= 15 * 60


@pytest.mark.parametrize("name", loops.MODELS)
def test_a_loop_measures_every_variant(name):
    found = loops.measure_loop(name, "cpu", is_smoke=True)
    for quantity in ("step_us", "ratios", "peak_bytes"):
        assert set(found[quantity]) == set(loops.VARIANTS)
    assert found["ratios"]["plain"] == [1.0, 1.0, 1.0]
    assert min(low for low, _, _ in found["step_us"].values()) > 0
    assert (found["trained"] < found["parameters"]) == (name == "loop LoRA")


def test_the_kernels_are_measured_apart_from_what_torch_compiles_and_runs_as_it_is():
    rivals = {"moments": moments.EAGER, "compiled": moments.COMPILED, "triton": moments.FUSED}
    cases = {part: {name for names in of for name in names} for part, of in rivals.items()}
    assert [part for part, names in cases.items() if TRITON in names] == ["triton"]
    assert not any("compiled" in name for name in cases["moments"])


def test_the_moments_are_measured_without_those_that_fail(monkeypatch):
    monkeypatch.setattr(moments, "in_triton", lambda call: lambda: 1 / 0)
    rivals = (("naive, masked", TRITON), ("moments, masked", TRITON))
    found = moments.measure_size((200, 600), "cpu", torch.float32, 1, rivals)
    assert found["cases"][TRITON] == {"error": "ZeroDivisionError: division by zero"}
    assert {"naive, masked", "moments, masked"} < set(found["cases"])


def test_the_steps_and_host_times_are_those_of_every_mode():
    assert set(parts.steps("cpu")[0]) == {*parts.MODES, "update, AdamW with tensor lr"}
    found = parts.host_times(2, 4, "cpu", rounds=2)
    assert set(found) == {overhead.CLIP, *parts.MODES, "update, defaults"}


def test_the_rule_that_is_timed_is_one_of_those_that_are_seen_not_to_wait():
    timed = {type(options["rule"]) for options in overhead.MODES.values() if "rule" in options}
    seen = {type(scenario.options.get("rule")) for scenario in SCENARIOS.values()}
    assert timed <= seen


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_command_says_in_one_line_that_there_is_no_gpu():
    done = run()
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "CUDA" in done.stderr
