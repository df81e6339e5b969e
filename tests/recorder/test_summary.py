"""The summary: what it says of each group, over how many steps whatever, and what it warns of."""

import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from gradbalance import ConflictAwarePenalty, Recorder, attach, groups_by_name, rules
from gradbalance import recorder as recorders
from tests.recorder.runs import make_penalty

WATCH = rules.Watch()


def run(steps=20, seed=0, **options):
    """A recorder of steps whose gradients vary in size and sign."""
    optimizer, step = make_penalty(**options)
    recorder = Recorder(optimizer)
    generator = np.random.default_rng(seed)
    for scale in generator.normal(0.5, 1.0, size=steps):
        step(scale)
    return recorder


@pytest.mark.parametrize("steps", [3, 63, 65, 150])
def test_the_rows_are_means_over_the_record(steps):
    recorder = run(steps, rule=lambda m: m.shares.min() / m.shares, smoothing=0.5)
    record = recorder.to_dict()
    summary = recorder.summary()
    assert summary.recorded == summary.counted == steps
    shares = record["norms"] / record["norms"].sum(1, keepdims=True)
    cosines = record["cosines"][1:]
    for m, name in enumerate(("text", "audio")):
        row = summary.rows[name]
        assert row[:4] == (5, 5, 5, steps)
        assert row.moved == pytest.approx(record["moved"][1:, m].mean())
        assert row.norm_share == pytest.approx(shares[:, m].mean())
        assert row.useful_share == pytest.approx((cosines * shares[1:])[:, m].mean())
        a = cosines[:, m].mean()
        assert row.coherence == pytest.approx(a)
        error = cosines[:, m].std() / math.sqrt(steps - 2) if steps > 3 else math.inf
        assert row.coherence_error == pytest.approx(error)
        assert row.noise_scale == pytest.approx((1 - a) / a if a > 0 else math.inf)
        assert row.coefficient == pytest.approx(record["coefficients"][:, m].mean())
        assert row.coefficient_spread == pytest.approx(record["coefficients"][:, m].std())
        assert math.isnan(row.proposed)


def test_of_a_watched_rule_the_proposals_are_in_the_table():
    watched = run(rule=rules.Watch(rules.ByHand(text=0.25))).summary()
    assert watched.rows["text"].proposed == pytest.approx(0.25)
    assert watched.rows["text"].coefficient == 1.0
    assert "proposed" in str(watched)
    assert "proposed" not in str(run(rule=WATCH).summary())
    assert "proposed" not in str(run(rule=rules.ByHand(text=0.25)).summary())


def test_the_table_has_a_line_for_each_group_and_one_for_the_steps():
    optimizer, step = make_penalty(rule=rules.ByHand(text=0.5), gains=(10.0, 0.0))
    recorder = Recorder(optimizer)
    step()
    header, text, audio, steps, *warned = str(recorder.summary()).splitlines()
    assert header.split()[:4] == ["parameters", "trainable", "in", "optimizer"]
    assert text.split() == ["text", "5", "all", "all", "all", *"------"]
    assert audio.split() == ["audio", "5", "all", "all", "none", *"------"]
    assert steps == "1 steps, of which 0 counted"
    assert all(line.startswith("! ") for line in warned)
    assert len(header) == len(text) == len(audio)


def test_a_rule_that_needs_no_coherence_has_none_in_the_table():
    row = run(rule=rules.ConflictAware()).summary().rows["text"]
    assert all(map(math.isnan, (row.useful_share, row.coherence, row.noise_scale)))
    assert row.norm_share == pytest.approx(10 / 11)


@pytest.mark.parametrize("rule", [WATCH, rules.Watch(rules.Useful()), rules.Watch(lambda m: [])])
def test_one_group_alone_can_be_watched(rule, tmp_path):
    recorder = run(names=("all",), gains=(1.0,), rule=rule)
    summary = recorder.summary()
    assert summary.counted == 20
    assert summary.rows["all"].norm_share == 1.0
    assert summary.rows["all"].moved > 0
    recorder.plot(tmp_path / "figure.png")


@pytest.mark.parametrize("rule", [rules.Useful(), rules.ByHand(all=0.5)])
def test_one_group_alone_cannot_be_balanced(rule):
    with pytest.raises(ValueError, match=r"at least two groups\. Got 1\. .*rules\.Watch\(\)"):
        make_penalty(names=("all",), gains=(1.0,), rule=rule)


