"""``BalanceCallback`` in Lightning: the loop by hand, several optimizers, resuming, logging, mistakes."""

import pytest
import torch
from torch import nn

from gradbalance import attach, rules
from tests import needs
from tests.contract.optimizers import cancels
from tests.contract.oracle import NAMES, SMOOTHING, Toy
from tests.contract.own_rules import RULES
from tests.integrations.loops import (
    CLIP,
    STEPS,
    Setup,
    adamw,
    assert_equal_by_hand,
    batches,
    coefficients_of,
    loss_on,
)

lightning = needs("lightning")
from lightning.pytorch.loggers import CSVLogger  # noqa: E402

from gradbalance.integrations.lightning import BalanceCallback  # noqa: E402

pytestmark = [
    cancels,
    # Advice on data loading, and a deprecation of torch that Lightning has yet to follow.
    pytest.mark.filterwarnings(
        "ignore:The 'train_dataloader' does not have many workers",
        "ignore:The number of training batches",
        "ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning",
    ),
]

PATTERNS = {name: f"model.{name}" for name in NAMES}


class Lit(lightning.LightningModule):
    """The toy with a plain optimizer; beside it an optimizer of another model, if ``with_other``."""

    def __init__(self, automatic=True, with_other=False):
        super().__init__()
        self.model, self.other = Toy(), nn.Linear(2, 2)
        self.automatic_optimization = automatic
        self.with_other = with_other

    def training_step(self, one, index):
        if self.automatic_optimization:
            return loss_on(self.model, one)
        optimizers = self.optimizers()
        if self.with_other:
            other, optimizers = optimizers
            other.zero_grad()
            self.manual_backward(self.other(one[1]).square().mean())
            other.step()
        optimizers.zero_grad()
        self.manual_backward(loss_on(self.model, one))
        optimizers.step()
        return None

    def configure_optimizers(self):
        optimizer = adamw(self.model.parameters())
        if self.with_other:
            return [torch.optim.SGD(self.other.parameters(), lr=0.1), optimizer]
        return optimizer


def fit(module, callback, data=None, ckpt_path=None, **options):
    defaults = {"max_epochs": 1, "logger": False, "enable_checkpointing": False}
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        callbacks=[callback],
        enable_progress_bar=False,
        enable_model_summary=False,
        **defaults | options,
    )
    trainer.fit(module, data or batches(), ckpt_path=ckpt_path)
    return trainer


def balancing(setup):
    return BalanceCallback(
        PATTERNS, RULES[setup.rule][0](), apply_to=setup.mode, smoothing=SMOOTHING
    )


@pytest.mark.parametrize(
    ("setup", "options"),
    [
        (Setup(by=attach), {"clip": CLIP}),
        (Setup(by=attach, rule="own"), {"accumulate": 2}),
        (Setup("gradient", attach, "coherence"), {}),
    ],
    ids=str,
)
def test_the_callback_equals_the_loop_by_hand(setup, options):
    module, callback = Lit(), balancing(setup)
    accumulate = options.get("accumulate", 1)
    fit(
        module,
        callback,
        gradient_clip_val=options.get("clip"),
        accumulate_grad_batches=accumulate,
    )
    assert_equal_by_hand(module.model, coefficients_of(callback), setup, **options)


@pytest.mark.parametrize("with_other", [False, True], ids=["one optimizer", "two optimizers"])
def test_manual_optimization_equals_the_loop_by_hand_and_resumes(with_other, tmp_path):
    setup = Setup(by=attach, rule="coherence")
    first, second = balancing(setup), balancing(setup)
    half = fit(Lit(False, with_other), first, batches(range(4)))
    half.save_checkpoint(tmp_path / "half")
    module = Lit(False, with_other)
    fit(module, second, batches(range(4, STEPS)), tmp_path / "half", max_epochs=2)
    seen = coefficients_of(first) + coefficients_of(second)
    assert_equal_by_hand(module.model, seen, setup)


def test_a_fast_run_of_one_batch_works_and_prints_the_table(capsys):
    callback = BalanceCallback(PATTERNS)
    fit(Lit(), callback, fast_dev_run=True)
    assert callback.penalty.balance.step == 1
    assert str(callback.recorder.summary()) in capsys.readouterr().out


def test_it_logs_where_and_when_lightning_logs(tmp_path):
    callback = BalanceCallback(PATTERNS, rules.ByHand(text=0.5))
    trainer = fit(Lit(), callback, logger=CSVLogger(tmp_path), log_every_n_steps=4)
    logged = trainer.logged_metrics
    assert logged["gradbalance/coefficients/text"] == 0.5
    assert logged["gradbalance/norms/visual"] > 0
    rows = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()
    assert len(rows) == 1 + STEPS // 4


@pytest.mark.filterwarnings("ignore:.* times as far as")  # of weight decay alone
def test_a_group_that_never_gets_a_gradient_is_warned_of_after_twenty_steps():
    class Deaf(Lit):
        def training_step(self, one, index):
            (text, _, visual), target = one
            output = self.model.head(self.model.text(text) + self.model.visual(visual))
            return (output - target).abs().mean() + 0 * self.model.audio.weight.sum()

    with pytest.warns(UserWarning, match=r"`audio` is in the optimizer but never had a gradient"):
        fit(Deaf(), BalanceCallback(PATTERNS), max_epochs=3)


def test_groups_in_two_optimizers_are_refused_by_name():
    class Apart(Lit):
        def configure_optimizers(self):
            return [adamw(self.model.text.parameters()), adamw(self.model.audio.parameters())]

    message = r"`groups\['audio'\]` must hold parameters of the optimizer.* of one optimizer"
    groups = {name: PATTERNS[name] for name in ("text", "audio")}
    with pytest.raises(ValueError, match=message):
        fit(Apart(False), BalanceCallback(groups))
