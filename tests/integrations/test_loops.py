"""Training loops of others: each gives the parameters and coefficients of the loop written by hand."""

import lightning
import pytest
import torch
from accelerate import Accelerator
from lightning.pytorch.plugins import MixedPrecision
from opacus.optimizers import DPOptimizer
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader, SequentialSampler
from transformers import Trainer, TrainingArguments

from gradbalance import ConflictAwarePenalty, attach
from tests.optimizers import MODES
from tests.oracle import RULE, ByHand, Toy, assert_same_coefficients, assert_same_parameters, batch, groups_of, refused

STEPS = 8
CLIP = 0.5
WRAPPINGS = ("wrapped", "attached")


def sgd(params):
    return torch.optim.SGD(params, lr=0.02, momentum=0.9)


def adamw(params):
    return torch.optim.AdamW(params, lr=0.02)


def penalised(model, mode, wrapping="wrapped", make=adamw):
    """The optimizer to hand to the framework, and the penalty on it."""
    optimizer = make(model.parameters())
    if wrapping == "attached":
        return optimizer, attach(optimizer, groups_of(model), apply_to=mode, **RULE)
    wrapper = ConflictAwarePenalty(optimizer, groups_of(model), apply_to=mode, **RULE)
    return wrapper, wrapper


def batches(steps=range(STEPS)):
    return DataLoader([batch(step) for step in steps], batch_size=None)


def loss_on(model, one):
    inputs, target = one
    return (model(*inputs) - target).abs().mean()


def expected(mode, *, accumulate=1, clip=None, make=adamw):
    """The twin trained by hand, and the coefficients of its steps."""
    twin = ByHand(make, Toy(), mode)
    seen = []
    for i, one in enumerate(batches()):
        (loss_on(twin.model, one) / accumulate).backward()
        if (i + 1) % accumulate == 0:
            if clip is not None:
                clip_grad_norm_(twin.model.parameters(), clip)
            twin.step()
            twin.optimizer.zero_grad()
            seen.append(twin.coefficients)
    return twin.model, seen


def assert_equal_by_hand(model, seen, mode, **loop):
    twin, coefficients = expected(mode, **loop)
    assert_same_coefficients(seen, coefficients)
    assert_same_parameters(model, twin)


def recorded(optimizer, penalty):
    """The coefficients of each step that takes place, filled while the framework trains."""
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append(penalty.coefficients()))
    return seen


each_mode = pytest.mark.parametrize("mode", MODES)
each_wrapping = pytest.mark.parametrize("wrapping", WRAPPINGS)


# Lightning


class Lit(lightning.LightningModule):
    def __init__(self, mode, wrapping="wrapped", automatic=True, make=adamw):
        super().__init__()
        self.model, self.automatic_optimization = Toy(), automatic
        self.mode, self.wrapping, self.make = mode, wrapping, make
        self.seen = []

    def training_step(self, one, index):
        loss = loss_on(self.model, one)
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            self.manual_backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        return loss

    def configure_optimizers(self):
        optimizer, penalty = penalised(self.model, self.mode, self.wrapping, self.make)
        self.seen = recorded(optimizer, penalty)
        return optimizer


def fit(module, data=None, ckpt_path=None, **options):
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 1, **options},
    )
    trainer.fit(module, data or batches(), ckpt_path=ckpt_path)
    return trainer


# Advice on data loading, and a deprecation of torch that Lightning has yet to follow.
of_lightning = pytest.mark.filterwarnings(
    "ignore:The 'train_dataloader' does not have many workers",
    "ignore:The number of training batches",
    "ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning",
)


@of_lightning
@each_wrapping
@each_mode
@pytest.mark.parametrize("options", [{}, {"clip": CLIP}, {"accumulate": 2}, {"clip": CLIP, "accumulate": 2}])
def test_lightning_with_automatic_optimization_equals_the_loop_by_hand(mode, wrapping, options):
    module = Lit(mode, wrapping)
    accumulate = options.get("accumulate", 1)
    fit(module, gradient_clip_val=options.get("clip"), accumulate_grad_batches=accumulate)
    assert_equal_by_hand(module.model, module.seen, mode, **options)