@pytest.mark.parametrize("rule", [WATCH, rules.Watch(rules.ConflictAware()), rules.Useful()])
def test_a_step_with_a_gradient_in_one_of_two_groups_does_not_count(rule):
    optimizer, step = make_penalty(gains=(1.0, 0.0), rule=rule)
    recorder = Recorder(optimizer)
    for _ in range(4):
        step()
    assert optimizer.balance.step == 0
    assert recorder.summary().counted == 0


# A memory that does not grow.


def norms_of(steps):
    return 2.0 + np.sin(np.arange(steps))


def long_run(steps, monkeypatch, longest=128):
    monkeypatch.setattr(recorders, "LONGEST", longest)
    optimizer, _ = make_penalty()
    recorder = Recorder(optimizer)
    for norm in norms_of(steps):
        optimizer.coefficients_for({"text": norm, "audio": 1.0})
    return recorder


@pytest.mark.parametrize("steps", [128, 129, 1000])
def test_of_a_long_record_one_of_2_4_8_steps_is_kept_and_the_summary_is_of_all(steps, monkeypatch):
    recorder = long_run(steps, monkeypatch)
    at = recorder.to_dict()["step"] - 1
    assert len(at) <= 128
    distances = set(np.diff(at).tolist())
    assert len(distances) == 1
    assert distances.pop() in (1, 2, 4, 8, 16, 32)
    assert at[0] == 0
    assert at[-1] > 0.95 * steps - 1
    np.testing.assert_allclose(recorder.to_dict()["norms"][:, 0], norms_of(steps)[at])
    summary = recorder.summary()
    assert summary.recorded == steps
    norms = norms_of(steps)
    assert summary.rows["text"].norm_share == pytest.approx((norms / (norms + 1)).mean())


def test_a_record_takes_no_more_memory_however_long_it_is(monkeypatch):
    def bytes_of(recorder):
        held = [value for value in vars(recorder).values() if isinstance(value, np.ndarray)]
        return sum(array.nbytes for array in held)

    assert bytes_of(long_run(300, monkeypatch)) == bytes_of(long_run(2000, monkeypatch))


def test_a_long_record_is_logged_at_the_distance_asked_for_or_the_next_that_is_there(monkeypatch):
    recorder = long_run(1000, monkeypatch)  # one of 8 or 16 steps is kept
    lines = []
    recorder.log_to(lines.append, every=50)
    steps = [line["gradbalance/step"] for line in lines]
    assert steps[0] == 1
    assert 50 <= min(np.diff(steps)) == max(np.diff(steps)) <= 64


# What it warns of.


def branches():
    return nn.ModuleDict({name: nn.Linear(4, 3) for name in ("text", "audio", "visual")})


def warned(model, groups, optimizer, steps=3, forward=None, rule=WATCH):
    """The warnings of a summary, after some steps."""
    attach(optimizer, groups, rule)
    recorder = Recorder(optimizer)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(8, 4, generator=generator)
        forward = forward or (lambda x: sum(branch(x) for branch in model.values()))
        forward(x).square().mean().backward()
        optimizer.step()
    return recorder.summary().warnings


def adamw(parameters, **options):
    return torch.optim.AdamW(parameters, lr=1e-3, **options)


def test_nothing_is_warned_of_where_nothing_is_wrong():
    model = branches()
    assert warned(model, dict(model), adamw(model.parameters())) == []


@pytest.mark.parametrize("by_name", [False, True])
def test_parameters_that_are_in_no_optimizer_are_named(by_name):
    model = branches()
    held = [p for name, p in model.named_parameters() if name != "audio.bias"]
    groups = dict(model)
    if by_name:
        groups = groups_by_name(model, text="text", audio="audio", visual="visual")
    with pytest.warns(UserWarning, match=r"does not have 1 of the 2 .* `audio`, .* audio\.bias\. "):
        (message,) = warned(model, groups, adamw(held))
    assert message == (
        "`audio` has trainable parameters that are not in the optimizer: 1, the first being "
        "audio.bias. Add them to the optimizer, or freeze them."
    )


def test_a_branch_that_is_in_no_optimizer_at_all_is_refused_by_name():
    model = branches()
    optimizer = adamw([*model["text"].parameters(), *model["audio"].parameters()])
    with pytest.raises(ValueError, match=r"^`groups\['visual'\]` must hold parameters of the opt"):
        ConflictAwarePenalty(optimizer, dict(model), WATCH)


