"""Fine-tuning: a pretrained encoder at its own rate beside a small new branch that matters too.

``python -m benchmarks.balancing.finetune`` trains what is missing and writes ``results/finetune.md``. Both branches see
real text, the transcripts of CMU-MOSI: MiniLM, of which the two top layers are trained, the second half of each
utterance, and a new perceptron the features of the first half, which MiniLM gave without training. Neither half alone
says all. Each run is a line of ``results/finetune.jsonl``.
"""

import argparse
from functools import cache
from pathlib import Path
from statistics import fmean, stdev
from time import process_time
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks._markdown import table
from benchmarks._statistics import interval
from benchmarks.balancing.model import score
from benchmarks.mosi.ablation import append, read, repair
from examples.mosi.data import load
from examples.mosi.text import locate, transformer
from examples.mosi.top import top
from gradbalance import ConflictAwarePenalty, rules
from gradbalance.rules.base import Vector

RESULTS = Path(__file__).parent / "results"
SEEDS = range(400, 410)
RATES = ((1e-4, 1e-3), (3e-5, 1e-3), (1e-4, 1e-4))  # of the encoder, and of what is new
EPOCHS, BATCH, WIDTH = 4, 32, 64
LAYERS = 2  # of the encoder, the last ones, are trained


def blind(measured: rules.Measured) -> Vector:
    """The default rule as if it did not know that the rates differ."""
    return rules.Useful()(measured._replace(rates=None))


ARMS: dict[str, rules.Rule] = {
    "none": rules.Watch(rules.Useful()),
    "Useful": rules.Useful(),
    "Useful, blind to the rates": blind,
}
ALONE = ("text", "features")


class Inputs(NamedTuple):
    """What both branches see of some utterances, and the sentiment."""

    states: Tensor  # [B, T, W], below the layers that are trained
    mask: Tensor  # [B, T]
    features: Tensor  # [B, W], of the other half
    target: Tensor  # [B, 1]


class Model(nn.Module):
    """Mean of MiniLM's states over the second half, a perceptron over features of the first, a linear layer over both."""

    def __init__(self) -> None:
        super().__init__()
        self.text = top(transformer("minilm"), LAYERS)
        size = self.text.config.hidden_size
        self.features = nn.Sequential(nn.Linear(size, WIDTH), nn.ReLU(), nn.Dropout(0.1))
        self.joint = nn.Linear(size + WIDTH, 1)

    def forward(self, inputs: Inputs, alone: str | None = None) -> Tensor:
        states = self.text(inputs_embeds=inputs.states, attention_mask=inputs.mask)
        states = states.last_hidden_state
        text = pooled(states, inputs.mask)
        features = self.features(inputs.features)
        if alone == "text":
            features = torch.zeros_like(features)
        if alone == "features":
            text = torch.zeros_like(text)
        return self.joint(torch.cat([text, features], 1))


