"""Checkpoints: by the names of the groups and of the rule, through files, torch.distributed.checkpoint and a kill."""

import copy
import io
import os
import signal
import sys
from multiprocessing import get_context

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from gradbalance import ConflictAwarePenalty, attach, rules
from tests.contract.oracle import (
    SMOOTHING,
    Toy,
    assert_same_coefficients,
    assert_same_parameters,
    groups_of,
    loss_of,
    put_on,
    refused,
    train,
)
from tests.contract.own_rules import RULES, Tiring
from tests.contract.promises import saved

each_rule = pytest.mark.parametrize("rule", RULES)


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=0.02)


def build(rule, order=("text", "audio", "visual"), **options):
    model = Toy()
    groups = {name: groups_of(model)[name] for name in order}
    return model, ConflictAwarePenalty(
        adamw(model), groups, RULES[rule][0](), smoothing=SMOOTHING, **options
    )


@each_rule
def test_groups_in_another_order_are_matched_by_name(rule):
    model, optimizer = build(rule)
    train(model, optimizer, range(3))
    resumed, other = build(rule, order=("visual", "text", "audio"))
    weights, state = saved(model, optimizer)
    resumed.load_state_dict(weights)
    other.load_state_dict(state)
    assert other.balance.names == ("visual", "text", "audio")
    assert_same_coefficients(
        train(resumed, other, range(3, 6)), train(model, optimizer, range(3, 6))
    )
    assert_same_parameters(resumed, model)


def renamed(model):
    return {"text": model.text, "sound": model.audio, "visual": model.visual}


def fewer(model):
    return {"text": model.text, "audio": model.audio}


@pytest.mark.parametrize("way", ["loaded", "wrapped after loading"])
@pytest.mark.parametrize(
    ("groups", "rule", "message"),
    [
        (
            renamed,
            Tiring(),
            "must hold the state of the groups text, sound, visual. Got text, audio, visual",
        ),
        (fewer, Tiring(), "must hold the state of the groups text, audio. Got text, audio, visual"),
        (
            groups_of,
            rules.ConflictAware(),
            "must be of the rule `ConflictAware`. Got that of `Tiring`",
        ),
        (groups_of, lambda m: m.norms, "must be of the rule `<lambda>`. Got that of `Tiring`"),
    ],
)
def test_a_checkpoint_of_other_groups_or_another_rule_is_refused_and_changes_nothing(
    way, groups, rule, message, record_property
):
    model, optimizer = build("own")
    train(model, optimizer, range(3))
    weights, state = saved(model, optimizer)

    other = Toy()
    other.load_state_dict(weights)
    plain = adamw(other)
    if way == "loaded":
        penalised = ConflictAwarePenalty(plain, groups(other), rule)
        train(other, penalised, range(1), observe=False)
        [before] = saved(penalised)
        with refused(record_property, ValueError, message):
            penalised.load_state_dict(state)
        torch.testing.assert_close(penalised.state_dict()["state"], before["state"], rtol=0, atol=0)
        assert penalised.state_dict()["param_groups"] == before["param_groups"]
    else:
        plain.load_state_dict(state)
        with refused(record_property, ValueError, message):
            ConflictAwarePenalty(plain, groups(other), rule)
        again = put_on(plain, other, rule="own")  # nothing was lost by the attempt
        assert train(other, again, range(3, 6)) == train(model, optimizer, range(3, 6))
        assert_same_parameters(other, model, tolerance=0)


def test_without_persist_checkpoints_are_those_of_the_plain_optimizer():
    model, optimizer = build("own", persist=False)
    train(model, optimizer, range(2))
    plain = adamw(model)
    assert set(optimizer.state_dict()["param_groups"][0]) == set(
        plain.state_dict()["param_groups"][0]
    )

    _, persistent = build("conflicts")
    train(Toy(), persistent, range(2))
    optimizer.load_state_dict(
        persistent.state_dict()
    )  # of another rule: what it remembers is passed over
    assert optimizer.balance.step == 2
    assert (
        optimizer.optimizer.state_dict()["param_groups"][0].keys()
        == plain.state_dict()["param_groups"][0].keys()
    )


