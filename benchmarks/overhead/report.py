"""The measurements of the overhead as Markdown and as a figure."""

from functools import partial
from pathlib import Path

from benchmarks._markdown import FAILED, cell, span, table, text

JSON = Path(__file__).parents[1] / "results" / "overhead.json"
CLIP = "clip_grad_norm_"
SMALL = ("clip_grad_norm_", "default", "every=4", "gradient")
WHOLE = (
    "Forward, backward, balance, update, against the plain optimizer; 3 encoders, batches of 64 rows for the MLP and "
    "of 8 sequences of 16 for the transformer. The larger the batch, the nearer all ratios are to 1."
)
WHY = (
    "Where a ratio is above its target:",
    "",
    "- Update mode only takes the norms of the gradients, and that is half of clipping. On the CPU the norm is limited "
    "by its kernel rather than by memory: it is further from its floor than scaling.",
    "- A step of the default rule takes three to four tenths of a millisecond on a small model, most of it outside of operators: "
    "more than clipping takes on a few dozen small tensors, nothing beside large ones.",
    "- With hundreds of groups of two tensors each, what is done once a group (a factor, the check that the gradient "
    "is new, a stand-in of a param_group) counts as much as what is done once a tensor; clipping has one factor for "
    "all. The default rule also reads entries of at least one tensor of each group; a rule with "
    "`needs_coherence = False` spares that.",
    "- On the CPU the norm of a tensor of more than 262,144 entries is taken in parts, each a call of some "
    "microseconds: taken whole, as clipping takes it, it is wrong by 2e-4 at 8 M entries. The bytes read and written "
    "are the same.",
    "- A whole step at a small batch is mostly optimizer, and there clipping is noticed too: compare with its row.",
)
# What is asked for: title, where the ratio is found, target on the CPU, target on an H200.
OPERATION_TARGETS = [
    ("update mode / `clip_grad_norm_`", "update", 0.50, 0.6),
    ("gradient mode / `clip_grad_norm_`", "gradient", 0.85, 1.0),
    ("update + `max_norm` / `clip_grad_norm_`", "update + max_norm", 1.02, 1.1),
    ("gradient + `max_norm` / `clip_grad_norm_`", "gradient + max_norm", 1.02, 1.1),
]


def report(found: dict, gpu: dict) -> str:
    """The measurements as Markdown; ``gpu`` holds those of ``benchmarks.gpu``, if there are any."""
    about, operations = found["environment"], found["operations"]
    speeds = operations["gb_per_s"]
    lines = [
        "Does anyone notice the penalty? The cost of a step beside clipping and beside other ways to balance.",
        "",
        f"`python -m benchmarks.overhead` on {about['hardware']}, torch {about['torch']}, Python {about['python']}, "
        f"{about['date']}, load average {about['load']} at the start (above 0, others were computing too, which "
        "costs caches and memory bandwidth). Milliseconds are computing time of the process; ratios are medians "
        "[quartiles] of the rounds.",
        "",
        *small(found["small"]),
        "## Targets",
        "",
        *targets(found, gpu),
        *WHY,
        "",
        f"## The operation alone, {operations['parameters'] / 1e6:.0f} M parameters, {operations['tensors']} tensors, "
        f"{operations['groups']} groups",
        "",
        "A rule that needs no coherence and scales all groups but one; `max_norm` and the clipping "
        "rivals but ZClip, which waits for outliers, always clip. The floor: the bytes that have to be read and "
        "written, at the speed of an operation in place on as many bytes in the same rounds "
        f"({speeds['negation in place']:.1f} GB/s read and written; a copy reaches {speeds['copy']:.1f}, since the CPU "
        "also fetches what the copy overwrites). On the CPU a group with coefficient 1 is not written.",
        "",
    ]
    rows = []
    for name, ratio in operations["ratios"].items():
        over, peak = operations["over_floor"].get(name), operations["peak_bytes"].get(name)
        rows.append(
            [
                name,
                text(ratio),
                text(over) if over else "",
                f"{peak / 1e3:.0f} kB" if peak is not None else "",
            ]
        )
    lines += table(["", "× `clip_grad_norm_`", "× floor", "peak extra memory"], rows)
    lines += ["## Scaling", "", "Time of a step against `clip_grad_norm_` on the same tensors.", ""]
    names = [
        name
        for name in operations["ratios"]
        if name in found["curves"]["tensors"][0]["ratios"] and name != CLIP
    ]
    for title, points in found["curves"].items():
        rows = [
            [
                f"{p['parameters']:,}",
                f"{p['tensors']:,}",
                str(p["groups"]),
                f"{p['clip_ms'][1]:.3g}",
            ]
            + [text(p["ratios"][name]) for name in names]
            for p in points
        ]
        lines += [
            f"### {title}",
            "",
            *table(["parameters", "tensors", "groups", "clip, ms", *names], rows),
        ]
    lines += ["## Whole training step", "", WHOLE, ""]
    full = [step for step in found["steps"] if len(step["ratios"]) > 6]
    titles = [f"{s['model']}, {s['parameters'] / 1e6:.0f} M" for s in full]
    rows = [["plain, ms", *(f"{s['plain_ms'][1]:.0f}" for s in full)]]
    rows += [
        [name, *(text(s["ratios"][name]) if name in s["ratios"] else "" for s in full)]
        for name in full[0]["ratios"]
        if name != "plain"
    ]
    lines += table(["AdamW fused", *titles], rows)
    others = [step for step in found["steps"] if step not in full]
    shared = [name for name in others[0]["ratios"] if name != "plain"]
    rows = [
        [
            f"{s['model']}, {s['parameters'] / 1e6:.0f} M, {s['optimizer']}",
            f"{s['plain_ms'][1]:.0f}",
        ]
        + [text(s["ratios"][name]) for name in shared]
        for s in others
    ]
    lines += table(["", "plain, ms", *shared], rows)
    lines += profiled(found["profile"])
    return "\n".join(lines + (sharded(found["fsdp2"]) if found["fsdp2"] else []))


