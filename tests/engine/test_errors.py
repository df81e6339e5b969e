"""Every message that a user can meet: the kind of the error, and `what` must be how. Got what. What to do."""

import re

import pytest
import torch
from torch import nn

from examples import mistakes
from gradbalance import ConflictAwarePenalty, Recorder, attach, groups_by_name

TEMPLATE = re.compile(r"(`[^`]+`|The optimizer) must [^`]*?\. Got .+?\. [A-Z`].+[.?]$", re.DOTALL)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.text, self.audio, self.head = nn.Linear(2, 3), nn.Linear(4, 3), nn.Linear(3, 1)


def make(groups=None, optimizer=None, **options):
    model = Model()
    groups = {"text": model.text, "audio": model.audio} if groups is None else groups(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1) if optimizer is None else optimizer(model)
    return ConflictAwarePenalty(optimizer, groups, **options)


def tie(model):
    model.head.weight = model.text.weight = nn.Parameter(torch.zeros(1, 3))
    return {"text": model.text, "head": model.head}


def of_another_model(model):
    return {"text": model.text, "audio": [*Model().audio.parameters()]}


def consumed(model):
    parameters = model.text.parameters()
    list(parameters)
    return {"text": parameters, "audio": model.audio}


def wrapped_twice(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attach(optimizer, {"text": model.text, "audio": model.audio})
    return optimizer


def flattened(model):
    model.text.weight._fsdp_flattened = True
    return {"text": model.text, "audio": model.audio}


def without_rate(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.param_groups[0]["lr"] = None
    return optimizer


AT_CONSTRUCTION = {
    "groups of a kind that has no names": (
        lambda: make(lambda model: [model.text, model.audio]),
        TypeError,
        "`groups` must map names to modules or parameters. Got list.",
    ),
    "one group": (
        lambda: make(lambda model: {"text": model.text}),
        ValueError,
        "`groups` must hold at least two groups. Got 1.",
    ),
    "a name that is no string": (
        lambda: make(lambda model: {0: model.text, 1: model.audio}),
        TypeError,
        "`groups` must have string names. Got 0.",
    ),
    "a consumed generator": (
        lambda: make(consumed),
        ValueError,
        "`groups['text']` must hold at least one parameter. Got none. Was a generator already consumed",
    ),
    "tied weights": (
        lambda: make(tie),
        ValueError,
        "`groups` must be disjoint. Got head.weight, shape (1, 3), which is also text.weight.",
    ),
    "parameters of another model": (
        lambda: make(of_another_model),
        ValueError,
        "`groups['audio']` must hold parameters of the optimizer. Got 2 of 2 that it does not have, the first at index "
        "0 with shape (3, 4). Build the optimizer from the same model",
    ),
    "a single parameter": (
        lambda: make(lambda model: {"text": model.text.weight, "audio": model.audio}),
        TypeError,
        "`groups['text']` must be a module or an iterable of parameters. Got Parameter. Wrap a single parameter in a",
    ),
    "named parameters": (
        lambda: make(lambda model: {"text": model.text.named_parameters(), "audio": model.audio}),
        TypeError,
        "`groups['text']` must hold parameters. Got tuple. Pass `module.parameters()`",
    ),
    "flattened parameters": (
        lambda: make(flattened),
        RuntimeError,
        "`groups` must hold parameters with gradients of their own. Got flattened ones. DeepSpeed ZeRO and FSDP1",
    ),
    "parameters in place of an optimizer": (
        lambda: make(optimizer=lambda model: model.parameters()),
        TypeError,
        "`optimizer` must be a torch.optim.Optimizer. Got generator. Build the optimizer first",
    ),
    "a penalty on a penalty": (
        lambda: make(optimizer=wrapped_twice),
        ValueError,
        "`optimizer` must not be wrapped twice. Got SGD with a penalty on it. Call its `remove()` first",
    ),
    "LBFGS": (
        lambda: make(optimizer=lambda model: torch.optim.LBFGS(model.parameters())),
        ValueError,
        "`optimizer` must take one gradient a step. Got LBFGS, which evaluates the closure many times.",
    ),
    "a step that is not proportional to the learning rate": (
        lambda: make(optimizer=lambda model: torch.optim.Rprop(model.parameters())),
        ValueError,
        '`apply_to="update"` must have an optimizer whose step is proportional to its learning rate. Got Rprop. Use '
        '`apply_to="gradient"`.',
    ),
    "an optimizer without a learning rate": (
        lambda: make(optimizer=without_rate),
        ValueError,
        '`apply_to="update"` must have an optimizer whose step is proportional to its learning rate. Got SGD.',
    ),
    "a name that matches nothing": (
        lambda: groups_by_name(Model(), text="txt", audio="audio"),
        ValueError,
        "`text` must match a module or parameter. Got 'txt', which matches nothing. Closest: text, text.bias, "
        "text.weight. Top-level modules: text, audio, head.",
    ),
    "a glob that matches nothing": (
        lambda: groups_by_name(Model(), rest="*.scale"),
        ValueError,
        "`rest` must match a module or parameter. Got '*.scale', which matches nothing.",
    ),
    "a pattern that is a module": (
        lambda: groups_by_name(Model(), text=[Model().text]),
        TypeError,
        "`text` must be a name, a glob or a list of them. Got Linear(",
    ),
    "a model that is none": (
        lambda: groups_by_name(Model().state_dict(), text="text"),
        TypeError,
        "`model` must be an nn.Module. Got OrderedDict. Pass the module itself",
    ),
}

OUT_OF_RANGE = {
    "alpha": (-1, "`alpha` must be in [0, inf). Got -1."),
    "eta": (1.5, "`eta` must be in [0, 1]. Got 1.5."),
    "threshold": (0.5, "`threshold` must be in [1, inf). Got 0.5."),
    "smoothing": (1, "`smoothing` must be in [0, 1). Got 1."),
    "agreement": (2, "`agreement` must be in [0, 1]. Got 2."),
    "max_coefficient": (0, "`max_coefficient` must be in [1, inf). Got 0."),
    "min_coefficient": (-0.1, "`min_coefficient` must be in [0, 1]. Got -0.1."),
    "noise": (float("inf"), "`noise` must be in [0, inf). Got inf."),
    "max_norm": (0, "`max_norm` must be in (0, inf). Got 0."),
    "apply_to": ("updates", "`apply_to` must be one of 'update', 'gradient'. Got 'updates'."),
    "norm": ("l1", "`norm` must be one of 'l2', 'rms', 'relative'. Got 'l1'."),
    "window": ((5, 5), "`window` must be (start, stop) with 0 <= start < stop, or stop None. Got (5, 5)."),
}

OF_THE_WRONG_KIND = {
    "eta": ("0.5", "`eta` must be a number. Got '0.5'."),
    "alpha": (True, "`alpha` must be a number. Got True."),
    "centred": (1, "`centred` must be a bool. Got 1."),
    "persist": (None, "`persist` must be a bool. Got None."),
    "generator": (0, "`generator` must be a Generator. Got 0."),
}

OF_OBSERVE = {
    "an unknown group": (
        {"text": 1.0, "video": 1.0},
        ValueError,
        "`observe` must name groups. Got 'video'. The groups",
    ),
    "one group alone": ({"text": 1.0}, ValueError, "`observe` must get at least two groups in a call. Got text."),
    "no group": ({}, ValueError, "`observe` must get at least two groups in a call. Got none."),
    "a score": (
        {"text": -0.5, "audio": 1.0},
        ValueError,
        "`text` must be >= 0, lower is better. Got -0.5. Pass an error, not a score.",
    ),
    "errors of all samples": (
        {"text": torch.ones(3), "audio": 1.0},
        ValueError,
        "`text` must be a scalar. Got shape (3,). Reduce it",
    ),
    "a word": ({"text": "low", "audio": 1.0}, TypeError, "`text` must be a number or a tensor. Got str."),
    "a complex number": (
        {"text": torch.tensor(1j), "audio": 1.0},
        TypeError,
        "`text` must be real. Got torch.complex64.",
    ),
}


def assert_raises(call, kind, start):
    with pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind
    message = str(caught.value)
    assert message.startswith(start)
    assert TEMPLATE.match(message), message


@pytest.mark.parametrize(("call", "kind", "start"), AT_CONSTRUCTION.values(), ids=AT_CONSTRUCTION)
def test_a_mistake_at_construction_is_named_with_its_remedy(call, kind, start):
    assert_raises(call, kind, start)


@pytest.mark.parametrize(("name", "value", "start"), [(k, *v) for k, v in OUT_OF_RANGE.items()], ids=OUT_OF_RANGE)
def test_an_option_out_of_range_is_a_value_error(name, value, start):
    assert_raises(lambda: make(**{name: value}), ValueError, start)


@pytest.mark.parametrize(
    ("name", "value", "start"), [(k, *v) for k, v in OF_THE_WRONG_KIND.items()], ids=OF_THE_WRONG_KIND
)
def test_an_option_of_the_wrong_kind_is_a_type_error(name, value, start):
    assert_raises(lambda: make(**{name: value}), TypeError, start)


@pytest.mark.parametrize(("errors", "kind", "start"), OF_OBSERVE.values(), ids=OF_OBSERVE)
def test_a_mistake_in_observe_is_named_and_changes_nothing(errors, kind, start):
    optimizer = make()
    assert_raises(lambda: optimizer.observe(**errors), kind, start)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.balance.errors.isnan().all()


def test_an_unknown_option_is_a_type_error_that_names_it():
    with pytest.raises(TypeError, match="etta"):
        make(etta=0.5)


def test_norms_of_other_groups_are_refused():
    penalty = make().penalty
    assert_raises(
        lambda: penalty.coefficients_for({"text": 1.0}),
        ValueError,
        "`norms` must name exactly the groups. Got text. The groups are: text, audio.",
    )


@pytest.mark.parametrize("swap", ["other parameters", "fewer parameters", "none"])
def test_a_step_without_the_parameters_of_the_groups_raises(swap):
    optimizer = make()
    flat = nn.Parameter(torch.zeros(10))
    flat.grad = torch.ones(10)
    replaced = {"other parameters": [flat] * 6, "fewer parameters": [flat], "none": []}[swap]
    optimizer.param_groups[0]["params"] = replaced
    before = flat.clone()
    assert_raises(
        optimizer.step,
        RuntimeError,
        "The optimizer must hold the parameters of the groups at every step. Got other parameters than at "
        "construction. DeepSpeed ZeRO and FSDP1",
    )
    assert torch.equal(flat, before)


def test_a_step_that_finds_none_of_the_parameters_raises():
    def in_two(model):
        branches = [*model.text.parameters(), *model.audio.parameters()]
        return torch.optim.SGD([{"params": model.head.parameters()}, {"params": branches}], lr=0.1)

    optimizer = make(optimizer=in_two)
    del optimizer.param_groups[1]
    assert_raises(
        optimizer.step,
        RuntimeError,
        "The optimizer must hold the parameters of the groups. Got none of them any more. DeepSpeed ZeRO and FSDP1",
    )


@pytest.mark.parametrize("put_on", [ConflictAwarePenalty, attach])
def test_a_frozen_group_is_a_warning_at_the_user_s_line(put_on):
    model = Model()
    model.audio.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    message = r"^No parameter of group `audio` requires a gradient: the group is frozen and takes no part"
    with pytest.warns(UserWarning, match=message) as warned:
        put_on(optimizer, {"text": model.text, "audio": model.audio})
    assert [warning.filename for warning in warned] == [__file__]


def test_a_checkpoint_of_other_groups_is_refused():
    state = make(lambda model: {"text": model.text, "audio": model.audio, "head": model.head}).state_dict()
    assert_raises(
        lambda: make().load_state_dict(state), ValueError, "`state_dict` must hold the state of 2 groups. Got 3."
    )


def test_a_recorder_of_a_plain_optimizer_is_refused():
    assert_raises(
        lambda: Recorder(torch.optim.SGD(Model().parameters(), lr=0.1)),
        ValueError,
        "`optimizer` must have a penalty on it. Got a plain SGD. Wrap it in ConflictAwarePenalty first",
    )


def test_the_script_of_mistakes_shows_what_the_user_sees(capsys):
    mistakes.main()
    shown = capsys.readouterr().out
    assert [block.partition(". ")[0] for block in shown.strip().split("\n\n")] == [str(n) for n in range(1, 11)]
    messages = [line.partition(": ")[2] for line in shown.splitlines() if re.match(r"\w+Error: ", line)]
    assert len(messages) == 5
    assert all(TEMPLATE.match(message) for message in messages)
