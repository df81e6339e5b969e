"""Every example runs for a few steps."""

import importlib
import importlib.util
import math
from pathlib import Path

import pytest

from gradbalance.rules import ByHand, Useful, Watch
from tests import needs

ROOT = Path(__file__).parents[2]


def example(name, *advice, package=None, branches=("audio", "visual")):
    """An example, what it needs, and what its framework warns of that does not concern the penalty."""
    marks = [pytest.mark.filterwarnings(f"ignore:{message}") for message in advice]
    return pytest.param(name, package, branches, id=name, marks=marks)


WORKERS = "The '(train|val)_dataloader' does not have many workers"
TREESPEC = ".isinstance.treespec, LeafSpec.. is deprecated:FutureWarning"
PINNED = "'pin_memory' argument is set as true but no accelerator is found"


@pytest.mark.parametrize(
    ("name", "package", "branches"),
    [
        example("lightning_module", WORKERS, TREESPEC, package="lightning"),
        example("fabric_loop", package="lightning"),
        example("accelerate_loop", package="accelerate"),
        example("huggingface_trainer", PINNED, package="accelerate"),
        example("grad_scaler"),
        example(
            "differential_privacy",
            "Secure RNG turned off",
            "Full backward hook is firing",
            package="opacus",
        ),
        example("your_own_rule"),
    ],
)
def test_an_example_ends_with_the_coefficients_of_its_branches(name, package, branches):
    if package is not None:
        needs(package)
    coefficients = importlib.import_module(f"examples.{name}").main(steps=2)
    assert set(coefficients) == set(branches)
    assert all(0 < c < math.inf for c in coefficients.values())


@pytest.mark.parametrize("rule", [Watch(), Useful()])
def test_the_quickstart_records_its_steps(rule):
    needs("sklearn")
    from examples.quickstart import train

    recorder, _ = train("Short", rule, epochs=2)
    recorded = recorder.to_dict()
    assert len(recorded["step"]) > 2
    assert (recorded["coefficients"] == 1).all() or not isinstance(rule, Watch)


def test_the_rule_of_the_example_slows_whoever_is_ahead_and_remembers_the_start():
    from examples.your_own_rule import TrainingRate
    from tests.rules.asking import Asked

    rule, resumed_rule = TrainingRate(), TrainingRate()
    asked = Asked(rule, 3)
    assert asked.step([1.0] * 3).tolist() == [1.0] * 3, "no errors yet"
    assert asked.step([1.0] * 3, [4.0, 2.0, None]).tolist() == [1.0] * 3
    assert asked.step([1.0] * 3, [1.0, 1.5, None]).tolist() == [0.5, 1.5, 1.0]
    resumed_rule.load_state_dict(rule.state_dict())
    resumed = Asked(resumed_rule, 3)
    assert resumed.step([1.0] * 3, [1.0, 1.5, None]).tolist() == [0.5, 1.5, 1.0]


def test_the_groups_of_one_encoder_are_kinds_of_layers(capsys):
    from examples import one_encoder

    coefficients = one_encoder.main(steps=5, rule=ByHand(norms=0.5))
    assert coefficients == {"attention": 1.0, "mlp": 1.0, "norms": 0.5, "embeddings": 1.0}
    assert "(no group)" in capsys.readouterr().out
    rates = {
        round(group["lr"], 12)
        for group in one_encoder.layer_wise(one_encoder.Encoder(), lr=1.0, decay=0.5)
    }
    assert rates == {1.0, 0.5, 0.25, 0.125, 0.0625}


def test_no_example_hides_a_package_when_run_as_a_script():
    names = {path.stem for path in (ROOT / "examples").glob("*.py")} - {"__init__"}
    assert [name for name in names if importlib.util.find_spec(name) is not None] == []


def test_the_readme_lists_every_example_once():
    text = (ROOT / "examples" / "README.md").read_text()
    names = {path.name for path in (ROOT / "examples").glob("*.py")} - {"__init__.py"} | {"mosi"}
    assert {name: text.count(f"]({name})") for name in names} == dict.fromkeys(names, 1)
