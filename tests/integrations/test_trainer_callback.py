"""``BalanceCallback`` in Hugging Face's Trainer: the loop by hand, resuming, logging, mistakes, sharding."""

import os

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, SequentialSampler

from gradbalance import attach, groups_by_name, rules
from tests import needs
from tests.contract.optimizers import cancels
from tests.contract.oracle import NAMES, SMOOTHING, Toy, batch
from tests.contract.own_rules import RULES
from tests.contract.ranks import on_ranks
from tests.integrations.loops import (
    CLIP,
    STEPS,
    Setup,
    assert_equal_by_hand,
    coefficients_of,
    loss_on,
)

needs("accelerate")  # without it the Trainer does not start
needs("transformers", "mosi")
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments  # noqa: E402

from gradbalance.integrations.transformers import BalanceCallback  # noqa: E402

pytestmark = cancels


@pytest.fixture(autouse=True)
def nothing_left_of_other_tests():
    """Accelerate keeps its state in the classes: one that accumulated would go on doing so."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


PATTERNS = {name: f"toy.{name}" for name in NAMES}


class ForTrainer(nn.Module):
    """The toy as the Trainer calls it: the loss comes first."""

    def __init__(self):
        super().__init__()
        self.toy = Toy()

    def forward(self, one):
        return {"loss": loss_on(self.toy, one)}


class InOrder(Trainer):
    def _get_train_sampler(self, *_):
        return SequentialSampler(self.train_dataset)


def adamw(parameters):
    """The optimizer that the Trainer makes below."""
    return torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.0)


def trainer_of(folder, steps, callbacks, model=None, **arguments):
    """A Trainer that makes its own optimizer."""
    options = {
        "max_steps": steps,
        "per_device_train_batch_size": 1,
        "learning_rate": 0.02,
        "optim": "adamw_torch",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return InOrder(
        ForTrainer() if model is None else model,
        TrainingArguments(output_dir=str(folder), **options | arguments),
        train_dataset=[{"one": batch(step)} for step in range(STEPS)],
        data_collator=lambda examples: examples[0],
        callbacks=callbacks,
    )


def begun(callback, model, optimizer=None):
    """The callback once the training has begun."""
    optimizer = optimizer or adamw(model.parameters())
    callback.on_train_begin(
        None, TrainerState(stateful_callbacks=[]), None, model=model, optimizer=optimizer
    )
    return callback


def watched(groups=PATTERNS, rule=None, **options):
    return BalanceCallback(groups, rules.Watch(rule), **options)


@pytest.mark.parametrize(
    ("setup", "options"),
    [
        (Setup(by=attach), {}),
        (Setup(by=attach, rule="own"), {"accumulate": 2}),
        (Setup("gradient", attach, "coherence"), {"clip": CLIP}),
    ],
    ids=str,
)
def test_the_callback_equals_the_loop_by_hand_and_resumes_in_the_middle(setup, options, tmp_path):
    accumulate = options.get("accumulate", 1)
    half = STEPS // accumulate // 2

    def run(steps, resume=False):
        callback = BalanceCallback(
            PATTERNS, RULES[setup.rule][0](), apply_to=setup.mode, smoothing=SMOOTHING
        )
        trainer = trainer_of(
            tmp_path,
            steps,
            [callback],
            gradient_accumulation_steps=accumulate,
            max_grad_norm=options.get("clip", 0.0),
            save_strategy="steps",
            save_steps=half,
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model.toy, coefficients_of(callback)

    _, before = run(half)
    model, after = run(2 * half, resume=True)
    assert_equal_by_hand(model, before + after, setup, make=adamw, **options)


def test_in_bf16_a_resumed_training_equals_the_unbroken_one(tmp_path):
    def run(steps, resume=False):
        callback = BalanceCallback(PATTERNS, RULES["coherence"][0]())
        trainer = trainer_of(
            tmp_path, steps, [callback], bf16=True, save_strategy="steps", save_steps=3
        )
        trainer.train(resume_from_checkpoint=resume)
        return list(trainer.model.parameters()), coefficients_of(callback)

    parameters, unbroken = run(6)
    again, rest = run(6, resume=str(tmp_path / "checkpoint-3"))
    assert rest == unbroken[3:]
    assert len({c for row in rest for c in row.values()}) == 9
    assert all(map(torch.equal, parameters, again))


class Reporter(TrainerCallback):
    """Stands for W&B or TensorBoard."""

    def __init__(self):
        self.rows = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.rows.append((state.global_step, dict(logs)))


def test_it_logs_where_and_when_the_trainer_logs_its_loss_but_not_to_the_console(tmp_path, capsys):
    reporter = Reporter()
    callback = BalanceCallback(PATTERNS, rules.ByHand(text=0.5))
    trainer = trainer_of(
        tmp_path, 6, [reporter, callback], logging_strategy="steps", logging_steps=2
    )
    trainer.train()
    ours = [(step, row) for step, row in reporter.rows if "loss" not in row][:3]
    assert [step for step, _ in ours] == [2, 4, 6]
    for _, row in ours:
        assert row["gradbalance/coefficients/text"] == 0.5
        assert row["gradbalance/norms/visual"] > 0
        assert all(isinstance(value, float) and np.isfinite(value) for value in row.values())
        assert all(key.startswith("gradbalance/") for key in row)
    history = [row for row in trainer.state.log_history if "gradbalance/shares/audio" in row]
    assert [row["step"] for row in history] == [2, 4, 6]
    printed = capsys.readouterr().out
    assert "gradbalance/" not in printed
    assert str(callback.recorder.summary()) in printed, "the table at the end"


def test_without_logging_it_logs_nothing(tmp_path):
    reporter = Reporter()
    trainer_of(tmp_path, 2, [reporter, watched()]).train()
    assert not any(key.startswith("gradbalance") for _, row in reporter.rows for key in row)


def test_groups_are_modules_parameters_or_names_in_any_mixture():
    model = ForTrainer()
    given = {
        "text": model.toy.text,
        "audio": model.toy.audio.parameters(),  # a generator
        "visual": ["toy.visual.weight", "*.visual.b*"],
    }
    named = groups_by_name(model, **PATTERNS)
    optimizer = adamw(model.parameters())
    callback = begun(watched(given), model, optimizer)
    for p in model.parameters():
        p.grad = torch.rand_like(p)
    optimizer.step()
    norms = callback.penalty.balance.norms
    expected = [torch.stack([p.grad.norm() for p in own]).norm().item() for own in named.values()]
    assert norms.tolist() == pytest.approx(expected, rel=1e-6)


def test_a_second_training_goes_on_with_the_same_penalty(tmp_path):
    callback = watched({name: iter([f"toy.{name}"]) for name in NAMES})
    trainer = trainer_of(tmp_path, 3, [callback])
    trainer.train()
    first = callback.penalty
    trainer.train()
    assert callback.penalty is first
    assert callback.penalty.balance.step == 6


def test_a_penalty_of_somebody_else_is_not_replaced():
    model = ForTrainer()
    optimizer = adamw(model.parameters())
    attach(optimizer, groups_by_name(model, **PATTERNS))
    with pytest.raises(ValueError, match="must not be wrapped twice"):
        begun(watched(), model, optimizer)


def test_a_group_that_never_gets_a_gradient_is_warned_of_after_twenty_steps(tmp_path):
    class Deaf(ForTrainer):
        def forward(self, one):
            (text, _, visual), target = one
            output = self.toy.head(self.toy.text(text) + self.toy.visual(visual))
            return {"loss": (output - target).abs().mean() + 0 * self.toy.audio.weight.sum()}

    callback = BalanceCallback(PATTERNS)
    with pytest.warns(UserWarning, match=r"`audio` is in the optimizer but never had a gradient"):
        trainer_of(tmp_path, 20, [callback], Deaf(), num_train_epochs=9).train()


@pytest.mark.parametrize(
    ("groups", "options", "error", "message"),
    [
        (["toy.text"], {}, TypeError, "`groups` must map names to modules, parameters or patterns"),
        (PATTERNS, {"every": 0}, ValueError, "`every` must be in"),
        (PATTERNS, {"apply_to": "loss"}, ValueError, "`apply_to` must be one of"),
    ],
)
def test_what_is_wrong_with_the_options_is_said_at_construction(groups, options, error, message):
    with pytest.raises(error, match=message):
        BalanceCallback(groups, **options)


def test_a_pattern_that_matches_nothing_is_refused_when_the_training_begins():
    with pytest.raises(ValueError, match=r"`text` must match a module or parameter\. Got 'txt'"):
        begun(watched(PATTERNS | {"text": "txt"}), ForTrainer())


def as_one_process_of_two(folder):
    """The trainings of one rank: replicated, then sharded by FSDP2 and resumed; what they came to."""
    import accelerate.state
    from accelerate.state import AcceleratorState, DistributedType, GradientState

    # As `accelerate launch` sets them; the process group is there already.
    os.environ.update(ACCELERATE_USE_CPU="true", MASTER_ADDR="localhost", MASTER_PORT="29500")
    half = STEPS // 2

    class Halves(InOrder):
        """Rank 0 takes the first half of each batch, and rank 1 the second."""

        def get_train_dataloader(self):
            rank = self.args.process_index
            data = [{"one": halved(batch(step), rank)} for step in range(STEPS)]
            return DataLoader(data, 1, collate_fn=lambda examples: examples[0])

    def run(steps, resume=False, **arguments):
        AcceleratorState._reset_state()
        GradientState._reset_state()
        callback = BalanceCallback(PATTERNS, RULES["own"][0](), smoothing=SMOOTHING)
        trainer = trainer_of(folder, steps, [callback], **arguments)
        trainer.__class__ = Halves
        trainer.train(resume_from_checkpoint=resume)
        sharded = [hasattr(p, "device_mesh") for p in trainer.model.parameters()]
        return coefficients_of(callback), sharded

    replicated, _ = run(STEPS)

    # Accelerate shards on GPUs alone, though nothing in it needs one.
    os.environ.update(
        ACCELERATE_USE_FSDP="true",
        FSDP_VERSION="2",
        FSDP_AUTO_WRAP_POLICY="SIZE_BASED_WRAP",
        FSDP_STATE_DICT_TYPE="SHARDED_STATE_DICT",
    )
    plain = accelerate.state.AcceleratorState.__init__

    def with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
        plain(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    accelerate.state.AcceleratorState.__init__ = with_fsdp
    saving = {"save_strategy": "steps", "save_steps": half}
    before, _ = run(half, **saving)
    after, sharded = run(STEPS, True, **saving)
    return replicated, before + after, all(sharded)


def halved(one, rank):
    inputs, target = one
    rows = slice(2 * rank, 2 * rank + 2)
    return tuple(x[rows] for x in inputs), target[rows]


def test_two_processes_replicated_or_sharded_and_resumed_equal_one(tmp_path):
    setup = Setup(by=attach, rule="own")
    callback = BalanceCallback(PATTERNS, RULES["own"][0](), smoothing=SMOOTHING)
    trainer = trainer_of(tmp_path / "one", STEPS, [callback])
    trainer.train()
    alone = coefficients_of(callback)
    assert_equal_by_hand(trainer.model.toy, alone, setup, make=adamw)
    for replicated, sharded, is_sharded in on_ranks(
        as_one_process_of_two, 2, tmp_path / "two", timeout=300.0
    ):
        assert is_sharded
        for seen in (replicated, sharded):
            assert seen == [pytest.approx(row, rel=1e-5) for row in alone]
