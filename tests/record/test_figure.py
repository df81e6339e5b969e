"""The figure of a record: what is drawn, and that it is legible for 2 to 16 groups, long names, one step and NaN."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.text import Text

from gradbalance._record.figure import COLOURS, NAME_LENGTH, apart, draw
from gradbalance._record.summary import dominance

TITLES = ["Gradient norm", "Coherence", "Coefficient", "Dominance"]


def make_record(groups=3, steps=100, names=None):
    """A record of a rule that raises what is more coherent, as `Recorder.to_dict` gives it."""
    generator = np.random.default_rng(0)
    norms = np.exp(generator.normal(size=(steps, groups)))
    coherences = generator.uniform(0.01, 0.5, (steps, groups))
    coefficients = np.minimum(3, coherences / coherences.min(1, keepdims=True))
    return {
        "norms": norms,
        "coherences": coherences,
        "coefficients": coefficients,
        "conflicts": coefficients[:, :, None] < coefficients[:, None, :],
        "step": np.arange(1, steps + 1),
        "names": np.array(names or [f"group {m}" for m in range(groups)]),
    }


def drawn(record):
    """The panels by title."""
    figure = draw(record, dominance(record["norms"]), dominance(record["norms"] * record["coefficients"]))
    return {axes.get_title(loc="left"): axes for axes in figure.axes}


def bold(axes):
    return [line for line in axes.lines if not line.get_label().startswith("_")]


def beside(axes):
    """The names beside the panel's lines."""
    return [text for text in axes.texts if text.arrow_patch is not None]


@pytest.mark.parametrize("steps", [1, 2, 500])
@pytest.mark.parametrize("groups", [2, 7, 16])
def test_each_panel_has_a_line_and_a_name_for_each_group(groups, steps):
    record = make_record(groups, steps)
    panels = drawn(record)
    assert list(panels) == TITLES
    for title, key in zip(TITLES[:3], ("norms", "coherences", "coefficients"), strict=True):
        lines, names = bold(panels[title]), beside(panels[title])
        assert [line.get_label() for line in lines] == record["names"].tolist()
        assert sorted(text.get_text() for text in names) == sorted(record["names"])
        length = -(-steps // 60)
        firsts = [line.get_ydata()[0] for line in lines]
        assert firsts == pytest.approx(record[key][:length].mean(0).tolist())
        raw = [line for line in panels[title].lines if line.get_alpha() is not None]
        np.testing.assert_array_equal([line.get_ydata() for line in raw], record[key].T)
    ratios = [line.get_ydata()[0] for line in bold(panels["Dominance"])]
    both = dominance(record["norms"]), dominance(record["norms"] * record["coefficients"])
    assert ratios == pytest.approx([ratio[:length].mean() for ratio in both])


@pytest.mark.parametrize("groups", [2, 16])
def test_a_group_has_one_colour_in_all_panels_and_no_other_has_it(groups):
    panels = drawn(make_record(groups))
    colours = [[line.get_color() for line in bold(panels[title])] for title in TITLES[:3]]
    assert colours[0] == colours[1] == colours[2] == list(COLOURS[:groups])
    assert len(set(colours[0])) == groups
    for title in TITLES[:3]:
        named = {text.get_text(): text.get_color() for text in beside(panels[title])}
        assert named == {line.get_label(): line.get_color() for line in bold(panels[title])}


def test_beyond_the_colours_the_dashes_differ():
    lines = bold(drawn(make_record(20, 3))["Gradient norm"])
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 20


@pytest.mark.parametrize("steps", [1, 300])
@pytest.mark.parametrize("names", [["a", "b"], [f"model.tower.{m}.{'x' * 60}.end" for m in range(16)], None])
def test_no_name_overlaps_another_or_leaves_the_page(names, steps):
    record = make_record(16 if names is None else len(names), steps, names)
    record["coefficients"][:] = 1.0  # every name belongs at the same place
    record["conflicts"][:] = False
    panels = drawn(record)
    panels["Dominance"].figure.draw_without_rendering()
    for axes in panels.values():
        # Without the links, which may cross.
        boxes = sorted((Text.get_window_extent(text) for text in beside(axes)), key=lambda box: box.y0)
        assert all(lower.y1 <= upper.y0 for lower, upper in itertools.pairwise(boxes))
        assert all(box.x0 >= axes.bbox.x1 and box.x1 <= axes.figure.bbox.x1 for box in boxes)


def test_a_long_name_keeps_both_ends():
    names = ["model.vision_tower.encoder.layers.0.self_attn", "b" * NAME_LENGTH]
    shown = {text.get_text() for text in beside(drawn(make_record(2, 3, names))["Gradient norm"])}
    assert shown == {"model.vision_t…s.0.self_attn", names[1]}
    assert {len(text) for text in shown} == {NAME_LENGTH}


def test_coherences_that_were_not_measured_have_no_panel():
    record = make_record()
    record["coherences"][:, 1] = np.nan
    assert [line.get_label() for line in bold(drawn(record)["Coherence"]) if np.isfinite(line.get_ydata()).any()] == [
        "group 0",
        "group 2",
    ]
    record["coherences"][:] = np.nan
    assert list(drawn(record)) == ["Gradient norm", "Coefficient", "Dominance"]


def test_a_mean_over_a_stretch_leaves_out_what_is_not_known():
    record = make_record(2, 120)
    record["coherences"][0] = np.nan
    assert bold(drawn(record)["Coherence"])[0].get_ydata()[0] == record["coherences"][1, 0]


def test_conflicts_have_a_panel_where_they_say_more_than_the_coefficients():
    record = make_record(3, 30)
    record["conflicts"] = record["norms"][:, :, None] > 3 * record["norms"][:, None, :]
    panels = drawn(record)
    assert list(panels) == [*TITLES[:3], "In conflict", "Dominance"]
    shades = [mesh.get_array().mean() for mesh in panels["In conflict"].collections]
    assert shades == pytest.approx((record["conflicts"].sum(2) / 2).mean(0).tolist())
    assert [label.get_text() for label in panels["In conflict"].get_yticklabels()] == record["names"].tolist()


@pytest.mark.parametrize("coefficients", [(1.0, 1.0), (0.0, 1.0), (0.5, 1.0), (1.0, 3.0), (0.0, 3.0)])
def test_every_coefficient_is_inside_its_panel(coefficients):
    record = make_record(2, 10)
    record["coefficients"][:] = coefficients
    axes = drawn(record)["Coefficient"]
    low, high = axes.get_ylim()
    assert low < min(coefficients)
    assert max(coefficients) < high


@given(places=st.lists(st.floats(0, 1), min_size=1, max_size=16), gap=st.floats(0.001, 1 / 16))
def test_names_are_moved_apart_within_the_panel_and_no_further_than_they_must(places, gap):
    places = sorted(places)
    moved = apart(places, gap)
    assert all(b - a >= gap - 1e-9 for a, b in itertools.pairwise(moved))
    assert moved[0] >= -1e-9
    assert moved[-1] <= 1 + 1e-9
    if all(b - a >= gap for a, b in itertools.pairwise(places)):
        assert moved == pytest.approx(places)


@given(place=st.floats(0.3, 0.7), count=st.integers(2, 5))
def test_names_of_one_place_are_centred_on_it(place, count):
    assert np.mean(apart([place] * count, 0.1)) == pytest.approx(place)
