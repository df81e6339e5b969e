"""The penalty in the Hugging Face Trainer: hand it the wrapped optimizer; clipping and resuming stay its own.

Run ``python examples/huggingface_trainer.py``.
"""

import tempfile

import torch
from torch import nn
from torch.nn.functional import mse_loss
from transformers import (
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_cosine_schedule_with_warmup,
)

from gradbalance import ConflictAwarePenalty, Recorder


class Regression(nn.Module):
    """A branch for each modality; the loss comes with the predictions, as the Trainer expects."""

    def __init__(self) -> None:
        super().__init__()
        self.audio, self.visual = nn.Linear(20, 1), nn.Linear(5, 1)

    def forward(self, audio, visual, labels):
        prediction = self.audio(audio) + self.visual(visual)  # [B, 1]
        return {"loss": mse_loss(prediction, labels), "logits": prediction}


class RecordBalance(TrainerCallback):
    """Records the balance of every step and prints it as a table at the end."""

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        self.recorder = Recorder(optimizer)

    def on_train_end(self, args, state, control, **kwargs):
        self.recorder.close()
        if state.is_world_process_zero:
            print(self.recorder.summary())


def train(folder: str, steps: int, resume: bool = False) -> dict[str, float]:
    """Train up to a step, saving halfway; the coefficients of the last step."""
    torch.manual_seed(0)
    audio, visual = torch.randn(500, 20), torch.randn(500, 5)
    target = audio.mean(1, keepdim=True) + visual.mean(1, keepdim=True)
    data = [
        {"audio": a, "visual": v, "labels": y}
        for a, v, y in zip(audio, visual, target, strict=True)
    ]
    model = Regression()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    optimizer = ConflictAwarePenalty(optimizer, {"audio": model.audio, "visual": model.visual})
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        save_steps=max(1, steps // 2),
        max_grad_norm=1.0,
        report_to=[],
    )
    schedule = get_cosine_schedule_with_warmup(
        optimizer, num_warmup_steps=1, num_training_steps=steps
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=data,
        optimizers=(optimizer, schedule),
        callbacks=[RecordBalance()],
    )
    trainer.train(resume_from_checkpoint=resume)
    return optimizer.coefficients()


def main(steps: int = 100) -> dict[str, float]:
    """Train, then resume from the last checkpoint and train as long again."""
    with tempfile.TemporaryDirectory() as folder:
        train(folder, steps)
        return train(folder, 2 * steps, resume=True)


if __name__ == "__main__":
    print(main())