def states(model, optimizer, options):
    weights, moments = get_state_dict(model, optimizer, options=options)
    return {"model": weights, "optimizer": moments}


def loaded_by_template(path, model, optimizer, options):
    """As documented: into what the live objects give."""
    state = states(model, optimizer, options)
    dcp.load(state, checkpoint_id=path)
    return state


def loaded_whole(path, model, optimizer, options):
    """From one file, by a process that never asks the live objects for a state_dict."""
    dcp_to_torch_save(path, path / "whole")
    return torch.load(path / "whole", weights_only=True)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@each_rule
@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize(
    ("before", "load"), [(1, loaded_by_template), (3, loaded_by_template), (3, loaded_whole)]
)
def test_distributed_checkpoints_resume_in_a_fresh_process(rule, flatten, before, load, tmp_path):
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, optimizer = build(rule)
    train(model, optimizer, range(before))
    optimizer.zero_grad()
    dcp.save(states(model, optimizer, options), checkpoint_id=tmp_path)
    resumed, other = build(rule)
    keys = set(other.param_groups[0])
    state = load(tmp_path, resumed, other, options)
    set_state_dict(
        resumed,
        other,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=options,
    )
    assert train(resumed, other, range(before, 6)) == train(model, optimizer, range(before, 6))
    assert_same_parameters(resumed, model, tolerance=0)
    assert set(other.param_groups[0]) == keys


def train_until_killed(rule, every, path):
    """Saves after each of three steps, and dies in the fourth."""
    model, optimizer = build(rule, every=every)
    for step in range(4):
        if step == 3:
            loss_of(model, step).backward()
            optimizer.optimizer.register_step_post_hook(
                lambda *_: os.kill(os.getpid(), signal.SIGKILL)
            )
        train(model, optimizer, [step])
        torch.save([model.state_dict(), optimizer.state_dict()], path)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows neither forks nor has SIGKILL.")
