"""A rate for each tower of a vision-language model that is tuned by LoRA: groups by name, frozen base, bf16, Trainer.

The model is small and random. ``pip install peft transformers``, then ``python examples/lora_towers.py``.
"""

import tempfile
from collections.abc import Callable

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from gradbalance import ConflictAwarePenalty, groups_by_name

IMAGE = 63  # the token that stands for a patch of the image
PATCHES, WORDS = 4, 6


def model_with_lora(rank: int = 8) -> PeftModel:
    """A vision tower, a projector and a language model, all frozen, with LoRA on the linear layers of each."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    vision = CLIPVisionConfig(**sizes, image_size=16, patch_size=8, projection_dim=32)
    text = LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=64, max_position_embeddings=32)
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, vision_feature_layer=-1
    )
    base = LlavaForConditionalGeneration(config).to(torch.bfloat16)
    linear = ["q_proj", "v_proj", "linear_1", "linear_2"]
    return get_peft_model(base, LoraConfig(r=rank, target_modules=linear))


def towers(model: PeftModel) -> dict[str, list[torch.nn.Parameter]]:
    """The groups, by name. What is frozen in them does not count; print them to see what is where."""
    return groups_by_name(
        model,
        vision="*.vision_tower.*",
        projector="*.multi_modal_projector.*",
        language="*.language_model.*",
    )


def examples(count: int) -> list[dict[str, torch.Tensor]]:
    """Images whose brightness tells the words that follow."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(count):
        word = int(torch.randint(1, 60, (), generator=generator))
        image = torch.randn(3, 16, 16, generator=generator) + word / 30
        tokens = torch.tensor([IMAGE] * PATCHES + [word] * WORDS)
        labels = torch.where(tokens == IMAGE, -100, tokens)
        rows.append(
            {"input_ids": tokens, "pixel_values": image.to(torch.bfloat16), "labels": labels}
        )
    return rows


def train(
    model: PeftModel,
    optimizer: torch.optim.Optimizer,
    steps: int,
    callbacks: tuple[TrainerCallback, ...] = (),
) -> None:
    """Train with the Trainer in bf16."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=4,
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            report_to=[],
        )
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
        trainer = Trainer(
            model,
            arguments,
            train_dataset=examples(32),
            optimizers=(optimizer, schedule),
            callbacks=list(callbacks),
        )
        trainer.train()


def trainable(model: PeftModel) -> list[torch.nn.Parameter]:
    """The entries of LoRA; to hand the optimizer all parameters does as well."""
    return [p for p in model.parameters() if p.requires_grad]


def main(steps: int = 30, rank: int = 8, rule: Callable | None = None) -> dict[str, float]:
    """Train; the coefficient of each tower in the last step."""
    model = model_with_lora(rank)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-3)
    options = {} if rule is None else {"rule": rule}
    optimizer = ConflictAwarePenalty(optimizer, towers(model), **options)
    train(model, optimizer, steps)
    return optimizer.coefficients()


if __name__ == "__main__":
    print(main())
