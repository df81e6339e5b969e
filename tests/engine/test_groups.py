"""Groups by name: what a pattern takes, and what the overview shows."""

import copy
import pickle

from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gradbalance import groups_by_name


def make_model():
    def branch():
        return nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))

    return nn.ModuleDict({"text": branch(), "text_head": nn.Linear(1, 1), "audio": branch()})


def names_of(model, parameters):
    return [name for name, p in model.named_parameters() if any(p is other for other in parameters)]


def test_a_module_name_takes_all_of_the_module_and_nothing_of_its_namesakes():
    model = make_model()
    groups = groups_by_name(model, text="text", layer="audio.2")
    assert names_of(model, groups["text"]) == [
        "text.0.weight",
        "text.0.bias",
        "text.2.weight",
        "text.2.bias",
    ]
    assert names_of(model, groups["layer"]) == ["audio.2.weight", "audio.2.bias"]


def test_a_parameter_name_a_glob_and_a_list_choose_what_they_say():
    model = make_model()
    groups = groups_by_name(
        model, one="text.0.bias", some="*.[02].weight", both=["text.0", "*.bias"]
    )
    assert names_of(model, groups["one"]) == ["text.0.bias"]
    assert names_of(model, groups["some"]) == [
        "text.0.weight",
        "text.2.weight",
        "audio.0.weight",
        "audio.2.weight",
    ]
    biases = ["text.2.bias", "text_head.bias", "audio.0.bias", "audio.2.bias"]
    assert names_of(model, groups["both"]) == ["text.0.weight", "text.0.bias", *biases]


@given(st.lists(st.sampled_from([name for name, _ in make_model().named_parameters()]), min_size=1))
def test_no_parameter_is_listed_twice_however_often_it_matches(patterns):
    groups = groups_by_name(make_model(), group=patterns)
    assert len(groups["group"]) == len(set(patterns))


def test_a_tied_parameter_is_found_under_each_of_its_names():
    model = nn.ModuleDict({"embedding": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    model["head"].weight = model["embedding"].weight
    groups = groups_by_name(model, text="embedding", head="head", all="*")
    assert [len(parameters) for parameters in groups.values()] == [1, 1, 1]
    assert groups["head"][0] is groups["text"][0]
    assert str(groups_by_name(model, text="embedding")).splitlines()[0].split() == [
        "text",
        "15",
        "embedding,",
        "head",
    ]


def test_the_overview_shows_modules_where_they_are_whole_and_what_is_in_no_group():
    overview = str(groups_by_name(make_model(), text="text", audio=["audio.0", "audio.2.weight"]))
    assert overview.splitlines() == [
        "text        13  text",
        "audio       12  audio.0, audio.2.weight",
        "(no group)   3  text_head, audio.2.bias",
    ]
    assert str(groups_by_name(make_model(), all="*")).splitlines()[1] == "(no group)   0  nothing"


def test_the_groups_can_be_copied_and_pickled_with_their_model():
    model = make_model()
    groups = groups_by_name(model, text="text", audio=["audio.0", "audio.2.bias"])
    for copied, other in (
        copy.deepcopy((model, groups)),
        pickle.loads(pickle.dumps((model, groups))),
    ):
        assert list(other) == ["text", "audio"]
        for name, parameters in other.items():
            assert names_of(copied, parameters) == names_of(model, groups[name])


def test_groups_may_have_the_names_of_arguments():
    model = make_model()
    groups = groups_by_name(model, model="text", self="audio", patterns="text_head")
    assert list(groups) == ["model", "self", "patterns"]
    assert names_of(model, groups["patterns"]) == ["text_head.weight", "text_head.bias"]


def test_patterns_may_be_any_iterable_of_strings():
    model = make_model()
    for patterns in (
        ("text", "audio"),
        {"text": 1, "audio": 2},
        (name for name in ("text", "audio")),
    ):
        assert len(groups_by_name(model, both=patterns)["both"]) == 8
