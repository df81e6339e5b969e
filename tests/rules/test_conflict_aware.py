"""The rule, with nothing but small tensors."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from gradbalance import PAPER
from gradbalance._rule import UNSEEN, Decision, State, decide
from gradbalance._settings import Options, Settings
from tests.reference import ReferenceRule, paper_coefficients
from tests.strategies import group_cosines, group_errors, group_norms, rule_settings


class Rule:
    """The fast rule with its state carried from step to step."""

    def __init__(self, n, settings):
        unseen = torch.full((n,), UNSEEN, dtype=torch.float64)
        self.settings = settings
        self.state = State(torch.zeros((), dtype=torch.float64), unseen, None, None)

    def step(self, norms, observed=None, cosines=None) -> Decision:
        unseen = torch.full_like(self.state.shares, UNSEEN)
        if observed is not None:
            observed = torch.tensor([UNSEEN if e is None else e for e in observed], dtype=torch.float64)
            self.state = self.state._replace(errors=unseen if self.state.errors is None else self.state.errors)
        if cosines is not None:
            cosines = torch.tensor([math.nan if c is None else c for c in cosines], dtype=torch.float64)
            seen = self.state.agreements
            self.state = self.state._replace(agreements=unseen if seen is None else seen)
        norms = torch.tensor(norms, dtype=torch.float64)
        decision = decide(norms, observed, cosines, self.state, self.settings)
        self.state = decision.state
        return decision


def coefficients(norms, errors=None, cosines=None, **options):
    """The coefficients of a first step, as a list."""
    settings = Settings(**{"threshold": 1.0, **options})
    return Rule(len(norms), settings).step(norms, errors, cosines).coefficients.tolist()


@given(data=st.data(), settings=rule_settings())
def test_the_fast_rule_equals_the_slow_loops_over_many_steps(data, settings):
    n = data.draw(st.integers(2, 5))
    fast, slow = Rule(n, settings), ReferenceRule(settings)
    asked = data.draw(st.booleans())
    for _ in range(data.draw(st.integers(1, 5))):
        norms = data.draw(
            st.lists(st.floats(0.125, 1e3) | st.sampled_from([0.0, math.nan, math.inf]), min_size=n, max_size=n)
        )
        observed = data.draw(st.none() | group_errors(n, partial=True))
        cosines = data.draw(group_cosines(n)) if asked else None
        expected = slow.step(norms, observed, cosines)
        assert fast.step(norms, observed, cosines).coefficients.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)
        assert fast.state.step == slow.steps


@given(data=st.data(), norms=group_norms(inactive=True), settings=rule_settings())
def test_coefficients_lie_between_the_minimum_and_the_maximum(data, norms, settings):
    errors = data.draw(st.none() | group_errors(len(norms), partial=True))
    c = Rule(len(norms), settings).step(norms, errors).coefficients
    assert (c >= settings.min_coefficient).all()
    assert (c <= (settings.max_coefficient or 1) * (1 + 1e-12)).all()


@given(data=st.data(), norms=group_norms(inactive=True), settings=rule_settings())
def test_no_scaled_norm_is_larger_than_the_largest_norm(data, norms, settings):
    errors = data.draw(st.none() | group_errors(len(norms), partial=True))
    c = Rule(len(norms), settings).step(norms, errors).coefficients.tolist()
    assert all(a * n <= max(norms) * (1 + 1e-12) for a, n in zip(c, norms, strict=True))


@given(data=st.data(), norms=group_norms(inactive=True), settings=rule_settings(), most=st.floats(1, 100))
def test_raising_keeps_the_ratios_of_the_coefficients(data, norms, settings, most):
    errors = data.draw(st.none() | group_errors(len(norms)))
    plain, raised = (
        Rule(len(norms), replace(settings, max_coefficient=m)).step(norms, errors).coefficients for m in (1.0, most)
    )
    members = torch.tensor(norms) > 0
    lift = (raised / plain)[members & (plain > 0)]
    assert raised[~members].tolist() == [1.0] * int((~members).sum())
    assert (lift >= 1).all()
    torch.testing.assert_close(lift, lift[:1].expand_as(lift))


def test_the_others_are_raised_as_far_as_the_dominant_group_was_damped():
    options = {"eta": 0.05, "agreement": None}
    assert coefficients([64.0, 1.0], max_coefficient=32.0, **options) == [1.0, 20.0]
    assert coefficients([64.0, 1.0], max_coefficient=4.0, **options) == [0.2, 4.0]
    assert coefficients([64.0, 1.0], max_coefficient=1.5, **options) == pytest.approx([0.075, 1.5])
    assert coefficients([8.0, 1.0], max_coefficient=32.0, **options) == [0.4, 8.0], "not above the largest norm"
    assert coefficients([64.0, 1.0], max_coefficient=32.0, **options | {"eta": 0.0}) == [0.0, 32.0]
    assert coefficients([64.0, 1.0], **options) == [0.05, 1.0]


@given(n=st.integers(2, 6), norm=st.floats(1e-6, 1e6), error=st.none() | st.floats(0, 1e3), settings=rule_settings())
def test_equal_shares_and_equal_errors_give_exactly_one(n, norm, error, settings):
    errors = None if error is None else [error] * n
    assert Rule(n, settings).step([norm] * n, errors).coefficients.tolist() == [1.0] * n


@given(data=st.data(), norms=group_norms())
def test_alpha_zero_and_eta_one_give_exactly_one(data, norms):
    errors = data.draw(st.none() | group_errors(len(norms)))
    assert coefficients(norms, errors, alpha=0, eta=1) == [1.0] * len(norms)


@pytest.mark.parametrize(
    ("window", "damped"), [((0, 2), [0, 1]), ((1, 3), [1, 2]), ((2, None), [2, 3]), (None, [0, 1, 2, 3])]
)
def test_the_rule_acts_inside_the_window_alone(window, damped):
    rule = Rule(2, Settings(threshold=1.0, smoothing=0.0, eta=0.5, window=window))
    steps = [rule.step([2.0, 1.0]).coefficients.tolist() for _ in range(4)]
    assert [i for i, c in enumerate(steps) if c != [1.0, 1.0]] == damped


@given(data=st.data(), norms=group_norms(), settings=rule_settings(window=None))
def test_the_group_with_the_worst_error_keeps_its_step(data, norms, settings):
    errors = data.draw(group_errors(len(norms)))
    c = Rule(len(norms), settings).step(norms, errors).coefficients
    assert c[max(range(len(norms)), key=errors.__getitem__)] >= 1


@given(norms=group_norms(), settings=rule_settings(window=None))
def test_without_errors_the_smallest_norm_keeps_its_step(norms, settings):
    c = Rule(len(norms), settings).step(norms).coefficients
    assert c[min(range(len(norms)), key=norms.__getitem__)] >= 1


@given(data=st.data(), norms=group_norms(inactive=True), settings=rule_settings(window=None))
def test_permuting_the_groups_permutes_the_coefficients(data, norms, settings):
    errors = data.draw(st.none() | group_errors(len(norms)))
    order = data.draw(st.permutations(range(len(norms))))
    plain = Rule(len(norms), settings).step(norms, errors).coefficients.tolist()
    permuted_errors = None if errors is None else [errors[i] for i in order]
    permuted = Rule(len(norms), settings).step([norms[i] for i in order], permuted_errors).coefficients.tolist()
    assert permuted == pytest.approx([plain[i] for i in order], rel=1e-12)


@given(norms=group_norms(), scale=st.floats(2.0**-20, 2.0**20), settings=rule_settings(window=None))
def test_the_loss_scale_does_not_change_the_coefficients(norms, scale, settings):
    plain, scaled = (Rule(len(norms), settings).step(v).coefficients for v in (norms, [scale * n for n in norms]))
    torch.testing.assert_close(plain, scaled)


@given(data=st.data(), norms=group_norms(), scale=st.sampled_from([0.25, 3.0, 17.0]))
def test_the_unit_of_the_errors_does_not_change_the_coefficients(data, norms, scale):
    errors = [1.0 + e for e in data.draw(group_errors(len(norms)))]  # beside these eps is nothing
    plain = coefficients(norms, errors)
    assert coefficients(norms, [scale * e for e in errors]) == pytest.approx(plain, rel=1e-6, abs=1e-9)


@given(
    data=st.data(),
    norms=group_norms(),
    factor=st.floats(1.0, 100.0),
    settings=rule_settings(window=None, max_coefficient=1.0),
)
def test_a_larger_norm_lowers_only_its_own_coefficient(data, norms, factor, settings):
    errors = data.draw(st.none() | group_errors(len(norms)))
    m = data.draw(st.integers(0, len(norms) - 1))
    raised = [n * factor if i == m else n for i, n in enumerate(norms)]
    before, after = (Rule(len(norms), settings).step(v, errors).coefficients for v in (norms, raised))
    assert after[m] <= before[m]
    assert all(after[k] >= before[k] for k in range(len(norms)) if k != m)


@given(data=st.data(), norms=group_norms(), settings=rule_settings(window=None, max_coefficient=1.0))
def test_a_lower_error_never_raises_the_own_coefficient(data, norms, settings):
    errors = data.draw(group_errors(len(norms)))
    m = data.draw(st.integers(0, len(norms) - 1))
    lowered = [e * data.draw(st.sampled_from([0.0, 0.3, 0.9])) if i == m else e for i, e in enumerate(errors)]
    before, after = (Rule(len(norms), settings).step(norms, v).coefficients for v in (errors, lowered))
    assert after[m] <= before[m] + 1e-12


@given(
    norms=st.tuples(st.floats(0.01, 100), st.floats(0.01, 100)),
    errors=st.tuples(st.floats(0.01, 10), st.floats(0.01, 10)),
    alpha=st.floats(0.1, 3),
)
def test_two_groups_give_the_formula_of_the_paper(norms, errors, alpha):
    assume(abs(errors[0] - errors[1]) > 1e-4 * max(errors))  # outside the dead band
    options = {k: v for k, v in PAPER.items() if k not in ("alpha", "apply_to", "noise")}
    c = coefficients(list(norms), list(errors), alpha=alpha, **options)
    assert c == pytest.approx(paper_coefficients(norms, errors, alpha, PAPER["eta"]), rel=1e-12)
    assert max(c) == 1
    modulated = coefficients(list(norms), list(errors), alpha=alpha, **options | {"eta": 1.0})
    assert all(a == b or b < 1 for a, b in zip(c, modulated, strict=True)), "a penalty without a modulation"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_step_that_is_not_finite_does_not_count(bad):
    rule = Rule(3, Settings(threshold=1.0))
    rule.step([3.0, 2.0, 1.0], [0.1, 0.2, 0.3])
    state = rule.state
    for norms, errors in (([bad, 9.0, 1.0], [1.0, 2.0, 3.0]), ([3.0, 9.0, 1.0], [abs(bad), 2.0, 3.0])):
        assert rule.step(norms, errors).coefficients.tolist() == [1.0] * 3
        assert all(map(torch.equal, state[:3], rule.state[:3]))


def test_a_single_active_group_does_not_count():
    rule = Rule(3, Settings(threshold=1.0))
    assert rule.step([5.0, 0.0, 0.0]).coefficients.tolist() == [1.0] * 3
    assert rule.state.step == 0
    assert rule.step([0.0, 0.0, 0.0]).coefficients.tolist() == [1.0] * 3
    assert (rule.state.shares == UNSEEN).all()


def test_a_group_that_was_not_observed_is_left_alone():
    c = coefficients([9.0, 2.0, 1.0], [None, 0.5, 1.0], eta=0.5, alpha=0.0)
    assert c == [1.0, 0.5, 1.0]


@pytest.mark.parametrize("centred", [True, False])
def test_a_group_that_was_not_observed_changes_nothing_for_the_others(centred):
    c = coefficients([9.0, 2.0, 1.0, 1.0], [None, 0.5, 1.0, 0.8], centred=centred)
    assert c == [1.0, *coefficients([2.0, 1.0, 1.0], [0.5, 1.0, 0.8], centred=centred)]


def test_errors_stay_in_force_until_the_next_observation():
    rule = Rule(2, Settings(threshold=1.0, eta=0.5, alpha=0.0, smoothing=0.0))
    assert rule.step([2.0, 1.0], [1.0, 0.5]).coefficients.tolist() == [1.0, 1.0]
    assert rule.step([2.0, 1.0]).coefficients.tolist() == [1.0, 1.0]
    assert rule.step([2.0, 1.0], [0.5, 1.0]).coefficients.tolist() == [0.5, 1.0]


@given(data=st.data(), norms=group_norms(), settings=rule_settings(window=None))
def test_a_dominant_group_whose_gradients_agree_is_never_damped(data, norms, settings):
    n, settings = len(norms), replace(settings, agreement=data.draw(st.sampled_from([0.0, 0.5, 1.0])))
    m = max(range(n), key=norms.__getitem__)
    cosines = data.draw(group_cosines(n))
    cosines[m] = 1.0
    assert Rule(n, settings).step(norms, None, cosines).coefficients[m] >= 1


def test_a_conflict_needs_less_agreement_than_the_other_group_has():
    options = {"eta": 0.5, "smoothing": 0.0, "agreement": 0.5}
    assert coefficients([2.0, 1.0], None, [0.1, 0.4], **options) == [0.5, 1.0]
    assert coefficients([2.0, 1.0], None, [0.2, 0.4], **options) == [1.0, 1.0]
    assert coefficients([2.0, 1.0], None, [-0.9, 0.4], **options) == [0.5, 1.0]
    assert coefficients([2.0, 1.0], None, [-0.9, 0.0], **options) == [1.0, 1.0]
    assert coefficients([2.0, 1.0], None, [None, 0.4], **options) == [1.0, 1.0]
    assert coefficients([2.0, 1.0], None, [0.2, 0.4], **options | {"agreement": None}) == [0.5, 1.0]


def test_the_penalty_grows_with_the_fraction_of_the_peers_in_conflict():
    assert coefficients([4.0, 2.0, 1.0], eta=0.25, smoothing=0.0) == [0.25, 0.5, 1.0]
    assert coefficients([8.0, 0.0, 2.0, 2.0, 1.0], eta=0.125, threshold=3.0) == pytest.approx([0.125, 1, 1, 1, 1])
    assert coefficients([8.0, 4.0, 4.0, 1.0], eta=0.125, threshold=3.0) == pytest.approx([0.5, 0.5, 0.5, 1.0])


@pytest.mark.parametrize(("centred", "start"), [(True, 1.0), (False, 0.0)])
def test_the_modulation_is_by_the_lead_over_the_mean_of_the_peers(centred, start):
    c = coefficients([1.0, 1.0, 1.0], [1.0, 2.0, 4.0], alpha=0.3, eta=1.0, centred=centred)
    lead = 1.0 / ((0.5 + 0.25) / 2) - start
    assert c == pytest.approx([1 - math.tanh(0.3 * lead), 1.0, 1.0], rel=1e-6)


def test_a_tie_is_no_conflict():
    assert coefficients([2.0, 1.0], threshold=2.0, eta=0.5) == [1.0, 1.0]
    assert coefficients([2.0, 1.0], [0.5, 0.5], eta=0.5) == [1.0, 1.0]


def test_an_error_of_zero_is_an_error():
    assert coefficients([2.0, 1.0], [0.0, 1.0], eta=0.5, alpha=0.0) == [0.5, 1.0]
    assert coefficients([2.0, 1.0], [0.0, 1.0], eta=1.0) == [0.0, 1.0]


@pytest.mark.parametrize("none", [UNSEEN, -1.0, -0.5])
def test_any_negative_error_is_none(none):
    unseen = torch.full((3,), UNSEEN, dtype=torch.float64)
    norms, observed = (torch.tensor(v, dtype=torch.float64) for v in ([9.0, 2.0, 1.0], [none, 0.5, 1.0]))
    settings = Settings(eta=0.5, alpha=0.0, threshold=1.0)
    decision = decide(norms, observed, None, State(torch.zeros(()), unseen, unseen, None), settings)
    assert decision.coefficients.tolist() == [1.0, 0.5, 1.0]
    assert decision.state.errors.tolist() == [UNSEEN, 0.5, 1.0]


def test_observed_errors_stand_in_for_the_agreement():
    options = {"eta": 0.5, "alpha": 0.0, "agreement": 0.5}
    assert coefficients([2.0, 1.0], [0.1, 0.2], [0.9, 0.1], **options) == [0.5, 1.0]
    assert coefficients([2.0, 1.0], [0.2, 0.1], [0.1, 0.9], **options) == [1.0, 1.0]


def test_smoothed_shares_let_a_single_spike_pass():
    rule = Rule(2, Settings(threshold=3.0, smoothing=0.9, eta=0.1))
    assert rule.step([1.0, 1.0]).coefficients.tolist() == [1.0, 1.0]
    assert rule.step([100.0, 1.0]).coefficients.tolist() == [1.0, 1.0]
    sustained = [rule.step([100.0, 1.0]).coefficients[0].item() for _ in range(20)]
    assert sustained[-1] == 0.1


def test_a_lead_of_one_ulp_is_no_lead():
    c = coefficients([1.0, 1.0, 1.0], [0.1, 0.1, math.nextafter(0.1, 1)], centred=False)
    assert c == [1.0, 1.0, 1.0]


@given(norms=group_norms(), settings=rule_settings(window=None))
def test_float32_decides_as_float64_away_from_ties(norms, settings):
    assume(max(norms) / min(norms) < 1e6)
    n = len(norms)
    state = State(torch.zeros(()), torch.full((n,), UNSEEN), None, None)
    narrow = decide(torch.tensor(norms), None, None, state, settings).coefficients
    expected = Rule(n, settings).step(norms).coefficients
    torch.testing.assert_close(narrow.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "option",
    [
        {"alpha": -1},
        {"alpha": math.inf},
        {"alpha": math.nan},
        {"eta": -0.1},
        {"eta": 1.1},
        {"threshold": 0.5},
        {"smoothing": 1.0},
        {"smoothing": -0.1},
        {"min_coefficient": 2},
        {"max_coefficient": 0.5},
        {"max_coefficient": math.inf},
        {"agreement": 1.5},
        {"agreement": -0.1},
        {"noise": -1},
        {"max_norm": 0},
        {"apply_to": "updates"},
        {"norm": "l1"},
        {"window": (3, 3)},
        {"window": (-1, 3)},
        {"window": 5},
        {"window": (0.5, 2)},
    ],
)
def test_an_option_out_of_range_is_refused_by_name(option):
    (name,) = option
    with pytest.raises(ValueError, match=rf"`{name}` must be .* Got .*\. "):
        Settings(**option)


@pytest.mark.parametrize(
    "option",
    [
        {"alpha": "1"},
        {"eta": None},
        {"agreement": "0.5"},
        {"centred": 1},
        {"persist": 0},
        {"generator": 3},
        {"alpha": True},
    ],
)
def test_an_option_of_the_wrong_kind_is_refused_by_name(option):
    (name,) = option
    with pytest.raises(TypeError, match=rf"`{name}` must be .* Got .*\. "):
        Settings(**option)


def test_the_ends_of_the_ranges_are_inside_them():
    Settings(alpha=0, eta=0, threshold=1, smoothing=0, min_coefficient=0, noise=0, window=(0, 1))
    Settings(eta=1, min_coefficient=1, max_coefficient=1, window=(0, None), agreement=0, max_norm=1e-9)
    Settings(agreement=1, max_norm=1e9)


@pytest.mark.parametrize("eta", [0, 0.5, 1])
@pytest.mark.parametrize("alpha", [0, 1])
def test_settings_are_passive_if_neither_penalty_nor_modulation_can_act(eta, alpha):
    assert Settings(eta=eta, alpha=alpha).is_passive is (eta == 1 and alpha == 0)


def test_the_option_types_name_exactly_the_settings():
    assert list(Options.__annotations__) == list(Settings.__dataclass_fields__)
    assert replace(Settings(), **PAPER).eta == 0.5
