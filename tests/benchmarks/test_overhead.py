"""The benchmarks of the overhead: what they time does what it says."""

import json

import pytest
import torch

from benchmarks import _markdown, _timing
from benchmarks.overhead import measure as overhead
from benchmarks.overhead import report as overhead_report
from benchmarks.overhead import rivals, small
from gradbalance import rules


def norm_of(groups):
    return torch.cat([p.grad.flatten() for group in groups.values() for p in group]).norm()


@pytest.mark.parametrize("mode", ["update", "gradient"])
def test_the_step_that_is_timed_acts_every_time(mode):
    groups = overhead.with_gradients(3, 6, 50, "cpu")
    step = overhead.penalty(groups, overhead.MODES[f"{mode} + max_norm"])
    for _ in range(3):
        overhead.renewal(groups)()
        assert norm_of(groups) > 1.005 * rivals.MAX_NORM
        step()
        assert norm_of(groups) == pytest.approx(rivals.MAX_NORM, rel=2e-3)


def test_busy_scaling_leaves_the_last_group_alone_and_no_other():
    groups = overhead.with_gradients(3, 3, 50, "cpu")
    before = [float(p.grad.norm()) for group in groups.values() for p in group]
    overhead.penalty(groups, overhead.MODES["gradient"])()
    after = [float(p.grad.norm()) for group in groups.values() for p in group]
    assert [a < b for a, b in zip(after, before, strict=True)] == [True, True, False]


@pytest.mark.parametrize(
    ("most", "optimizer", "options"),
    [
        (3, "AdamW", {}),
        (3, "AdamW", {"rule": rules.Watch()}),
        (5, "AdamW", {"rule": rules.ByHand(a=0.5)}),
        (3, "SGD", {}),
        (4, "SGD", {"apply_to": "gradient"}),
        (16, "SGD", {"width": 512}),
        (17, "SGD", {"width": 512, "apply_to": "gradient"}),
    ],
)
def test_a_step_dispatches_no_more_operators_than_are_told(most, optimizer, options):
    assert len(small.operators(optimizer, **options)) <= most


@pytest.mark.parametrize("n_groups", [2, 3, 7])
def test_gradients_are_dealt_to_all_groups(n_groups):
    groups = overhead.with_gradients(n_groups, 10, 4, "cpu")
    assert sum(len(group) for group in groups.values()) == 10
    assert min(len(group) for group in groups.values()) == 10 // n_groups


def test_zclip_clips_an_outlier_and_nothing_else():
    groups = overhead.with_gradients(2, 4, 50, "cpu")
    parameters = [p for group in groups.values() for p in group]
    clip = rivals.ZClip(parameters, warm_up=4)
    for scale in (1.0, 1.1, 0.9, 1.05):
        for p in parameters:
            p.grad.fill_(scale)
        clip()
        assert norm_of(groups) == pytest.approx(scale * 200**0.5)
    for p in parameters:
        p.grad.fill_(100.0)
    clip()
    assert norm_of(groups) < 2 * 200**0.5


def test_ogm_ge_damps_the_better_branch_alone():
    torch.manual_seed(0)
    groups = overhead.with_gradients(2, 2, 10_000, "cpu")
    before = {name: group[0].grad.clone() for name, group in groups.items()}
    rivals.OGMGE(groups, alpha=1.0)([torch.tensor(3.0), torch.tensor(1.0)])
    for (name, (p,)), factor in zip(
        groups.items(), (1 - torch.tanh(torch.tensor(3.0)), 1.0), strict=True
    ):
        noise = p.grad - factor * before[name]
        assert float((noise * before[name]).mean()) == pytest.approx(0, abs=0.05)
        assert float(noise.std()) == pytest.approx(float(before[name].std()), rel=0.05)


def test_the_peak_of_memory_is_that_of_what_is_held_at_once():
    def call():
        for _ in range(3):
            torch.empty(1000)
        return torch.empty(500)

    assert 4000 <= _timing.peak_memory(call, "cpu") < 8000


def test_ratios_are_taken_within_a_round():
    times = {"a": torch.tensor([1.0, 10.0, 100.0]), "b": torch.tensor([2.0, 20.0, 200.0])}
    assert _timing.ratios(times, "a")["b"] == pytest.approx([2.0, 2.0, 2.0])


@pytest.mark.parametrize(
    ("results", "shown"),
    [
        ({}, _markdown.NOT_RUN),
        ({"part": {}}, _markdown.NOT_RUN),
        ({"part": {"error": "no"}}, _markdown.FAILED),
        ({"part": {"figure": {"error": "no"}}}, _markdown.FAILED),
        ({"part": {"figure": 0.5}}, "0.5"),
    ],
)
def test_a_cell_holds_the_figure_of_the_gpu_or_says_why_it_does_not(results, shown):
    assert _markdown.cell(results, ("part", "figure"), str) == shown


def test_the_reports_show_what_the_gpu_gave():
    figures = json.loads(overhead_report.JSON.read_text())
    assert overhead_report.report(figures, {}).count(_markdown.NOT_RUN) == 12
    on_gpu = {
        "operations": figures["operations"],
        "steps": {"steps": [*figures["steps"], {"error": "no"}]},
    }
    shown = overhead_report.report(figures, on_gpu)
    assert shown.count(_markdown.NOT_RUN) == 5
    for row in shown.splitlines():
        if row.startswith(("| whole step /", "| gradient mode")):
            assert row.split(" | ")[2] == row.removesuffix(" |").split(" | ")[4]
