"""The penalty in the Hugging Face Trainer: one line in ``callbacks``; its own optimizer, clipping, logs and resuming.

Run ``python examples/huggingface_trainer.py``.
"""

import tempfile

import torch
from torch import nn
from torch.nn.functional import mse_loss
from transformers import Trainer, TrainingArguments

from gradbalance.integrations.transformers import BalanceCallback


class Regression(nn.Module):
    """A branch for each modality; the loss comes with the predictions, as the Trainer expects."""

    def __init__(self) -> None:
        super().__init__()
        self.audio, self.visual = nn.Linear(20, 1), nn.Linear(5, 1)

    def forward(self, audio, visual, labels):
        prediction = self.audio(audio) + self.visual(visual)  # [B, 1]
        return {"loss": mse_loss(prediction, labels), "logits": prediction}


def train(folder: str, steps: int, resume: bool = False) -> dict[str, float]:
    """Train up to a step, saving halfway; the coefficients of the last step."""
    torch.manual_seed(0)
    audio, visual = torch.randn(500, 20), torch.randn(500, 5)
    target = audio.mean(1, keepdim=True) + visual.mean(1, keepdim=True)
    data = [
        {"audio": a, "visual": v, "labels": y}
        for a, v, y in zip(audio, visual, target, strict=True)
    ]
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        save_steps=max(1, steps // 2),
        learning_rate=1e-2,
        lr_scheduler_type="cosine",
        logging_steps=20,
        report_to=[],  # whatever stands here gets the balance too
        dataloader_pin_memory=False,
    )
    balance = BalanceCallback({"audio": "audio", "visual": "visual"})
    trainer = Trainer(Regression(), arguments, train_dataset=data, callbacks=[balance])
    trainer.train(resume_from_checkpoint=resume)
    return balance.penalty.coefficients()


def main(steps: int = 100) -> dict[str, float]:
    """Train, then resume from the last checkpoint and train as long again."""
    with tempfile.TemporaryDirectory() as folder:
        train(folder, steps)
        return train(folder, 2 * steps, resume=True)


if __name__ == "__main__":
    print(main())
