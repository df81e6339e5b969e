"""Every message that a user can meet: the kind of the error, and `what` must be how. Got what. What to do."""

import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from examples import mistakes
from gradbalance import PAPER, ConflictAwarePenalty, Recorder, attach, groups_by_name, rules

TEMPLATE = re.compile(r"(`[^`]+`|The optimizer) must .+?\. Got .+?\. [A-Z`].+[.?]$", re.DOTALL)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.text, self.audio, self.head = nn.Linear(2, 3), nn.Linear(4, 3), nn.Linear(3, 1)


def make(groups=None, optimizer=None, **options):
    model = Model()
    groups = {"text": model.text, "audio": model.audio} if groups is None else groups(model)
    optimizer = (
        torch.optim.SGD(model.parameters(), lr=0.1) if optimizer is None else optimizer(model)
    )
    return ConflictAwarePenalty(optimizer, groups, **options)


def tie(model):
    model.head.weight = model.text.weight = nn.Parameter(torch.zeros(1, 3))
    return {"text": model.text, "head": model.head}


def of_another_model(model):
    return {"text": model.text, "audio": [*Model().audio.parameters()]}


def partly_of_another_model(model):
    return {"text": model.text, "audio": [*model.audio.parameters(), *Model().head.parameters()]}


def an_optimizer_each(model):
    return [torch.optim.SGD(branch.parameters(), lr=0.1) for branch in (model.text, model.audio)]


def by_name(model):
    return {f"optimizer {i}": each for i, each in enumerate(an_optimizer_each(model))}


class TwoOptimizers:
    def __init__(self, model):
        self.first, self.second = an_optimizer_each(model)


def one_of_two(model):
    return an_optimizer_each(model)[0]


def scheduler(model):
    return torch.optim.lr_scheduler.StepLR(torch.optim.SGD(model.parameters(), lr=0.1), 1)


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