@of_lightning
@each_wrapping
@each_mode
def test_lightning_with_manual_optimization_equals_the_loop_by_hand(mode, wrapping):
    module = Lit(mode, wrapping, automatic=False)
    fit(module)
    assert_equal_by_hand(module.model, module.seen, mode)


@of_lightning
@each_mode
@pytest.mark.parametrize("clip", [None, CLIP])
def test_lightning_with_a_loss_scaler_equals_the_loop_by_hand(mode, clip):
    class Float32(MixedPrecision):
        """The loss scaling alone: autocast to float16 would need a tolerance."""

        def autocast_context_manager(self):
            return torch.autocast("cpu", enabled=False)

    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    module = Lit(mode)
    fit(module, gradient_clip_val=clip, plugins=[Float32("16-mixed", "cpu", scaler)])
    assert_equal_by_hand(module.model, module.seen, mode, clip=clip)


@of_lightning
@each_wrapping
@each_mode
def test_lightning_resumes_from_a_checkpoint(mode, wrapping, tmp_path):
    halfway, resumed = Lit(mode, wrapping), Lit(mode, wrapping)
    fit(halfway, batches(range(4))).save_checkpoint(tmp_path / "half")
    fit(resumed, batches(range(4, STEPS)), tmp_path / "half", max_epochs=2)
    assert_equal_by_hand(resumed.model, halfway.seen + resumed.seen, mode)


# Fabric


@each_mode
@pytest.mark.parametrize("options", [{}, {"clip": CLIP}, {"accumulate": 2}])
def test_fabric_equals_the_loop_by_hand(mode, options, tmp_path):
    def build():
        fabric = lightning.Fabric(accelerator="cpu", devices=1)
        model = Toy()
        optimizer, _ = penalised(model, mode)
        return fabric, *fabric.setup(model, optimizer)

    accumulate = options.get("accumulate", 1)
    fabric, model, optimizer = build()
    seen = []
    for i, one in enumerate(batches()):
        fabric.backward(loss_on(model, one) / accumulate)
        if (i + 1) % accumulate:
            continue
        if "clip" in options:
            fabric.clip_gradients(model, optimizer, max_norm=options["clip"])
        optimizer.step()
        optimizer.zero_grad()
        seen.append(optimizer.coefficients())
        if i == STEPS // 2 - 1:
            fabric.save(tmp_path / "half", {"model": model, "optimizer": optimizer})
            fabric, model, optimizer = build()
            fabric.load(tmp_path / "half", {"model": model, "optimizer": optimizer})
    assert_equal_by_hand(model, seen, mode, **options)


# Accelerate


@each_mode
@each_wrapping
@pytest.mark.parametrize("options", [{}, {"clip": CLIP}, {"accumulate": 2}])
def test_accelerate_equals_the_loop_by_hand(mode, wrapping, options, tmp_path):
    def build():
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=options.get("accumulate", 1))
        model = Toy()
        optimizer, penalty = penalised(model, mode, wrapping)
        model, optimizer = accelerator.prepare(model, optimizer)
        return accelerator, model, optimizer, penalty

    accelerator, model, optimizer, penalty = build()
    seen = []
    for i, one in enumerate(batches()):
        with accelerator.accumulate(model):
            accelerator.backward(loss_on(model, one))
            if "clip" in options and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), options["clip"])
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            seen.append(penalty.coefficients())
        if i == STEPS // 2 - 1:
            accelerator.save_state(tmp_path / "half")
            accelerator, model, optimizer, penalty = build()
            accelerator.load_state(tmp_path / "half")
    assert_equal_by_hand(model, seen, mode, **options)


@each_mode
def test_attaching_to_what_accelerate_prepared_leaves_micro_batches_alone(mode):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = Toy()
    model, optimizer = accelerator.prepare(model, adamw(model.parameters()))
    penalty = attach(optimizer, groups_of(model), apply_to=mode, **RULE)
    seen = recorded(optimizer.optimizer, penalty)
    for one in batches():
        with accelerator.accumulate(model):
            accelerator.backward(loss_on(model, one))
            optimizer.step()
            optimizer.zero_grad()
    assert_equal_by_hand(model, seen, mode, accumulate=2)


