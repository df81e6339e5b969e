"""The figure of a record: what is drawn, and that it is legible whatever the groups and steps."""

import warnings

import numpy as np
import pytest
from matplotlib.colors import same_color

from gradbalance import Recorder, rules
from tests.recorder.runs import make_group_names, make_penalty

WATCH = rules.Watch()
QUANTITIES = {
    "Coherence": "coherences",
    "Coefficient": "coefficients",
    "Gradient norm": "norms",
    "Moved": "moved",
}


def record(steps=20, rule=WATCH, **options):
    """A recorder of steps whose gradients vary in size and sign."""
    optimizer, step = make_penalty(rule=rule, **options)
    recorder = Recorder(optimizer)
    generator = np.random.default_rng(0)
    for scale in generator.normal(size=steps):
        step(scale)
    return recorder


def many_groups(groups, steps, names=None):
    gains = np.geomspace(0.1, 10, groups).tolist()
    return record(steps, names=names or make_group_names(groups), gains=gains)


def plot(recorder, tmp_path, **options):
    """The figure, and its panels by the quantity that they show."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = recorder.plot(tmp_path / "figure.png", **options)
    return figure, {axes.get_title("left"): axes for axes in figure.axes}


def lines_of(axes):
    return [line.get_ydata() for line in axes.lines]


def looks(lines):
    return [(line.get_color(), line.get_marker()) for line in lines]


def names_in(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.mark.parametrize("steps", [1, 2, 20])
@pytest.mark.parametrize("groups", [1, 2, 7])
def test_each_panel_has_a_line_for_each_group_with_the_values_of_the_record(
    groups, steps, tmp_path
):
    recorder = many_groups(groups, steps)
    figure, panels = plot(recorder, tmp_path)
    assert names_in(figure) == list(recorder.names)
    numbers = recorder.to_dict()
    shown = [title for title in QUANTITIES if title in panels]
    assert shown == (list(QUANTITIES) if steps > 1 else ["Coefficient", "Gradient norm"])
    for title in shown:
        drawn = np.transpose(lines_of(panels[title]))
        np.testing.assert_allclose(drawn, numbers[QUANTITIES[title]])


def test_a_long_record_is_drawn_as_means_over_stretches(tmp_path):
    recorder = record(173)
    _, panels = plot(recorder, tmp_path)
    norms = recorder.to_dict()["norms"][:, 0]
    drawn = lines_of(panels["Gradient norm"])[0]
    assert len(drawn) <= 50
    assert drawn[0] == pytest.approx(norms[:4].mean())
    assert drawn[-1] == pytest.approx(norms[-1])  # 43 stretches of 4, and the last step


def test_a_mean_over_a_stretch_leaves_out_what_is_not_known(tmp_path):
    recorder = record(60)
    _, panels = plot(recorder, tmp_path)
    coherences = recorder.to_dict()["coherences"][:, 0]
    assert np.isnan(coherences[0])
    assert lines_of(panels["Coherence"])[0][0] == pytest.approx(coherences[1])


def test_the_coherence_has_a_band_of_one_standard_error(tmp_path):
    recorder = record(20)
    _, panels = plot(recorder, tmp_path)
    numbers = recorder.to_dict()
    middle, error = numbers["coherences"][-1, 0], numbers["coherence_errors"][-1, 0]
    band = panels["Coherence"].collections[0].get_paths()[0].vertices
    ends = band[band[:, 0] == 20, 1]
    assert (ends.min(), ends.max()) == pytest.approx((middle - error, middle + error))


def test_coherences_that_were_not_measured_have_no_panel(tmp_path):
    _, panels = plot(record(5, rule=rules.ConflictAware()), tmp_path)
    assert list(panels) == ["Coefficient", "Gradient norm", "Moved"]


def test_of_a_rule_that_is_watched_the_proposals_are_drawn(tmp_path):
    _, panels = plot(record(5, rule=rules.Watch(rules.ByHand(text=0.5))), tmp_path)
    assert list(panels) == ["Coherence", "Proposed", "Gradient norm", "Moved"]
    assert lines_of(panels["Proposed"])[0].tolist() == [0.5] * 5
    assert lines_of(panels["Proposed"])[1].tolist() == [1.0] * 5


def test_accuracies_are_drawn_over_all_steps_or_over_the_steps_given_with_them(tmp_path):
    accuracy = {"alone": [0.1, 0.4, 0.5], "_balanced $": (np.array([5, 20]), [0.2, 0.6])}
    _, panels = plot(record(21), tmp_path, accuracy=accuracy)
    assert next(iter(panels)) == "Accuracy"
    alone, balanced = panels["Accuracy"].lines
    assert alone.get_ydata().tolist() == [0.1, 0.4, 0.5]
    assert alone.get_xdata()[-1] == 21
    assert np.diff(alone.get_xdata()).tolist() == pytest.approx([20 / 3, 20 / 3])
    assert balanced.get_xdata().tolist() == [5, 20]
    assert [text.get_text() for text in panels["Accuracy"].texts] == list(accuracy)


def test_the_figure_is_at_most_half_as_tall_as_it_is_wide(tmp_path):
    """So that it takes at most 500 pixels of a page of 1,000."""
    for options in ({}, {"accuracy": {"alone": [0.5]}}):
        for groups in (1, 12, 60):
            figure, _ = plot(many_groups(groups, 5), tmp_path, **options)
            width, height = figure.get_size_inches()
            assert 2 * height <= width


@pytest.mark.parametrize("steps", [1, 60])
@pytest.mark.parametrize("groups", [2, 16, 40])
def test_names_are_beside_the_panels_on_the_page_and_do_not_overlap(groups, steps, tmp_path):
    figure, panels = plot(many_groups(groups, steps), tmp_path)
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.legends[0].get_texts()]
    right = max(axes.bbox.x1 for axes in panels.values())
    for i, box in enumerate(boxes):
        assert box.x0 >= right
        assert box.x1 <= figure.bbox.x1
        assert 0 <= box.y0 < box.y1 <= figure.bbox.y1
        assert not any(box.overlaps(other) for other in boxes[:i])


def test_long_names_leave_the_panels_as_wide_as_short_ones(tmp_path):
    widths = []
    for name in ("a", "model.vision_tower.encoder.layers.0.self_attention.projection"):
        figure, panels = plot(record(names=(name, "b")), tmp_path)
        figure.draw_without_rendering()
        widths.append(panels["Moved"].bbox.width / figure.dpi)
    assert widths[0] == pytest.approx(widths[1], rel=0.05)


def test_a_group_looks_alike_in_all_panels_and_no_two_groups_look_alike(tmp_path):
    recorder = many_groups(60, 3)
    figure, panels = plot(recorder, tmp_path)
    keys = looks(figure.legends[0].legend_handles)
    for title in QUANTITIES:
        assert looks(panels[title].lines) == keys
    assert len(set(keys)) == 60
    bands = panels["Coherence"].collections
    for band, line in zip(bands, panels["Coherence"].lines, strict=True):
        assert same_color(band.get_facecolor()[0][:3], line.get_color())


def test_names_are_drawn_literally(tmp_path):  # E27
    names = (r"$\frac{$", "$x$", "_hidden", "%", "a_b^c", r"\alpha", "{x}")
    figure, _ = plot(many_groups(len(names), 3, names), tmp_path)
    figure.savefig(tmp_path / "figure.pdf")
    assert names_in(figure) == list(names)
    for text in figure.legends[0].get_texts():
        assert not text.get_parse_math()
        assert not text.get_usetex()


@pytest.mark.parametrize("values", [(1.0, 1.0), (0.0, 1.0), (0.5, 1.0), (1.0, 3.0), (0.0, 3.0)])
def test_every_coefficient_is_inside_its_panel(values, tmp_path):
    _, panels = plot(record(rule=lambda measured: values), tmp_path)
    low, high = panels["Coefficient"].get_ylim()
    assert low < min(values)
    assert high > max(values)


def test_a_group_without_a_gradient_leaves_a_gap(tmp_path):
    recorder = record(names=("a", "b", "c"), gains=(3.0, 1.0, 0.0), rule=rules.ConflictAware())
    figure, panels = plot(recorder, tmp_path)
    assert names_in(figure) == ["a", "b", "c"]
    assert np.isnan(lines_of(panels["Gradient norm"])[2]).all()


def test_pyplot_does_not_keep_the_figure(tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    plot(record(), tmp_path)
    assert pyplot.get_fignums() == []
