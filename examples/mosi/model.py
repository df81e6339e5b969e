"""The model of arXiv 2605.28575 for any set of named non-text modalities.

[P] marks what the paper states, [R] what it leaves open and is chosen here. Shapes: B utterances, L sub-words, T steps
of a modality (L, or 1 for one vector an utterance), D its features, Z its latent width, K the width of the fusion,
W that of the text.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.mosi.config import Config
from examples.mosi.data import Batch
from examples.mosi.draw import Draw, Dropout, own_noise


class Latent(NamedTuple):
    z: Tensor  # [B, T, Z], 0 where the modality is absent
    mean: Tensor
    variance: Tensor | None  # None without AME


class Output(NamedTuple):
    prediction: Tensor  # [B]
    heads: dict[str, Tensor]  # each [B]
    latents: dict[str, Latent]
    reconstructions: dict[str, Tensor]  # each [B, T, D]
    statistics: dict[
        str, tuple[Tensor, Tensor] | Tensor
    ]  # what is compared with the inputs, each [B, T, D]
    pooled: dict[str, Tensor]  # output of each encoder, mean over its steps, each [B, Z] or [B, W]


def mlp(width: int, hidden: int, out: int, p: float, draw: Draw) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width, hidden), nn.ReLU(), Dropout(p, draw), nn.Linear(hidden, out)
    )


class Adapter(nn.Module):
    """The trainable part of a frozen text encoder: normalised states and a bottleneck beside them [R]."""

    def __init__(self, width: int, hidden: int, p: float, draw: Draw) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.bottleneck = mlp(width, hidden, width, p, draw)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        states = self.norm(states)
        return states + self.bottleneck(states)  # [B, L, W]


class Transformer(nn.Module):
    """A transformers encoder that is trained, on token numbers or on the states below its layers; it sees no padding.

    Its dropout draws for the whole batch, as ours does. Under bf16 its matrix products alone are in bfloat16.
    """

    def __init__(self, encoder: nn.Module, draw: Draw, precision: str) -> None:
        super().__init__()
        self.encoder, self.bf16 = encoder, precision == "bf16"
        for module in list(encoder.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.Dropout):
                    setattr(module, name, Dropout(child.p, draw))

    def forward(self, text: Tensor, mask: Tensor) -> Tensor:
        given = {"inputs_embeds" if text.is_floating_point() else "input_ids": text}
        with torch.autocast(text.device.type, torch.bfloat16, enabled=self.bf16):
            return self.encoder(
                **given, attention_mask=mask.long()
            ).last_hidden_state.float()  # [B, L, W]


class AME(nn.Module):
    """Adaptive modality encoder, z = mu + eps * sqrt(var + 1e-6) [P]; softplus keeps var positive [R].

    In evaluation z = mu, and the model takes the mean of its prediction over draws. `noisy=False` leaves the variance
    net out: z = mu.
    """

    def __init__(
        self, width: int, hidden: int, latent: int, p: float, draw: Draw, noisy: bool
    ) -> None:
        super().__init__()
        self.mean = mlp(width, hidden, latent, p, draw)
        self.variance = mlp(width, hidden, latent, p, draw) if noisy else None
        self.draw = draw

    def forward(self, x: Tensor, mask: Tensor) -> Latent:
        z = mean = self.mean(x)  # [B, T, Z]
        variance = None if self.variance is None else F.softplus(self.variance(x))
        if self.training and variance is not None:
            z = noisy(mean, variance, self.draw(torch.randn, mean))
        return Latent(z * mask[..., None], mean, variance)


def noisy(mean: Tensor, variance: Tensor, noise: Tensor) -> Tensor:
    return mean + noise * (variance + 1e-6).sqrt()


class GatedFusion(nn.Module):
    """h = tanh(W_p z) [P], z = sum_m p_m * tanh(W_m z_m), p the softmax over the modalities present (GMU) [R].

    Without a gate, z is their mean. Where none is present h = 0.
    """

    def __init__(self, widths: Mapping[str, int], fused: int, out: int, gated: bool) -> None:
        super().__init__()
        self.values = nn.ModuleDict(
            {name: nn.Linear(width, fused) for name, width in widths.items()}
        )
        self.gates = nn.Linear(sum(widths.values()), len(widths) * fused) if gated else None
        self.project = nn.Linear(fused, out, bias=False)

    def forward(
        self, latents: Mapping[str, Tensor], masks: Mapping[str, Tensor], steps: int
    ) -> Tensor:
        def spread(x: Tensor) -> Tensor:  # [B, T, ...] -> [B, L, ...]
            return x.expand(-1, steps, *x.shape[2:])

        values = torch.stack(
            [spread(self.values[name](z).tanh()) for name, z in latents.items()], 2
        )  # [B, L, N, K]
        present = torch.stack([spread(masks[name]) for name in latents], 2)[
            ..., None
        ]  # [B, L, N, 1]
        logits = torch.zeros_like(values)
        if self.gates is not None:
            logits = self.gates(torch.cat([spread(z) for z in latents.values()], -1)).view_as(
                values
            )
        gates = logits.masked_fill(~present, torch.finfo(logits.dtype).min).softmax(2) * present
        return self.project((gates * values).sum(2)).tanh()  # [B, L, W]


class Model(nn.Module):
    """Sentiment in [-3, 3] from text and other modalities: H = T + beta * h [P], LayerNorm, masked mean, head.

    Args:
        config: Widths, switches and the weights of the losses: what has weight 0 is not built.
        text: Gives T; None leaves T = 0.
        width: W.
        widths: D of each non-text modality.
        draw: Where dropout and the noise of AME come from.
    """

    def __init__(
        self,
        config: Config,
        text: nn.Module | None,
        width: int,
        widths: Mapping[str, int],
        draw: Draw,
    ) -> None:
        super().__init__()
        self.beta, self.width, self.draw, p = config.beta, width, draw, config.dropout
        self.draws, self.noisy = config.draws, config.ame and bool(widths)
        latents = {name: config.latent or wide for name, wide in widths.items()}
        self.text = text
        self.encoders = nn.ModuleDict(
            {
                name: AME(wide, config.hidden, latents[name], p, draw, config.ame)
                for name, wide in widths.items()
            }
        )
        self.fusion = GatedFusion(latents, config.fused, width, config.gate) if widths else None
        self.norm, self.dropout, self.head = (
            nn.LayerNorm(width),
            Dropout(p, draw),
            nn.Linear(width, 1),
        )
        if isinstance(
            text, Transformer
        ):  # states of the scale that it gives itself: else the head outruns it [R]
            nn.init.constant_(self.norm.weight, 0.1)
        pooled = ({"text": width} if text else {}) | latents
        self.heads = nn.ModuleDict(
            {name: nn.Linear(w, 1) for name, w in pooled.items() if config.uni}
        )
        self.decoders = nn.ModuleDict(
            {name: nn.Linear(latents[name], w) for name, w in widths.items() if config.recon}
        )
        # z is compared with the inputs as it is; only where the widths differ through a linear map [R].
        uneven = {name: w for name, w in widths.items() if config.stat and w != latents[name]}
        self.maps = nn.ModuleDict({name: nn.Linear(latents[name], w) for name, w in uneven.items()})
        self.statistics = tuple(widths) if config.stat else ()

    def groups(self) -> dict[str, nn.Module]:
        """The encoder of each modality: what the penalty balances."""
        return ({"text": self.text} if self.text else {}) | dict(self.encoders.items())

    def forward(self, batch: Batch) -> Output:
        """In evaluation the prediction is its mean over draws of the latent noise, and z = mu everywhere else."""
        self.draw.begin(batch)
        latents = self.encode(batch)
        zs = {name: latent.z for name, latent in latents.items()}
        pooled = {name: pool(z, batch.masks[name]) for name, z in zs.items()}
        states = torch.zeros(*batch.mask.shape, self.width, device=batch.mask.device)
        if self.text is not None:
            states = self.text(batch.text, batch.mask)
            pooled["text"] = pool(states, batch.mask)
        if self.training or not self.noisy:
            prediction = self.predict(states, zs, batch)
        else:
            prediction = self.expected(states, latents, batch)
        return Output(
            prediction,
            {
                name: head(self.dropout(pooled[name])).squeeze(-1)
                for name, head in self.heads.items()
            },
            latents,
            {name: decoder(zs[name]) for name, decoder in self.decoders.items()},
            {name: self.statistic(name, latents[name]) for name in self.statistics},
            pooled,
        )

    def encode(self, batch: Batch) -> dict[str, Latent]:
        return {
            name: encoder(batch.features[name], batch.masks[name])
            for name, encoder in self.encoders.items()
        }

    def predict(self, states: Tensor, zs: Mapping[str, Tensor], batch: Batch) -> Tensor:
        if self.fusion is not None:
            states = torch.add(
                states, self.fusion(zs, batch.masks, batch.mask.shape[1]), alpha=self.beta
            )
        return self.head(self.dropout(pool(self.norm(states), batch.mask))).squeeze(-1)  # [B]

    def expected(self, states: Tensor, latents: Mapping[str, Latent], batch: Batch) -> Tensor:
        """Mean prediction over the draws, with noise that belongs to the utterance, whatever batch it is in."""
        noise = {
            name: own_noise(name, batch, latent.mean, self.draws)
            for name, latent in latents.items()
        }
        total = torch.zeros_like(batch.labels)
        for draw in range(self.draws):
            zs = {
                name: noisy(mean, variance, noise[name][draw]) * batch.masks[name][..., None]
                for name, (_, mean, variance) in latents.items()
            }
            total += self.predict(states, zs, batch)
        return total / self.draws

    def statistic(self, name: str, latent: Latent) -> tuple[Tensor, Tensor] | Tensor:
        if name not in self.maps:
            return latent.z if latent.variance is None else (latent.mean, latent.variance)
        linear = self.maps[name]
        if latent.variance is None:
            return linear(latent.z)
        return linear(latent.mean), F.linear(latent.variance, linear.weight.square())


def pool(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over the steps that exist, [B, T, D] -> [B, D]; 0 where none does."""
    return (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
