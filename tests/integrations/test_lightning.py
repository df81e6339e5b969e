"""Lightning's Trainer and Fabric give the parameters and coefficients of the loop by hand."""

import pytest
import torch

from gradbalance import attach
from tests import needs
from tests.contract.optimizers import cancels
from tests.contract.oracle import Toy
from tests.integrations.loops import (
    CLIP,
    STEPS,
    Setup,
    adamw,
    assert_equal_by_hand,
    batches,
    each_setup,
    loss_on,
    penalised,
    recorded,
)

lightning = needs("lightning")
from lightning.pytorch.callbacks import LearningRateMonitor  # noqa: E402
from lightning.pytorch.loggers.logger import DummyLogger  # noqa: E402
from lightning.pytorch.plugins import MixedPrecision  # noqa: E402

pytestmark = cancels


class Lit(lightning.LightningModule):
    def __init__(self, setup, automatic=True):
        super().__init__()
        self.model, self.automatic_optimization = Toy(), automatic
        self.setup_of, self.seen = setup, []

    def training_step(self, one, index):
        loss = loss_on(self.model, one)
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            self.manual_backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        return loss

    def configure_optimizers(self):
        optimizer, penalty = penalised(self.model, self.setup_of)
        self.seen = recorded(optimizer, penalty)
        return optimizer


def fit(module, data=None, ckpt_path=None, **options):
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 1, "logger": False, **options},
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
@each_setup
@pytest.mark.parametrize(
    "options", [{}, {"clip": CLIP}, {"accumulate": 2}, {"clip": CLIP, "accumulate": 2}]
)
def test_lightning_with_automatic_optimization_equals_the_loop_by_hand(setup, options):
    module = Lit(setup)
    accumulate = options.get("accumulate", 1)
    fit(module, gradient_clip_val=options.get("clip"), accumulate_grad_batches=accumulate)
    assert_equal_by_hand(module.model, module.seen, setup, **options)


@of_lightning
@each_setup
def test_lightning_with_manual_optimization_equals_the_loop_by_hand(setup):
    module = Lit(setup, automatic=False)
    fit(module)
    assert_equal_by_hand(module.model, module.seen, setup)


@of_lightning
@each_setup
@pytest.mark.parametrize("clip", [None, CLIP])
def test_lightning_with_a_loss_scaler_equals_the_loop_by_hand(setup, clip):
    class Float32(MixedPrecision):
        """The loss scaling alone: autocast to float16 would need a tolerance."""

        def autocast_context_manager(self):
            return torch.autocast("cpu", enabled=False)

    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    module = Lit(setup)
    fit(module, gradient_clip_val=clip, plugins=[Float32("16-mixed", "cpu", scaler)])
    assert_equal_by_hand(module.model, module.seen, setup, clip=clip)


@of_lightning
@each_setup
def test_lightning_resumes_from_a_checkpoint(setup, tmp_path):
    halfway, resumed = Lit(setup), Lit(setup)
    fit(halfway, batches(range(4))).save_checkpoint(tmp_path / "half")
    fit(resumed, batches(range(4, STEPS)), tmp_path / "half", max_epochs=2)
    assert_equal_by_hand(resumed.model, halfway.seen + resumed.seen, setup)


class Scheduled(Lit):
    """Another learning rate for each part of the model, on a schedule."""

    def __init__(self, setup=None, on_inner=False):
        super().__init__(setup)
        self.on_inner = on_inner

    def configure_optimizers(self):
        parts = self.model.children()
        plain = adamw(
            [{"params": part.parameters(), "lr": 0.01 * i} for i, part in enumerate(parts, start=1)]
        )
        optimizer = plain
        if self.setup_of is not None:
            optimizer, _ = penalised(self.model, self.setup_of, make=lambda _: plain)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(
            plain if self.on_inner else optimizer, 0.5
        )
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def logged(module):
    """The learning rates that Lightning logs, whatever names it gives them."""
    monitor = LearningRateMonitor()
    fit(module, callbacks=[monitor], logger=DummyLogger(), log_every_n_steps=1)
    return list(monitor.lrs.values())


@of_lightning
@pytest.mark.parametrize(
    ("setup", "on_inner"), [(Setup(), False), (Setup(), True), (Setup(by=attach), False)]
)
def test_lightning_logs_each_learning_rate_once(setup, on_inner):
    expected = [[0.01 * i * 0.5**step for step in range(STEPS)] for i in (1, 2, 3, 4)]
    assert logged(Scheduled()) == expected
    assert logged(Scheduled(setup, on_inner)) == expected


@each_setup
@pytest.mark.parametrize("options", [{}, {"clip": CLIP}, {"accumulate": 2}])
def test_fabric_equals_the_loop_by_hand(setup, options, tmp_path):
    def build():
        fabric = lightning.Fabric(accelerator="cpu", devices=1)
        model = Toy()
        optimizer, penalty = penalised(model, setup)
        return fabric, *fabric.setup(model, optimizer), penalty

    accumulate = options.get("accumulate", 1)
    fabric, model, optimizer, penalty = build()
    seen = []
    for i, one in enumerate(batches()):
        fabric.backward(loss_on(model, one) / accumulate)
        if (i + 1) % accumulate:
            continue
        if "clip" in options:
            fabric.clip_gradients(model, optimizer, max_norm=options["clip"])
        optimizer.step()
        optimizer.zero_grad()
        seen.append(penalty.coefficients())
        if i == STEPS // 2 - 1:
            fabric.save(tmp_path / "half", {"model": model, "optimizer": optimizer})
            fabric, model, optimizer, penalty = build()
            fabric.load(tmp_path / "half", {"model": model, "optimizer": optimizer})
    assert_equal_by_hand(model, seen, setup, **options)
