"""Every example runs for a few steps."""

import importlib
import importlib.util
import math
from pathlib import Path

import pytest
import torch

from gradbalance import ConflictAwarePenalty
from gradbalance.rules import ByHand, Coherence, Watch
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


@pytest.mark.parametrize("rule", [Watch(), Coherence()])
def test_the_quickstart_records_its_steps(rule):
    needs("sklearn")
    from examples.quickstart import train

    recorder, accuracies = train("Short", rule, epochs=2)
    recorded = recorder.to_dict()
    assert len(accuracies) == 2
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


def two_branches():
    model = torch.nn.ModuleDict({"audio": torch.nn.Linear(3, 1), "visual": torch.nn.Linear(2, 1)})
    rule = ByHand(audio=0.5)
    rule.needs_coherence = True
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return model, ConflictAwarePenalty(optimizer, dict(model.items()), rule)


LOGGED = {
    f"{quantity}/{name}"
    for quantity in ("norms", "coherences", "coefficients")
    for name in ("audio", "visual")
}


@pytest.mark.filterwarnings(
    f"ignore:{WORKERS}", f"ignore:{TREESPEC}", "ignore:You are using torch.load"
)
def test_the_callback_of_lightning_writes_the_balance_to_tensorboard(tmp_path):
    lightning = needs("lightning")
    needs("tensorboard")
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from examples.lightning_callback import LogBalance

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.branches, self.balanced = two_branches()

        def training_step(self, batch, batch_idx):
            return (
                (self.branches["audio"](batch[0]) + self.branches["visual"](batch[1]))
                .square()
                .mean()
            )

        def configure_optimizers(self):
            return self.balanced

    data = torch.utils.data.DataLoader(
        [(torch.randn(3), torch.randn(2)) for _ in range(12)], batch_size=2
    )
    trainer = lightning.Trainer(
        max_steps=6,
        log_every_n_steps=1,
        callbacks=[LogBalance(every=2)],
        logger=TensorBoardLogger(tmp_path),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), data)
    events = EventAccumulator(trainer.logger.log_dir).Reload()
    assert set(events.Tags()["scalars"]) >= LOGGED
    assert [(event.step, event.value) for event in events.Scalars("coefficients/audio")] == [
        (2, 0.5),
        (4, 0.5),
        (6, 0.5),
    ]


@pytest.mark.filterwarnings(f"ignore:{PINNED}")
def test_the_callback_of_the_trainer_hands_the_balance_to_any_log_function(tmp_path):
    needs("accelerate")
    from transformers import Trainer, TrainingArguments

    from examples.huggingface_trainer import Regression
    from examples.trainer_callback import LogBalance

    model = Regression()
    rule = ByHand(audio=0.5)
    rule.needs_coherence = True
    optimizer = ConflictAwarePenalty(
        torch.optim.AdamW(model.parameters(), lr=0.01),
        {"audio": model.audio, "visual": model.visual},
        rule,
    )
    data = [
        {"audio": torch.randn(20), "visual": torch.randn(5), "labels": torch.randn(1)}
        for _ in range(48)
    ]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=6, report_to=[], save_strategy="no"
    )
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    trainer = Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, schedule))
    rows = []
    trainer.add_callback(LogBalance(optimizer, rows.append, every=2))
    trainer.add_callback(LogBalance(optimizer, trainer.log, every=3))
    trainer.train()
    assert [set(row) for row in rows] == [LOGGED] * 3
    assert [row["coefficients/audio"] for row in rows] == [0.5] * 3
    assert rows[-1]["norms/visual"] > 0
    history = [row for row in trainer.state.log_history if "coefficients/audio" in row]
    assert [row["step"] for row in history] == [3, 6]


@pytest.mark.parametrize("name", ["lightning_callback", "trainer_callback"])
def test_a_callback_is_short_enough_to_be_copied(name):
    assert len((ROOT / "examples" / f"{name}.py").read_text().splitlines()) < 30


def test_no_example_hides_a_package_when_run_as_a_script():
    names = {path.stem for path in (ROOT / "examples").glob("*.py")} - {"__init__"}
    assert [name for name in names if importlib.util.find_spec(name) is not None] == []


def test_the_readme_lists_every_example_once():
    text = (ROOT / "examples" / "README.md").read_text()
    names = {path.name for path in (ROOT / "examples").glob("*.py")} - {"__init__.py"} | {"mosi"}
    assert {name: text.count(f"]({name})") for name in names} == dict.fromkeys(names, 1)
