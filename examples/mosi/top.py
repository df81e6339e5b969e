"""The top layers of a transformers encoder, trained on the states below them, which are computed once."""

import torch
from torch import Tensor, nn


class Given(nn.Module):
    """Stands where the embeddings were, and passes on the states that come in their place, [B, L, W]."""

    def forward(self, *args, **kwargs) -> Tensor:
        return next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.dim() == 3)


def top(encoder: nn.Module, count: int) -> nn.Module:
    """`encoder` cut down to its top `count` layers, 0 for all, which alone are trained.

    It is then called with the states below them: ``encoder(inputs_embeds=states)``.

    What the layers share (masks, relative positions and their biases) is computed by the encoder's own code, and is
    frozen with the embeddings.

    Raises:
        ValueError: If the encoder has fewer layers, or cannot be cut.
    """
    layers = layers_of(encoder)
    if not 0 <= count <= len(layers):
        raise ValueError(
            f"`text_layers` must be from 0 (all) to the {len(layers)} layers of the encoder. Got {count}. Choose fewer."
        )
    encoder.requires_grad_(False)
    del layers[: len(layers) - (count or len(layers))]
    layers.requires_grad_(True)
    encoder.embeddings = Given()
    return encoder


def layers_of(encoder: nn.Module) -> nn.ModuleList:
    depth = getattr(encoder.config, "num_hidden_layers", 0)
    lists = [
        module
        for module in encoder.modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    if len(lists) != 1 or not hasattr(encoder, "embeddings"):
        raise refusal(encoder, "no single list of its layers above its embeddings")
    return lists[0]


@torch.inference_mode()
def check_split(encoder: nn.Module, count: int, numbers: Tensor, mask: Tensor) -> None:
    """Refuses an encoder whose top layers, given the states below them, do not return what the whole one does.

    The encoder is cut: give one that is not needed any more.
    """
    below, mask = len(layers_of(encoder)) - count if count else 0, mask.long()
    whole = encoder(input_ids=numbers, attention_mask=mask, output_hidden_states=True)
    upper = top(encoder, count)
    try:
        again = upper(
            inputs_embeds=whole.hidden_states[below], attention_mask=mask
        ).last_hidden_state
    except Exception as error:
        raise refusal(encoder, repr(error)) from error
    real = mask.bool()
    if not torch.allclose(again[real], whole.last_hidden_state[real], atol=1e-4, rtol=1e-4):
        raise refusal(encoder, "other states from its top layers than from the whole")


def refusal(encoder: nn.Module, found: str) -> ValueError:
    return ValueError(
        f'`text_encoder` must have layers that can be run alone with text="top". Got {type(encoder).__name__}, with '
        f"{found}. Use --text finetune, which trains all of it."
    )
