"""Groups need not be modalities: attention, MLP, norms and embeddings of one encoder, beside layer-wise decay.

Run ``python examples/one_encoder.py``: it prints what each kind of layer does, and the factor that a rule would give it.
"""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from gradbalance import ConflictAwarePenalty, Recorder, groups_by_name, rules

WORDS, LENGTH, WIDTH, LAYERS = 16, 11, 32, 3


class Encoder(nn.Module):
    """Reads words and says whether most of them are odd."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.places = nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, LAYERS)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, sentence: torch.Tensor) -> torch.Tensor:
        features = self.layers(self.words(sentence) + self.places)
        return self.head(features[:, 0])


def batch(size: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    sentence = torch.randint(0, WORDS, (size, LENGTH))
    return sentence, ((sentence % 2).sum(1) > LENGTH / 2).long()


def layer_wise(model: Encoder, lr: float, decay: float) -> list[dict]:
    """param_groups whose learning rate falls by ``decay`` from each layer to the one below it."""
    depths: dict[int, list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        depth = 0  # embeddings
        if name.startswith("layers.layers."):
            depth = 1 + int(name.split(".")[2])
        elif name.startswith("head"):
            depth = LAYERS + 1
        depths.setdefault(depth, []).append(p)
    return [
        {"params": parameters, "lr": lr * decay ** (LAYERS + 1 - depth)}
        for depth, parameters in depths.items()
    ]


def main(steps: int = 200, rule: rules.Rule | None = None) -> dict[str, float]:
    """Train; the coefficient of each kind of layer in the last step."""
    torch.manual_seed(0)
    model = Encoder()
    optimizer = torch.optim.AdamW(layer_wise(model, lr=2e-3, decay=0.8))
    groups = groups_by_name(
        model,
        attention="*.self_attn.*",
        mlp=["*.linear1.*", "*.linear2.*"],
        norms="*.norm?.*",
        embeddings=["words", "places"],
    )
    print(groups, end="\n\n")  # what is in no group, the head, is never touched
    # Each param_group holds parameters of several groups, and each group is in several of them.
    optimizer = ConflictAwarePenalty(optimizer, groups, rule or rules.Useful())
    with Recorder(optimizer) as recorder:
        for _ in range(steps):
            sentence, target = batch()
            optimizer.zero_grad()
            cross_entropy(model(sentence), target).backward()
            optimizer.step()
    print(recorder.summary(), end="\n\n")
    sentence, target = batch(1000)
    print(f"accuracy {(model(sentence).argmax(1) == target).float().mean():.1%}")
    return optimizer.coefficients()


if __name__ == "__main__":
    main()
