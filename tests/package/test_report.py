"""What a bug report shows: versions, and an optimizer with its groups and rule."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from gradbalance import ConflictAwarePenalty, attach, rules
from gradbalance.report import report

ROOT = Path(__file__).parents[2]
VERSIONS = ["gradbalance", "python", "torch", "numpy", "platform", "CUDA"]


def branches():
    return nn.ModuleDict(
        {"text": nn.Linear(4, 1), "audio": nn.Linear(9, 1), "head": nn.Linear(2, 1)}
    )


def groups_of(model):
    return {name: model[name] for name in ("text", "audio")}


def rows_after_versions(optimizer):
    return report(optimizer).partition("\n\n")[2].splitlines()


def row(optimizer, name):
    return [r.split(None, 1)[1] for r in rows_after_versions(optimizer) if r.split()[0] == name]


def test_the_command_prints_the_versions_and_nothing_else():
    command = [sys.executable, "-m", "gradbalance.report"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    rows = dict(line.split(None, 1) for line in done.stdout.splitlines())
    assert list(rows) == VERSIONS
    assert rows["torch"] == torch.__version__
    assert rows["numpy"] == np.__version__
    assert done.stderr == ""


def test_groups_are_shown_with_their_tensors_and_trainable_entries():
    model = branches()
    model["audio"].weight.requires_grad_(False)
    optimizer = ConflictAwarePenalty(AdamW(model.parameters()), groups_of(model))
    assert row(optimizer, "group") == [
        "text: 2 tensors, 5 trainable entries",
        "audio: 2 tensors, 1 trainable entries",
    ]


def test_the_wrapper_what_it_wraps_and_the_handle_show_the_same_penalty():
    model = branches()
    plain = AdamW(model.parameters())
    wrapper = ConflictAwarePenalty(plain, groups_of(model), rules.ByHand(text=0.5), every=2)
    shown = rows_after_versions(plain)
    assert shown[-3:] == [
        "rule         ByHand(text=0.5)",
        "scaled       the update, by learning rate",
        "options      every=2",
    ]
    assert rows_after_versions(wrapper.penalty) == shown
    assert rows_after_versions(wrapper)[1:] == shown[1:]
    assert row(plain, "optimizer") == ["torch.optim.adamw.AdamW"]
    assert row(wrapper, "optimizer") == [
        "gradbalance.penalty.ConflictAwarePenalty around torch.optim.adamw.AdamW"
    ]


@pytest.mark.parametrize(
    ("options", "scaled"),
    [
        ({"apply_to": "gradient"}, "the gradient"),
        ({"rule": rules.Watch()}, "nothing"),
        ({"apply_to": "displacement"}, "the update, by displacement"),
    ],
)
def test_where_the_coefficients_go_is_shown(options, scaled):
    model = branches()
    optimizer = SGD(model.parameters(), lr=0.1)
    attach(optimizer, groups_of(model), **options)
    assert row(optimizer, "scaled") == [scaled]


def test_a_plain_optimizer_has_no_penalty():
    optimizer = SGD(branches().parameters(), lr=0.1)
    assert rows_after_versions(optimizer) == [
        "optimizer    torch.optim.sgd.SGD",
        "param_groups 1",
        "penalty      none",
    ]


def test_a_handle_whose_optimizer_is_gone_says_so():
    model = branches()
    penalty = attach(SGD(model.parameters(), lr=0.1), groups_of(model))
    assert row(penalty, "optimizer") == ["gone: nothing but the penalty is left"]


def test_what_is_no_optimizer_is_refused():
    with pytest.raises(TypeError, match="`optimizer` must"):
        report(branches())
