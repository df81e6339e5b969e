"""Every example runs for two steps."""

import importlib
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def example(name, *advice):
    """An example, and what its framework warns of that does not concern the penalty."""
    return pytest.param(name, marks=[pytest.mark.filterwarnings(f"ignore:{message}") for message in advice])


@pytest.mark.parametrize(
    "name",
    [
        example(
            "lightning_module",
            "The 'train_dataloader' does not have many workers",
            ".isinstance.treespec, LeafSpec.. is deprecated:FutureWarning",
        ),
        example("fabric_loop"),
        example("accelerate_loop"),
        example("huggingface_trainer", "'pin_memory' argument is set as true but no accelerator is found"),
        example("grad_scaler"),
        example("differential_privacy", "Secure RNG turned off", "Full backward hook is firing"),
    ],
)
def test_an_example_of_a_training_loop_ends_with_coefficients(name):
    coefficients = importlib.import_module(f"examples.{name}").main(steps=2)
    assert set(coefficients) == {"audio", "visual"}
    assert all(0 <= c <= 1 for c in coefficients.values())


def test_the_quickstart_records_its_steps():
    from examples.quickstart import train

    assert len(train(eta=0.1, steps=2).to_dict()["step"]) == 2


def test_no_example_hides_a_package_when_run_as_a_script():
    names = {path.stem for path in (ROOT / "examples").glob("*.py")} - {"__init__"}
    assert [name for name in names if importlib.util.find_spec(name) is not None] == []
