"""Why it works: the useful part of the gradient of each branch over training, and the coefficients.

``python -m benchmarks.balancing.why`` trains one testbed that the rule helps and one that it does not, half a minute.
"""

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import torch
from matplotlib import pyplot as plt

from benchmarks.balancing.model import Model
from benchmarks.balancing.rivals import RIVALS
from benchmarks.balancing.runs import optimizer_for
from benchmarks.balancing.testbeds import TESTBEDS

CASES = {"C0": 1e-3, "B": 1e-3}
SEED, LAST, EVERY = 300, 400, 4
COLOURS = ("#c23b22", "#3b6ea5", "#6a9a4b")


def trace(name: str, lr: float) -> dict[str, list]:
    """Steps, and the useful parts, coefficients and training loss at each."""
    testbed = TESTBEDS[name]
    part = testbed.parts(testbed, SEED)["train"]
    torch.manual_seed(SEED)
    model = Model(testbed, [x.shape[1] for x in part.inputs], 10)
    step = RIVALS["Useful"].step(model, optimizer_for("AdamW", model, lr), None)
    batches, found = (
        torch.Generator().manual_seed(SEED),
        {"step": [], "useful": [], "coefficient": [], "loss": []},
    )
    count = 0
    while count < LAST:
        for batch in torch.randperm(len(part.target), generator=batches).split(testbed.batch):
            inputs, target = [x[batch] for x in part.inputs], part.target[batch]
            step(inputs, target)
            count += 1
            if count % EVERY == 0 and count > 1:
                balance = step.optimizer.balance
                with torch.no_grad():
                    output = model.output(model.features(inputs))
                found["step"].append(count)
                found["useful"].append(balance.useful.tolist())
                found["coefficient"].append(balance.coefficients.tolist())
                found["loss"].append(float(torch.nn.functional.cross_entropy(output, target)))
    return found


def draw(path: Path) -> None:
    """A column for each case: useful parts above, coefficients below."""
    figure, axes = plt.subplots(2, len(CASES), figsize=(8.5, 4.6), sharex=True, sharey="row")
    for column, (name, lr) in zip(axes.T, CASES.items(), strict=True):
        found, names = trace(name, lr), [branch.name for branch in TESTBEDS[name].branches]
        names = ["speech", "noise"] if name == "C0" else names
        for panel, key in zip(column, ("useful", "coefficient"), strict=True):
            for line, label, colour in zip(
                zip(*found[key], strict=True), names, COLOURS, strict=False
            ):
                panel.plot(found["step"], line, label=label, color=colour, linewidth=1.6)
            panel.spines[["top", "right"]].set_visible(False)
        losses = [loss / 10 for loss in found["loss"]]
        column[0].plot(
            found["step"],
            losses,
            label="training loss / 10",
            color="#bbbbbb",
            linewidth=0.9,
            zorder=0,
        )
        column[0].axhline(0, color="#dddddd", linewidth=0.8, zorder=0)
        column[0].set_title(TESTBEDS[name].title, fontsize=10)
        column[0].legend(frameon=False, fontsize=9)
        column[1].set_xlabel("step")
    axes[0, 0].set_ylabel("useful part")
    axes[1, 0].set_ylabel("coefficient")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    torch.set_num_threads(1)
    draw(Path(__file__).parent / "results" / "why.png")