def small(found: dict) -> list[str]:
    """Two branches of a few layers: what a newcomer will see first."""
    rows = []
    for row in found["rows"]:
        shown = [text(row["ratios"][name]) if name in row["ratios"] else "" for name in SMALL]
        shown.append(text(row["recorded"]))
        rows.append([row["optimizer"], str(row["width"]), f"{row['plain_us'][1]:.0f}", *shown])
    counts = ", ".join(
        f"{len(a)} and {len(b)} in {mode} mode" for mode, (a, b) in found["operators"].items()
    )
    return [
        "## Small models",
        "",
        "A whole training step of two branches of two layers, batch 64, against the plain optimizer's. Targets at "
        "width 128: default ≤ 1.20 under SGD and ≤ 1.15 under AdamW, `every=4` ≤ 1.06; a step of the default rule that "
        "a `Recorder` records ≤ 1.05 of one that nobody records.",
        "",
        *table(["optimizer", "width", "plain, us", *SMALL, "recorded / default"], rows),
        "Operators that a counted step of the default rule dispatches at width 32, where the gradients are read whole, "
        f"and at width 512, where a sketch of them is: {counts}.",
        "",
    ]


def targets(found: dict, gpu: dict) -> list[str]:
    """The table of what is asked for."""
    rows = []
    for mode in ("update", "gradient"):
        title = f"whole step / plain optimizer, {mode}"
        on_gpu = cell(gpu, ("steps", "steps"), partial(_whole, mode))
        allowed = "≤ 1.02" if mode == "update" else "≤ 1.03"
        rows.append([title, allowed, _whole(mode, found["steps"]), "≤ 1.02", on_gpu])
    operations = ("operations",)
    for title, name, cpu, allowed in OPERATION_TARGETS:
        on_gpu = cell(gpu, (*operations, "ratios", name), text)
        rows.append(
            [
                title,
                f"≤ {cpu:.2f}",
                text(found["operations"]["ratios"][name]),
                f"≤ {allowed:.1f}",
                on_gpu,
            ]
        )
    peak = _peak(found["operations"]["peak_bytes"])
    rows.append(
        ["extra memory", "< 1 MB", peak, "< 1 MB", cell(gpu, (*operations, "peak_bytes"), _peak)]
    )
    for mode in ("gradient", "update", "update, AdamW with tensor lr"):
        on_gpu = cell(gpu, ("host_synchronisations", mode), str)
        rows.append([f"host synchronisations, {mode}", "", "", "0", on_gpu])
    for title, curve in (("10,000 tensors", "tensors"), ("256 groups", "groups")):
        shown = _host(found["curves"][curve][-1]["ratios"])
        name = f"host time / `clip_grad_norm_`, {title}"
        rows.append([name, "≤ 1.20", shown, "≤ 1.2", cell(gpu, ("host_time", title), _host)])
    return table(["", "CPU target", "CPU", "H200 target", "H200"], rows)


