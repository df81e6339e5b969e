"""See what each tower of a vision-language model does, tuned by LoRA in the Trainer; and three mistakes found by name.

The model is small and random. ``pip install peft transformers accelerate``, then ``python examples/lora_towers.py``;
``lora_towers.md`` explains what it prints.
"""

import tempfile
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

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

from gradbalance import groups_by_name, rules
from gradbalance.integrations.transformers import BalanceCallback

# The groups, by name. What is frozen in them takes no part.
TOWERS = {
    "vision": "*.vision_tower.*",
    "projector": "*.multi_modal_projector.*",
    "language": "*.language_model.*",
}
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
    """The parameters of each tower; ``print`` it to see what is where."""
    return groups_by_name(model, **TOWERS)


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
    optimizer: torch.optim.Optimizer | None,
    steps: int,
    callbacks: Iterable[TrainerCallback] = (),
) -> None:
    """Train with the Trainer in bf16, which makes an AdamW of its own if there is no optimizer."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            report_to=[],
        )
        trainer = Trainer(
            model,
            arguments,
            train_dataset=examples(256),
            optimizers=(optimizer, None),
            callbacks=list(callbacks),
        )
        trainer.train()


def trainable(model: PeftModel) -> list[torch.nn.Parameter]:
    """The entries of LoRA; to hand the optimizer all parameters does as well."""
    return [p for p in model.parameters() if p.requires_grad]


def left_out(model: PeftModel) -> torch.optim.Optimizer:
    """Planted: the optimizer does not hold the vision tower."""
    named = model.named_parameters()
    return torch.optim.AdamW([p for name, p in named if "vision" not in name], lr=1e-3)


def frozen(model: PeftModel) -> None:
    """Planted: the vision tower is frozen."""
    for name, p in model.named_parameters():
        if "vision_tower" in name:
            p.requires_grad_(False)


def unheard(model: PeftModel) -> None:
    """Planted: the vision tower runs under a forgotten ``no_grad``."""
    tower = model.get_submodule("base_model.model.model.vision_tower")
    tower.forward = torch.no_grad()(tower.forward)


MISTAKES = [left_out, frozen, unheard]


def said_of(mistake: Callable) -> list[str]:
    """What you are told of a mistake within 20 steps, as warnings or as an error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = model_with_lora()
        optimizer = mistake(model)
        try:
            train(model, optimizer, 20, [BalanceCallback(TOWERS)])
        except ValueError as error:
            return [str(error)]
    return [str(each.message) for each in caught if "`vision`" in str(each.message)]


def main(steps: int = 200, rank: int = 8, rule: Callable | None = None) -> BalanceCallback:
    """Train, and print the table; the callback, which has the penalty and the record."""
    model = model_with_lora(rank)
    balance = BalanceCallback(TOWERS, rule or rules.Useful())
    train(model, None, steps, [balance])
    return balance


if __name__ == "__main__":
    main().recorder.plot(Path(__file__).with_suffix(".png"))
    for mistake in MISTAKES:
        print(mistake.__name__, *said_of(mistake), sep="\n  ")
