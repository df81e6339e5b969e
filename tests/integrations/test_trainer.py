"""Hugging Face's Trainer gives the parameters and coefficients of the loop by hand."""

import pytest
import torch
from torch import nn
from torch.utils.data import SequentialSampler

from tests import needs
from tests.contract.optimizers import cancels
from tests.contract.oracle import Toy, batch
from tests.integrations.loops import (
    CLIP,
    STEPS,
    assert_equal_by_hand,
    each_setup,
    loss_on,
    penalised,
    recorded,
)

needs("accelerate")  # without it the Trainer does not start
transformers = needs("transformers", "mosi")

pytestmark = cancels


class ForTrainer(nn.Module):
    """The toy as the Trainer calls it: the loss comes first."""

    def __init__(self):
        super().__init__()
        self.toy = Toy()

    def forward(self, one):
        return {"loss": loss_on(self.toy, one)}


@each_setup
@pytest.mark.parametrize("options", [{"clip": CLIP}, {"clip": CLIP, "accumulate": 2}])
def test_the_hugging_face_trainer_equals_the_loop_by_hand_and_resumes(setup, options, tmp_path):
    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_):
            return SequentialSampler(self.train_dataset)

    accumulate = options.get("accumulate", 1)

    def run(steps, resume=False):
        model = ForTrainer()
        optimizer, penalty = penalised(model.toy, setup)
        seen = recorded(optimizer, penalty)
        arguments = transformers.TrainingArguments(
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
    assert_equal_by_hand(model, before + after, setup, **options)
