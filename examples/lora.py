"""The penalty on the LoRA adapters of a vision-language model: a group for each tower, chosen by name.

Only parameters that require a gradient count, so the frozen towers cost nothing. Here a tiny CLIP with random weights;
with a pretrained one nothing changes but the ``from_pretrained``.

Run ``python examples/lora.py``.
"""

import torch
from peft import LoraConfig, get_peft_model
from transformers import CLIPConfig, CLIPModel

from gradbalance import ConflictAwarePenalty, groups_by_name

TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 99}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
IDS = {"bos_token_id": 0, "eos_token_id": 98, "pad_token_id": 1}


def main(steps: int = 100) -> dict[str, float]:
    """Train; the coefficients of the last step."""
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config=TEXT | IDS | {"max_position_embeddings": 16},
        vision_config=VISION | {"image_size": 16, "patch_size": 8},
    )
    model = get_peft_model(CLIPModel(config), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    groups = groups_by_name(model, vision="*vision_model*lora_*", text="*text_model*lora_*")
    print({name: sum(p.numel() for p in adapters) for name, adapters in groups.items()})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    optimizer = ConflictAwarePenalty(optimizer, groups)
    for _ in range(steps):
        kind = torch.randint(0, 90, (8,))
        images = torch.randn(8, 3, 16, 16) + kind.view(-1, 1, 1, 1) / 45 - 1  # [B, C, H, W]
        captions = torch.cat((kind[:, None].expand(-1, 4) + 2, torch.full((8, 1), IDS["eos_token_id"])), 1)  # [B, T]
        optimizer.zero_grad()
        model(input_ids=captions, pixel_values=images, return_loss=True).loss.backward()
        optimizer.step()
    return optimizer.coefficients()


if __name__ == "__main__":
    print(main())