# Hugging Face Trainer


class ForTrainer(nn.Module):
    """The toy as the Trainer calls it: the loss comes first."""

    def __init__(self):
        super().__init__()
        self.toy = Toy()

    def forward(self, one):
        return {"loss": loss_on(self.toy, one)}


@each_mode
@each_wrapping
@pytest.mark.parametrize("options", [{"clip": CLIP}, {"clip": CLIP, "accumulate": 2}])
def test_the_hugging_face_trainer_equals_the_loop_by_hand_and_resumes(mode, wrapping, options, tmp_path):
    class InOrder(Trainer):
        def _get_train_sampler(self, *_):
            return SequentialSampler(self.train_dataset)

    accumulate = options.get("accumulate", 1)

    def run(steps, resume=False):
        model = ForTrainer()
        optimizer, penalty = penalised(model.toy, mode, wrapping)
        seen = recorded(optimizer, penalty)
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=steps,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=accumulate,
            max_grad_norm=options["clip"],
            lr_scheduler_type="constant",
            save_strategy="steps",
            save_steps=STEPS // accumulate // 2,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
            dataloader_pin_memory=False,
        )
        trainer = InOrder(
            model,
            arguments,
            train_dataset=[{"one": batch(step)} for step in range(STEPS)],
            data_collator=lambda examples: examples[0],
            optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)),
        )
        trainer.train(resume_from_checkpoint=resume)
        return model.toy, seen

    _, before = run(STEPS // accumulate // 2)
    model, after = run(STEPS // accumulate, resume=True)
    assert_equal_by_hand(model, before + after, mode, **options)


# Opacus


@each_mode
@pytest.mark.parametrize("order", ["penalty around", "penalty inside", "attached"])
def test_opacus_shows_the_penalty_noised_gradients_alone(mode, order):
    def private(optimizer, model):
        for p in model.parameters():
            p.grad_sample = None
        generator = torch.Generator().manual_seed(0)
        return DPOptimizer(
            optimizer, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=4, generator=generator
        )

    rule = {**RULE, "threshold": 1.0}  # the noise evens the norms out
    model, twin = Toy(), ByHand(sgd, Toy(), mode, **rule)
    if order == "penalty inside":
        penalty = ConflictAwarePenalty(sgd(model.parameters()), groups_of(model), apply_to=mode, **rule)
        optimizer = private(penalty, model)
    else:
        optimizer = private(sgd(model.parameters()), model)
        put_on = attach if order == "attached" else ConflictAwarePenalty
        penalty = put_on(optimizer, groups_of(model), apply_to=mode, **rule)
        optimizer = optimizer if order == "attached" else penalty
    reference = private(sgd(twin.model.parameters()), twin.model)
    seen, by_hand = [], []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        for (name, p), q in zip(model.named_parameters(), twin.model.parameters(), strict=True):
            p.grad_sample = torch.randn(4, *p.shape, generator=generator) * (1 + 9 * name.startswith("audio"))
            q.grad_sample = p.grad_sample.clone()
        optimizer.step()
        optimizer.zero_grad()
        reference.pre_step()
        twin.step()
        reference.zero_grad()
        seen.append(penalty.coefficients())
        by_hand.append(twin.coefficients)
    assert_same_coefficients(seen, by_hand)
    assert_same_parameters(model, twin.model)


# One optimizer per parameter


def test_an_optimizer_that_steps_one_parameter_in_backward_is_refused(record_property):
    model = Toy()
    with refused(record_property, ValueError, "must hold parameters of the optimizer"):
        ConflictAwarePenalty(adamw([model.text.weight]), groups_of(model))
    with refused(record_property, ValueError, "at least two groups"):
        ConflictAwarePenalty(adamw([model.text.weight]), {"text": [model.text.weight]})