@each_rule
@pytest.mark.parametrize("every", [1, 2])
def test_a_killed_run_resumes_bit_for_bit(rule, every, tmp_path):
    process = get_context("fork").Process(
        target=train_until_killed, args=(rule, every, tmp_path / "last")
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    weights, state = torch.load(tmp_path / "last", weights_only=True)
    resumed, other = build(rule, every=every)
    resumed.load_state_dict(weights)
    other.load_state_dict(state)
    model, optimizer = build(rule, every=every)
    whole = train(model, optimizer, range(7))
    assert train(resumed, other, range(3, 7)) == whole[3:]
    assert_same_parameters(resumed, model, tolerance=0)


def test_a_checkpoint_taken_before_the_first_step_takes_a_running_optimizer_back_to_it():
    model, optimizer = build("coherence")
    weights, state = saved(model, optimizer)
    fresh, other = build("coherence")
    train(model, optimizer, range(3))
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    assert_same_coefficients(train(model, optimizer, range(2)), train(fresh, other, range(2)))
    torch.testing.assert_close(
        optimizer.balance.coherences, other.balance.coherences, equal_nan=True
    )


DAMAGE = {
    "a mean": lambda saved: saved["groups"]["text"].update(share=3),
    "values of a mean": lambda saved: saved["groups"]["text"].update(share=["a", "b", "c"]),
    "a coefficient": lambda saved: saved["groups"]["text"].update(decided="x"),
    "a negative coefficient": lambda saved: saved["groups"]["text"].update(decided=-5.0),
    "a coefficient of NaN": lambda saved: saved["groups"]["text"].update(decided=float("nan")),
    "the groups": lambda saved: saved.update(groups=[]),
    "a mean of NaN": lambda saved: saved["groups"]["text"].update(useful=[float("nan"), 0.0, 1]),
    "a number of values below 0": lambda saved: saved["groups"]["text"].update(share=[0.5, 0, -1]),
    "a number of values of NaN": lambda saved: saved["groups"]["text"].update(
        share=[0.5, 0.0, float("nan")]
    ),
    "a number beyond all floats": lambda saved: saved["groups"]["text"].update(decided=10**400),
    "no group": lambda saved: saved.update(groups={}),
    "whether there were errors": lambda saved: saved.update(errors=torch.ones(2)),
    "observed errors of three parts": lambda saved: saved.update(observed={"text": (1, 2, 3)}),
    "observed errors that are complex": lambda saved: saved.update(observed={"text": (1j, 1)}),
    "observed errors in a tensor": lambda saved: saved.update(
        observed={"text": (torch.ones(2), 1)}
    ),
    "infinitely many observed errors": lambda saved: saved.update(
        observed={"text": (1.0, float("inf"))}
    ),
    "the step": lambda saved: saved.update(step="x"),
    "the phase": lambda saved: saved.update(phase=None),
    "the sketch": lambda saved: saved.update(sketch="x"),
    "no sketch": lambda saved: saved.update(sketch=None),
    "a group of the sketch": lambda saved: saved["sketch"].update(text={}),
    "entries of the sketch": lambda saved: saved["sketch"]["text"].update(entries="f4:x"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("late", [None, True])
def test_a_damaged_checkpoint_is_refused_and_the_run_goes_on_as_before(damage, late):
    model, twin = Toy(), Toy()
    optimizer, other = (
        put_on(torch.optim.AdamW(m.parameters(), lr=0.02), m, rule="coherence", late=late)
        for m in (model, twin)
    )
    train(model, optimizer, range(3))
    train(twin, other, range(3))
    state = copy.deepcopy(optimizer.state_dict())
    damage(state["param_groups"][0]["gradbalance"][0])
    with pytest.raises(ValueError, match=r"`state_dict` must hold .*\. Got .*\. Load a checkpoint"):
        optimizer.load_state_dict(state)
    train(model, optimizer, range(3, 6))
    train(twin, other, range(3, 6))
    assert_same_parameters(model, twin, 0)


def test_a_rule_that_refuses_its_own_state_leaves_everything_and_blocks_nothing():
    class Picky:
        needs_coherence = False

        def __call__(self, measured):
            return measured.shares.min() / measured.shares

        def state_dict(self):
            return {"n": 1}

        def load_state_dict(self, state):
            if "n" not in state:
                raise LookupError("no n")

    model = Toy()
    optimizer = put_on(torch.optim.SGD(model.parameters(), lr=0.02), model, rule=Picky())
    train(model, optimizer, range(2))
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0]["gradbalance"][0]["rule_state"] = {}
    before = optimizer.balance
    with pytest.raises(LookupError, match="no n"):
        optimizer.load_state_dict(state)
    assert optimizer.balance.shares.tolist() == before.shares.tolist()
    train(model, optimizer, range(2, 4))
    assert optimizer.balance.step == 4


def test_a_checkpoint_holds_builtin_types_whatever_kind_of_integer_the_options_are():
    model = Toy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    penalty = put_on(
        optimizer, model, by=attach, every=np.int64(4), window=(np.int64(0), np.int64(9))
    )
    train(model, optimizer, range(3), penalty=penalty)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("every", [1, 2])
def test_errors_observed_since_the_last_measured_step_are_in_the_checkpoint(every):
    def errors_are_seen(resumed):
        model = Toy()
        optimizer = put_on(torch.optim.SGD(model.parameters(), lr=0.02), model, every=every)
        train(model, optimizer, range(2))
        loss_of(model, 2).backward()
        optimizer.observe(text=1.0, audio=3.0)
        if resumed:
            state = copy.deepcopy(optimizer.state_dict())
            other = Toy()
            other.load_state_dict(model.state_dict())
            fresh = put_on(torch.optim.SGD(other.parameters(), lr=0.02), other, every=every)
            fresh.load_state_dict(state)
            for p, q in zip(other.parameters(), model.parameters(), strict=True):
                p.grad = q.grad
            model, optimizer = other, fresh
        optimizer.step()
        return optimizer.balance.errors.tolist()

    assert repr(errors_are_seen(True)) == repr(errors_are_seen(False))