def test_parameters_that_join_the_optimizer_later_are_not_missed():
    model = branches()
    model["audio"].bias.requires_grad_(False)
    optimizer = adamw([p for p in model.parameters() if p.requires_grad])
    attach(optimizer, dict(model), WATCH)
    recorder = Recorder(optimizer)
    row = recorder.summary().rows["audio"]
    assert (row.parameters, row.trainable, row.in_optimizer) == (15, 12, 12)
    model["audio"].bias.requires_grad_(True)
    assert "audio.bias" in recorder.summary().warnings[0]
    optimizer.add_param_group({"params": [model["audio"].bias]})
    row = recorder.summary().rows["audio"]
    assert (row.parameters, row.trainable, row.in_optimizer) == (15, 15, 15)
    assert not any("audio.bias" in message for message in recorder.summary().warnings)


def test_a_frozen_branch_is_named():
    model = branches()
    model["visual"].requires_grad_(False)
    with pytest.warns(UserWarning, match="No parameter of group `visual` requires a gradient"):
        (message,) = warned(model, dict(model), adamw(model.parameters()))
    assert message == "`visual` is frozen: none of its parameters requires a gradient."


def test_a_branch_whose_output_is_not_used_is_named():
    model = branches()

    def forward(x):
        return model["text"](x) + model["audio"](x)

    (message,) = warned(model, dict(model), adamw(model.parameters()), forward=forward)
    assert message.startswith("`visual` is in the optimizer but never had a gradient")


@pytest.mark.parametrize("cause", ["rate", "dtype"])
def test_a_branch_that_has_gradients_and_does_not_move_is_named(cause):
    model = branches()
    rate = 0.0
    if cause == "dtype":
        rate = 1e-5  # of which bfloat16 keeps nothing beside 1
        for p in model["text"].parameters():
            p.data = torch.ones_like(p, dtype=torch.bfloat16)
    others = [*model["audio"].parameters(), *model["visual"].parameters()]
    optimizer = adamw([{"params": model["text"].parameters(), "lr": rate}, {"params": others}])

    def forward(x):
        text = model["text"](x.to(model["text"].weight.dtype)).float()
        return text + model["audio"](x) + model["visual"](x)

    (message,) = warned(model, dict(model), optimizer, forward=forward)
    assert message.startswith("`text` has gradients but does not move. Is its learning rate 0")


def test_a_branch_that_is_not_to_move_is_not_warned_of():
    model = branches()
    rule = rules.ByHand(text=0.0)
    assert warned(model, dict(model), adamw(model.parameters()), rule=rule) == []


def test_branches_that_move_at_very_different_rates_are_named():
    model = branches()
    rates = {"text": 3e-2, "audio": 1e-3, "visual": 1e-4}
    param_groups = [{"params": model[name].parameters(), "lr": lr} for name, lr in rates.items()]
    (message,) = warned(model, dict(model), adamw(param_groups))
    assert message.startswith("`text` moves ")
    assert " times as far as `visual` beside the size" in message


@pytest.mark.parametrize(
    ("scales", "gains", "why"),
    [
        ((), (1.0, 1.0), "No step was recorded."),
        ((math.nan, 1.0), (math.inf, 1.0), "2 of 2 had gradients that are not finite."),
        ((1.0,), (1.0, 0.0), "None of 1 had a gradient in two groups."),
    ],
    ids=["none", "not finite", "one group"],
)
def test_that_no_step_counted_is_said_with_the_reason(scales, gains, why, tmp_path):
    optimizer, step = make_penalty(gains=gains)
    recorder = Recorder(optimizer)
    for scale in scales:
        step(scale)
    summary = recorder.summary()
    assert summary.counted == 0
    assert why in summary.warnings[-1]
    assert why in str(summary)
    with pytest.raises(RuntimeError, match=r"^`Recorder` must have seen a step that counted\. "):
        recorder.plot(tmp_path / "never.png")


def test_steps_with_errors_that_are_not_finite_do_not_count():
    optimizer, step = make_penalty()
    recorder = Recorder(optimizer)
    for error in (1.0, math.nan, 2.0):
        optimizer.observe(text=error, audio=1.0)
        step()
    assert (recorder.summary().recorded, recorder.summary().counted) == (3, 2)


def test_a_summary_is_made_of_plain_numbers():
    summary = run(rule=rules.Watch(rules.Useful())).summary()
    with warnings.catch_warnings(action="error"):
        for row in summary.rows.values():
            assert {type(value) for value in row} == {int, float}