def _whole(mode: str, steps: list[dict]) -> str:
    done = [step for step in steps if "error" not in step]
    largest = max((step["parameters"] for step in done), default=0)
    medians = sorted(s["ratios"][mode][1] for s in done if s["parameters"] > 0.5 * largest)
    if not medians:
        return FAILED
    middle = f"{medians[len(medians) // 2]:.2f}"
    return f"{middle} (medians of {len(medians)} models and optimizers: {span(medians)})"


def _peak(peaks: dict) -> str:
    return f"{max(peaks.values()) / 1e6:.2f} MB"


def _host(ratios: dict) -> str:
    return ", ".join(
        f"{name} {ratios[name][1]:.2f}" for name in ("update", "gradient", "update, defaults")
    )


def profiled(rows: list[dict]) -> list[str]:
    """Where the host time of a small step goes."""
    whole, *operators = rows
    cells = [
        [row["operator"], f"{row['calls']:.0f}", f"{row['us']:.0f}"]
        for row in operators
        if row["us"] >= 3
    ]
    return [
        "## What remains in a step",
        "",
        f"Gradient mode, 300 tensors of 1000 entries, 3 groups: {whole['us']:.0f} us a step without the profiler. Its "
        "operators under the profiler, which slows them down, own time, 3 us or more:",
        "",
        *table(["operator", "calls", "us"], cells),
        "The norms and the scaling of each tensor are what clipping does too; the rest is done on N numbers, which on "
        "the CPU are no operators.",
        "",
    ]


def sharded(found: dict) -> list[str]:
    """The penalty under FSDP2."""
    rows = [
        [name, str(found["collectives"][name]), text(ratio)]
        for name, ratio in found["ratios"].items()
    ]
    return [
        "## FSDP2, two gloo processes",
        "",
        f"The optimizer's step, MLP of 10 M parameters, default options; plain AdamW: "
        f"{found['plain_ms'][1]:.0f} ms of wall time.",
        "",
        *table(["", "collectives a step", "× plain step"], rows),
    ]


def plot(found: dict, path: Path) -> None:
    """The curves of scaling, and the rivals' whole step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(14, 3.4), layout="constrained")
    for axis, key in zip(axes, ("parameters", "tensors", "groups"), strict=False):
        points = found["curves"][key]
        at = [point[key] for point in points]
        for name in ("update", "gradient", "gradient + max_norm", "update, defaults"):
            low, middle, high = zip(*(point["ratios"][name] for point in points), strict=True)
            axis.plot(at, middle, marker="o", label=name)
            axis.fill_between(at, low, high, alpha=0.15)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(xscale="log", xlabel=key, ylim=(0, None))
    axes[0].set_ylabel("time / clip_grad_norm_")
    axes[0].legend(fontsize=8)
    step = max((s for s in found["steps"] if len(s["ratios"]) > 6), key=lambda s: s["parameters"])
    names = [name for name in step["ratios"] if name != "plain"]
    colors = [
        "tab:orange" if name.startswith(("update", "gradient")) and "-" not in name else "tab:gray"
        for name in names
    ]
    axes[3].barh(names, [step["ratios"][name][1] for name in names], color=colors)
    axes[3].axvline(1, color="black", linewidth=0.8)
    axes[3].set(
        xlabel=f"whole step / plain, {step['model']} {step['parameters'] / 1e6:.0f} M", xscale="log"
    )
    axes[3].tick_params(axis="y", labelsize=8)
    axes[3].invert_yaxis()
    figure.savefig(path, dpi=110)
    plt.close(figure)