@cache
def parts() -> dict[str, Inputs]:
    """The utterances of the three parts."""
    corpus = load("auto", "standard")
    if corpus.source != "real":
        raise FileNotFoundError(
            "`GRADBALANCE_DATA` must be a folder with CMU-MOSI. Got none. Set it to where the data lies."
        )
    halves = [(w[: len(w) // 2], w[len(w) // 2 :]) for w in corpus.words]
    first, second = ([" ".join(half) for half in both] for both in zip(*halves, strict=True))
    states, mask = encoded(second)
    outputs, its_mask = encoded(first, of_the_last=True)
    whole = Inputs(states, mask, pooled(outputs, its_mask), corpus.labels[:, None])
    return {name: rows(whole, index) for name, index in corpus.split.items()}


@torch.no_grad()
def encoded(texts: list[str], *, of_the_last: bool = False) -> tuple[Tensor, Tensor]:
    """The states that enter the layers that are trained, or those of the last layer, and which are no padding."""
    from transformers import AutoTokenizer

    encoder = transformer("minilm").eval()
    tokens = AutoTokenizer.from_pretrained(locate("minilm"))(
        texts, padding=True, truncation=True, max_length=64, return_tensors="pt"
    )
    states = []
    for numbers, mask in zip(
        tokens.input_ids.split(64), tokens.attention_mask.split(64), strict=True
    ):
        layers = encoder(input_ids=numbers, attention_mask=mask, output_hidden_states=True)
        states.append(layers.hidden_states[-1 if of_the_last else -1 - LAYERS])
    return torch.cat(states), tokens.attention_mask


def pooled(states: Tensor, mask: Tensor) -> Tensor:
    """The mean over what is no padding."""
    return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def rows(inputs: Inputs, index: Tensor) -> Inputs:
    """Some utterances, without the padding that none of them needs."""
    chosen = Inputs(*(tensor[index] for tensor in inputs))
    length = int(chosen.mask.sum(1).max())
    return chosen._replace(states=chosen.states[:, :length], mask=chosen.mask[:, :length])


def train(arm: str, encoder_lr: float, lr: float, seed: int) -> dict[str, Any]:
    """Train once: the scores after each epoch, and the coefficients."""
    torch.manual_seed(seed)
    model = Model()
    layers = [p for p in model.text.parameters() if p.requires_grad]
    new = [*model.features.parameters(), *model.joint.parameters()]
    groups = [{"params": layers, "lr": encoder_lr}, {"params": new, "lr": lr}]
    alone = arm if arm in ALONE else None
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, weight_decay=0.01, fused=True)
    if alone is None:
        branches = {"text": model.text, "features": model.features}
        optimizer = ConflictAwarePenalty(optimizer, branches, ARMS[arm])
    known = parts()["train"]
    steps = EPOCHS * (len(known.target) // BATCH)
    warm = steps // 10
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (steps - step) / (steps - warm))
    )
    generator = torch.Generator().manual_seed(seed)
    history, began = [], process_time()
    for _ in range(EPOCHS):
        model.train()
        for index in torch.randperm(len(known.target), generator=generator).split(BATCH):
            if len(index) < BATCH:
                continue
            batch = rows(known, index)
            optimizer.zero_grad()
            (model(batch, alone) - batch.target).abs().mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        model.eval()
        found = {name: evaluate(model, parts()[name], alone) for name in ("valid", "test")}
        if isinstance(optimizer, ConflictAwarePenalty):
            shown = optimizer.balance
            found |= {"coefficients": shown.coefficients.round(3).tolist()}
            found |= {"useful": shown.useful.round(4).tolist()}
        history.append(found)
    run = {"arm": arm, "encoder_lr": encoder_lr, "lr": lr, "seed": seed}
    return run | {"history": history, "seconds": round(process_time() - began, 1)}


@torch.no_grad()
def evaluate(model: Model, inputs: Inputs, alone: str | None) -> dict[str, float]:
    """Mean absolute error and correlation."""
    order = inputs.mask.sum(1).argsort().split(64)
    output = torch.empty_like(inputs.target)
    for index in order:
        output[index] = model(rows(inputs, index), alone)
    mae = float((output - inputs.target).abs().mean())
    return {"mae": round(mae, 5), "corr": round(score(output, inputs.target), 5)}


def describe(lines: list[dict[str, Any]]) -> str:
    """The table: mean absolute error on the test part after the last epoch, and the changes."""
    cells: dict[tuple[str, float, float], dict[int, float]] = {}
    for line in lines:
        key = (line["arm"], line["encoder_lr"], line["lr"])
        cells.setdefault(key, {})[line["seed"]] = line["history"][-1]["test"]["mae"]
    shown = []
    for (arm, encoder_lr, lr), cell in sorted(cells.items(), key=lambda item: item[0][1:]):
        plain = cells.get(("none", encoder_lr, lr), {})
        changes = [cell[seed] - plain[seed] for seed in sorted(cell) if seed in plain]
        change = None
        if arm != "none" and len(changes) > 1:
            mean, half = interval(changes)
            change = f"{mean:+.3f} ± {half:.3f}".replace("-", "−")
        value = f"{fmean(cell.values()):.3f}"
        if len(cell) > 1:
            value += f" ± {stdev(cell.values()):.3f}"
        shown.append([f"{encoder_lr:g}, {lr:g}", arm, value, change, len(cell)])
    head = ["rates: encoder, new", "", "MAE, mean ± std", "change, 95 %", "seeds"]
    lead = (
        "Mean absolute error on the test part of CMU-MOSI; two top layers of a pretrained MiniLM read the second "
        "half of each utterance, a new perceptron frozen features of the first. Lower is better.\n"
    )
    return "\n".join(["# Fine-tuning\n", lead, *table(head, shown)]).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "finetune.jsonl")
    parser.add_argument("--report", action="store_true", help="only write the table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    repair(options.out)
    lines = read(options.out)
    done = {(line["arm"], line["encoder_lr"], line["lr"], line["seed"]) for line in lines}
    wanted = [(arm, *RATES[0], seed) for seed in SEEDS for arm in ARMS]
    wanted += [(arm, *RATES[0], seed) for seed in SEEDS for arm in ALONE]
    wanted += [(arm, *rates, seed) for rates in RATES[1:] for seed in SEEDS for arm in ARMS]
    for job in [] if options.report else [job for job in wanted if job not in done]:
        lines.append(train(*job))
        append(options.out, lines[-1])
    options.out.with_suffix(".md").write_text(describe(lines))


if __name__ == "__main__":
    main()