def emptied(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.param_groups[0]["params"] = []
    return optimizer


def overlapping(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer._overlap_with_ddp = True
    return optimizer


class Fixed(torch.optim.Optimizer):
    """Steps of its own length, whatever the learning rate."""

    def __init__(self, params, **options):
        super().__init__(params, options)

    @torch.no_grad()
    def step(self, closure=None):
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            p -= 0.01 * p.grad


class Mixing(Fixed):
    """Each parameter moves by the size of all."""

    @torch.no_grad()
    def step(self, closure=None):
        moved = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        size = sum(float(p.abs().mean()) for p in moved) / len(moved)
        for p in moved:
            p -= 0.1 * size * p.sign()


class Copying(Fixed):
    """Its parameters are copies of what it keeps."""

    @torch.no_grad()
    def step(self, closure=None):
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            kept = self.state[p].setdefault("kept", p.clone())
            kept -= 0.01 * p.grad
            p.copy_(kept)


class Untried(Fixed):
    def step(self, closure=None):
        raise RuntimeError("no trial")


class Hookless(torch.optim.Optimizer):
    def __init__(self, params):
        self.param_groups, self.state = [{"params": list(params), "lr": 0.1}], {}

    def step(self, closure=None):
        pass


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
        "`groups['audio']` must hold parameters of the optimizer. Got 2 of 2 that it does not have, "
        "the first being audio[0] with shape (3, 4). If another optimizer trains it, put all branches into "
        "param_groups of one optimizer; if the model was moved or copied, build the optimizer after that.",
    ),
    "parameters some of which are of another model": (
        lambda: make(partly_of_another_model),
        ValueError,
        "`groups['audio']` must hold parameters of the optimizer. Got 2 of 4 that it does not have, "
        "the first being audio[2] with shape (1, 3). Add them to the optimizer, or freeze them.",
    ),
    "one optimizer of two": (
        lambda: make(optimizer=one_of_two),
        ValueError,
        "`groups['audio']` must hold parameters of the optimizer. Got 2 of 2 that it does not have, "
        "the first being audio.weight with shape (3, 4). If another optimizer trains it, put all branches into",
    ),
    "a list of optimizers": (
        lambda: make(optimizer=an_optimizer_each),
        TypeError,
        "`optimizer` must be a torch.optim.Optimizer. Got list of 2 optimizers (SGD, SGD). "
        "Put the branches into `param_groups` of one optimizer.",
    ),
    "a dict of optimizers": (
        lambda: make(optimizer=by_name),
        TypeError,
        "`optimizer` must be a torch.optim.Optimizer. Got dict of 2 optimizers (SGD, SGD). Put the branches",
    ),
    "an object with two optimizers": (
        lambda: make(optimizer=TwoOptimizers),
        TypeError,
        "`optimizer` must be a torch.optim.Optimizer. Got TwoOptimizers of 2 optimizers (SGD, SGD). Put the",
    ),
    "a scheduler": (
        lambda: make(optimizer=scheduler),
        TypeError,
        "`optimizer` must be a torch.optim.Optimizer. Got StepLR, a scheduler. Pass the optimizer that it drives.",
    ),
    "the class of an optimizer": (
        lambda: make(optimizer=lambda model: torch.optim.SGD),
        TypeError,
        "`optimizer` must be a torch.optim.Optimizer. Got the class SGD. Build it first",
    ),
    "a method without its brackets": (
        lambda: make(lambda model: {"text": model.text.parameters, "audio": model.audio}),
        TypeError,
        "`groups['text']` must be a module or an iterable of parameters. Got <bound method Module.parameters of",
    ),
    "groups that are numbers": (
        lambda: make(lambda model: {"text": 1, "audio": model.audio}),
        TypeError,
        "`groups['text']` must be a module or an iterable of parameters. Got int. Pass `module.parameters()`",
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
    "a step that changes the parameters of others": (
        lambda: make(optimizer=lambda model: Mixing(model.parameters(), lr=0.1)),
        ValueError,
        '`apply_to="update"` must have an optimizer whose step can be scaled for some parameters alone, by the '
        "learning rate or by rescaling the finished update. Got Mixing, in which the steps of some parameters change those of others. ",
    ),
    "a step that follows no learning rate and copies the parameters": (
        lambda: make(optimizer=lambda model: Copying(model.parameters())),
        ValueError,
        '`apply_to="update"` must have an optimizer whose step can be scaled for some parameters alone, by the '
        "learning rate or by rescaling the finished update. Got Copying, which does not follow it and keeps copies of the parameters.",
    ),
    "a step without a learning rate that cannot be tried": (
        lambda: make(optimizer=lambda model: Untried(model.parameters())),
        ValueError,
        '`apply_to="update"` must have an optimizer whose step can be scaled for some parameters alone, by the '
        "learning rate or by rescaling the finished update. Got Untried, which fails in a trial on small parameters: "
        "RuntimeError('no trial'). Use `apply_to=\"learning_rate\"` if its steps are proportional",
    ),
    "a learning rate that is not there": (
        lambda: make(optimizer=lambda model: Fixed(model.parameters()), apply_to="learning_rate"),
        ValueError,
        '`apply_to="learning_rate"` must have an `lr` in all `param_groups`. Got Fixed without. '
        'Use `apply_to="displacement"`.',
    ),
    "an optimizer that runs no hooks": (
        lambda: make(optimizer=lambda model: Hookless(model.parameters()), rule=rules.Watch()),
        ValueError,
        "`optimizer` must run its step hooks. Got Hookless, whose `step` does not",
    ),
    "an optimizer that steps during backward": (
        lambda: make(optimizer=overlapping),
        ValueError,
        "`optimizer` must step after the backward pass. Got SGD with `overlap_with_ddp=True`",
    ),
    "empty param_groups": (
        lambda: make(optimizer=emptied),
        ValueError,
        "`optimizer` must hold parameters. Got empty `param_groups`. Build it from the parameters",
    ),
    "a rule that is a class": (
        lambda: make(rule=rules.ConflictAware),
        TypeError,
        "`rule` must be a callable from Measured to coefficients. Got <class 'gradbalance.rules.conflict_aware.ConflictAware'>.",
    ),
    "a rule by its name": (
        lambda: make(rule="coherence"),
        TypeError,
        "`rule` must be a callable from Measured to coefficients. Got 'coherence'. Pass an instance",
    ),
    "an option of a rule out of range": (
        lambda: rules.ConflictAware(eta=2),
        ValueError,
        "`eta` must be finite and in [0, 1]. Got 2. Choose a value",
    ),
    "factors of groups that there are not": (
        lambda: make(rule=rules.ByHand(video=1)),
        ValueError,
        "`ByHand` must name groups. Got video. The groups are: text, audio.",
    ),
    "a factor that is none": (
        lambda: rules.ByHand(text=-1),
        ValueError,
        "`text` must be a finite factor >= 0. Got -1. Take 1",
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
        "`text` must be a name, a glob or a list of them. Got Linear. Pass modules and parameters to the optimizer",
    ),
    "a pattern that is the module itself": (
        lambda: groups_by_name(Model(), text=Model().text),
        TypeError,
        "`text` must be a name, a glob or a list of them. Got Linear. Pass modules and parameters to the optimizer",
    ),
    "a pattern that is a parameter": (
        lambda: groups_by_name(Model(), text=Model().text.weight),
        TypeError,
        "`text` must be a name, a glob or a list of them. Got Parameter. Pass modules and parameters",
    ),
    "a pattern that is a number": (
        lambda: groups_by_name(Model(), text=1),
        TypeError,
        "`text` must be a name, a glob or a list of them. Got int.",
    ),
    "no pattern at all": (
        lambda: groups_by_name(Model(), text=[]),
        ValueError,
        "`text` must hold at least one name or glob. Got [].",
    ),
    "a pattern in bytes": (
        lambda: groups_by_name(Model(), text=b"text"),
        TypeError,
        "`text` must be a name, a glob or a list of them. Got bytes.",
    ),
    "a model that is none": (
        lambda: groups_by_name(Model().state_dict(), text="text"),
        TypeError,
        "`model` must be an nn.Module. Got OrderedDict. Pass the module itself",
    ),
}

OUT_OF_RANGE = {
    "smoothing": (1, "`smoothing` must be in [0, 1). Got 1."),
    "noise": (float("inf"), "`noise` must be in [0, inf). Got inf."),
    "max_norm": (0, "`max_norm` must be in (0, inf). Got 0."),
    "apply_to": (
        "updates",
        "`apply_to` must be one of 'update', 'gradient', 'learning_rate', 'displacement'. Got 'updates'.",
    ),
    "every": (0, "`every` must be in [1, 2**63). Got 0."),
    "every ": (10**400, "`every` must be in [1, 2**63). Got 1000"),
    "max_norm ": (10**400, "`max_norm` must be in (0, inf). Got inf."),
    "window": (
        (5, 5),
        "`window` must be (start, stop) with 0 <= start < stop, or stop None. Got (5, 5).",
    ),
    "window ": (5, "`window` must be (start, stop) with 0 <= start < stop, or stop None. Got 5."),
    "window  ": (
        (-1, 3),
        "`window` must be (start, stop) with 0 <= start < stop, or stop None. Got (-1, 3).",
    ),
    "window   ": (
        (0.5, 2),
        "`window` must be (start, stop) with 0 <= start < stop, or stop None. Got (0.5, 2).",
    ),
    "smoothing ": (float("nan"), "`smoothing` must be in [0, 1). Got nan."),
    "smoothing  ": (-0.1, "`smoothing` must be in [0, 1). Got -0.1."),
    "noise ": (-1, "`noise` must be in [0, inf). Got -1."),
    "noise  ": ({"text": -1}, "`noise` must be in [0, inf). Got -1."),
    "noise   ": (
        {"video": 1},
        "`noise` must name groups. Got 'video'. The groups are text, audio.",
    ),
}

OF_THE_WRONG_KIND = {
    "smoothing": ("0.5", "`smoothing` must be a number. Got '0.5'."),
    "noise": (True, "`noise` must be a number. Got True."),
    "max_norm": ("1", "`max_norm` must be a number. Got '1'."),
    "persist": (None, "`persist` must be a bool. Got None."),
    "generator": (0, "`generator` must be a torch.Generator. Got 0."),
    "late": (1, "`late` must be True, False or None. Got 1."),
    "process_group": ("gloo", "`process_group` must be a group that this process belongs to, or"),
    "every": (1.5, "`every` must be an integer. Got 1.5."),
}

OF_OBSERVE = {
    "an unknown group": (
        {"text": 1.0, "video": 1.0},
        ValueError,
        "`observe` must name groups. Got 'video'. The groups",
    ),
    "one group alone": (
        {"text": 1.0},
        ValueError,
        "`observe` must get at least two groups in a call. Got text.",
    ),
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
    "a word": (
        {"text": "low", "audio": 1.0},
        TypeError,
        "`text` must be a number or a tensor. Got str.",
    ),
    "a flag": (
        {"text": True, "audio": 1.0},
        TypeError,
        "`text` must be a number or a tensor. Got bool.",
    ),
    "a list": (
        {"text": [1.0], "audio": 1.0},
        TypeError,
        "`text` must be a number or a tensor. Got list.",
    ),
    "a complex number": (
        {"text": torch.tensor(1j), "audio": 1.0},
        TypeError,
        "`text` must be real. Got torch.complex64.",
    ),
    "a flag in a tensor": (
        {"text": torch.tensor(True), "audio": 1.0},
        TypeError,
        "`text` must be real. Got torch.bool.",
    ),
    "an integer beyond all floats": (
        {"text": 10**400, "audio": 1.0},
        ValueError,
        "`text` must be a number that fits into a float. Got a larger int.",
    ),
    "a fraction beyond all floats": (
        {"text": Fraction(10**400), "audio": 1.0},
        ValueError,
        "`text` must be a number that fits into a float. Got a larger Fraction.",
    ),
    "the mean of an array that is masked": (
        {"text": np.ma.masked_all(3).mean(), "audio": 1.0},
        TypeError,
        "`text` must be a number or a tensor. Got MaskedConstant.",
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


@pytest.mark.parametrize(
    ("name", "value", "start"), [(k, *v) for k, v in OUT_OF_RANGE.items()], ids=OUT_OF_RANGE
)
def test_an_option_out_of_range_is_a_value_error(name, value, start):
    assert_raises(lambda: make(**{name.strip(): value}), ValueError, start)


@pytest.mark.parametrize(
    ("name", "value", "start"),
    [(k, *v) for k, v in OF_THE_WRONG_KIND.items()],
    ids=OF_THE_WRONG_KIND,
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
    assert np.isnan(optimizer.balance.errors).all()


@pytest.mark.parametrize("option", ["etta", "eta", "alpha", "norm", "max_coefficient", "agreement"])
def test_an_unknown_option_is_a_type_error_that_names_it(option):
    with pytest.raises(TypeError, match=f"'{option}'"):
        make(**{option: 0.5})


def test_the_ends_of_the_ranges_are_inside_them():
    make(smoothing=0, noise=0, every=1, window=(0, 1), max_norm=1e-9)
    make(
        smoothing=0.999,
        window=(0, None),
        generator=torch.Generator(),
        rule=lambda m: m.coefficients,
    )


def test_a_score_in_place_of_an_error_is_refused_where_norms_come_from_elsewhere():
    penalty = make(rule=rules.ConflictAware())
    assert_raises(
        lambda: penalty.coefficients_for({"text": 1.0, "audio": 1.0}, {"text": -1.0, "audio": 1.0}),
        ValueError,
        "`text` must be >= 0, lower is better. Got -1.0.",
    )


def test_a_rule_that_needs_coherence_is_refused_where_norms_come_from_elsewhere():
    assert_raises(
        lambda: make(rule=rules.Watch()).coefficients_for({"text": 1.0, "audio": 1.0}),
        RuntimeError,
        "`coefficients_for` must have a rule that decides by norms and errors. Got Watch()",
    )


@pytest.mark.parametrize("put_on", [ConflictAwarePenalty, attach])
@pytest.mark.parametrize("make_one", [torch.optim.Adam, torch.optim.RMSprop])
def test_a_factor_that_the_optimizer_cancels_is_a_warning_at_the_user_s_line(put_on, make_one):
    model = Model()
    groups = {"text": model.text, "audio": model.audio}
    name = make_one.__name__
    with pytest.warns(
        UserWarning, match=f'^`apply_to="gradient"` does nothing lasting under {name}'
    ) as warned:
        put_on(make_one(model.parameters()), groups, **PAPER)
    assert [warning.filename for warning in warned] == [__file__]


def test_the_settings_of_the_paper_run_under_sgd_without_a_warning():
    optimizer = make(**PAPER)
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    optimizer.observe(text=0.5, audio=1.0)
    optimizer.step()
    assert optimizer.coefficients()["text"] < 1
    assert optimizer.coefficients()["audio"] == 1


def test_the_way_out_that_a_message_names_is_there():
    with pytest.raises(RuntimeError) as caught:
        make(flattened)
    (method,) = re.findall(r"call `(\w+)`", str(caught.value))
    assert callable(getattr(make(), method))
    assert callable(getattr(make().penalty, method))


@pytest.mark.parametrize(
    ("norms", "errors", "kind", "start"),
    [
        ({"text": 1.0}, None, ValueError, "`norms` must name exactly the groups. Got text. The"),
        ([1.0, 2.0], None, TypeError, "`norms` must map groups to numbers. Got list."),
        ({"text": "1", "audio": 1.0}, None, TypeError, "`text` must be a number or a tensor. Got"),
        ({"text": 10**400, "audio": 1.0}, None, ValueError, "`text` must be a number that fits"),
        ({"text": -1.0, "audio": 1.0}, None, ValueError, "`text` must be a norm, >= 0. Got -1.0."),
        ({"text": 1.0, "audio": 1.0}, [1.0], TypeError, "`errors` must map groups to numbers. Got"),
    ],
)
def test_norms_that_are_none_or_of_other_groups_are_refused(norms, errors, kind, start):
    penalty = make(rule=rules.ConflictAware()).penalty
    assert_raises(lambda: penalty.coefficients_for(norms, errors), kind, start)


def test_options_may_be_numbers_and_flags_of_numpy_and_fractions():
    optimizer = make(
        late=np.True_,
        persist=np.False_,
        every=np.int64(2),
        smoothing=np.float32(0.5),
        max_norm=Fraction(1, 2),
        noise={"text": Fraction(1, 4)},
        window=(np.int64(0), np.int64(9)),
    )
    plain = make(
        late=True,
        persist=False,
        every=2,
        smoothing=0.5,
        max_norm=0.5,
        noise={"text": 0.25},
        window=(0, 9),
    )
    for each in (optimizer, plain):
        for p in each.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        each.step()
    assert repr(optimizer) == repr(plain)


@pytest.mark.parametrize("put_on", [ConflictAwarePenalty, attach])
def test_a_frozen_group_is_a_warning_at_the_user_s_line(put_on):
    model = Model()
    model.audio.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    message = (
        r"^No parameter of group `audio` requires a gradient: the group is frozen and takes no part"
    )
    with pytest.warns(UserWarning, match=message) as warned:
        put_on(optimizer, {"text": model.text, "audio": model.audio})
    assert [warning.filename for warning in warned] == [__file__]


def test_a_checkpoint_of_other_groups_is_refused():
    state = make(lambda model: dict(model.named_children())).state_dict()
    assert_raises(
        lambda: make().load_state_dict(state),
        ValueError,
        "`state_dict` must hold the state of the groups text, audio. Got text, audio, head.",
    )


def test_a_checkpoint_of_another_version_is_refused():
    state = make().state_dict()
    state["param_groups"][0]["gradbalance"] = ({"step": 3},)
    assert_raises(
        lambda: make().load_state_dict(state),
        ValueError,
        "`state_dict` must hold what the penalty saved under 'gradbalance' in its first param_group. Got ",
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
    assert [block.partition(". ")[0] for block in shown.strip().split("\n\n")] == [
        str(n) for n in range(1, 11)
    ]
    messages = [
        line.partition(": ")[2] for line in shown.splitlines() if re.match(r"\w+Error: ", line)
    ]
    assert len(messages) == 5
    assert all(TEMPLATE.match(message) for message in messages)
