"""The measurements of ``benchmarks.moments`` as Markdown and as a figure."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks._markdown import FAILED, cell, span, table, text

JSON = Path(__file__).parents[1] / "results" / "moments.json"
TRITON = "moments, masked, Triton"  # on a GPU, where the kernels have to be asked for
# Case, the case it is measured against, and how much of its time (forward + backward) is allowed: CPU, GPU.
TARGETS = [
    ("moments, masked", "naive, masked", "0.55", None),
    ("moments, masked, compiled", "naive, masked", "0.22", None),
    (TRITON, "naive, masked", None, "0.25"),
    (TRITON, "moments, masked, compiled", None, "0.77"),
    ("moments", "var_mean", "0.25", None),
    ("moment loss of three pairs", "three calls of CMD", "0.30", "0.30"),
    ("covariance loss", "Deep CORAL", None, None),
]
LARGEST = "65536 x 1024"
SMALL = (
    "8 x 16 x 64 is 32 KB, and there a call is all dispatch: the target is 1.25 times the naive moments, which check "
    "nothing, are less exact, and in which padding may not be NaN. Those in the table are for the large sizes, which "
    "are processed in blocks that fit the cache."
)


def report(found: dict, gpu: dict) -> str:
    """The measurements as Markdown; ``gpu`` holds those of ``benchmarks.gpu``, if there are any."""
    sizes = found["sizes"]
    gpu = {"moments": _joined(gpu)}
    lines = [
        f"`python -m benchmarks.moments` on {found['hardware']}, torch {found['torch']}, {found['rounds']} rounds (a "
        f"hundred times as many of the small size), {found['date']}, load average {found['load']:.1f} at the start "
        "(above 1, others were computing too: read the ratios, not the milliseconds).",
        "",
        SMALL,
        "",
        "Ratios of forward + backward, median [quartiles] of the rounds, and the largest ratio allowed; on the GPU "
        f"the medians of all sizes, and the bandwidth, launches and memory at {LARGEST} in bf16. The Triton kernels "
        "have to be asked for there, with `GRADBALANCE_TRITON=1`: they have never run on a GPU.",
        "",
    ]
    rows = []
    for name, rival, *targets in TARGETS:
        pair = f"{name} / {rival}"
        allowed = ["none" if target is None else target for target in targets]
        on_gpu = cell(gpu, ("moments", "sizes"), partial(_medians, pair))
        cells = [
            text(size["ratios"][pair]) if pair in size["ratios"] else None
            for size in sizes.values()
        ]
        rows.append([pair, allowed[0], *cells, allowed[1], on_gpu])
    for title, key, on_gpu_allowed in (
        ("forward", "peak_forward", "0.10"),
        ("forward + backward", "peak_both", "1.10"),
    ):
        for name in ("moments, masked", "moments, masked, compiled", TRITON):
            cells = [
                f"{size['cases'][name][key]:.2f}" if name in size["cases"] else None
                for size in sizes.values()
            ]
            on_gpu = cell(gpu, ("moments", "sizes", LARGEST, "cases", name, key), "{:.2f}".format)
            label = f"peak memory / input, {title}: {name}"
            rows.append(
                [label, "none", *cells, on_gpu_allowed if name == TRITON else "none", on_gpu]
            )
    blank, at = [""] * (len(sizes) + 1), ("moments", "sizes", LARGEST)
    rows += [
        [
            "kernel launches, forward / backward, Triton",
            *blank,
            "2 / 1",
            cell(gpu, (*at, "cases", TRITON), _launches),
        ],
        [
            "bandwidth / device copy, Triton",
            *blank,
            "≥ 0.80",
            cell(gpu, (*at, "bandwidth / copy"), "{:.2f}".format),
        ],
    ]
    lines += table(["", "CPU target", *sizes, "GPU target", "GPU"], rows)
    lines += [
        "Milliseconds, median, forward / forward + backward (peak extra memory in units of the input):",
        "",
    ]
    names = next(iter(sizes.values()))["cases"]
    lines += table(
        ["", *sizes],
        [[name, *(_times(size["cases"][name]) for size in sizes.values())] for name in names],
    )
    lines += [
        "Largest relative error in float32 (variance, skewness, kurtosis) at an offset of so many standard deviations:",
        "",
    ]
    rows = [
        [
            name,
            *(
                ", ".join(f"{error:.0e}" for error in errors[name])
                for errors in found["accuracy"].values()
            ),
        ]
        for name in found["accuracy"]["0"]
    ]
    return "\n".join(lines + table(["", *found["accuracy"]], rows))


def _joined(gpu: dict) -> dict:
    """The three parts that measure moments on a GPU as one."""
    parts = [gpu[part] for part in ("moments", "compiled", "triton") if part in gpu]
    if not parts:
        return {}
    if all("error" in part for part in parts):
        return parts[0]
    sizes: dict = {}
    for part in parts:
        for name, size in part.get("sizes", {}).items():
            known = sizes.setdefault(name, {"cases": {}, "ratios": {}})
            for key, value in size.items():
                if key in ("cases", "ratios"):
                    known[key] = {**known[key], **value}
                else:
                    known[key] = value
    for part, name in (("compiled", "moments, masked, compiled"), ("triton", TRITON)):
        if "error" in gpu.get(part, {}):
            for size in sizes.values():
                size["cases"][name] = gpu[part]
    return {"sizes": sizes}


def _medians(pair: str, sizes: dict) -> str:
    known = [size["ratios"][pair][1] for size in sizes.values() if pair in size.get("ratios", {})]
    return span(known) if known else FAILED


def _launches(case: dict) -> str:
    return f"{case['launches_forward']} / {case['launches_both'] - case['launches_forward']}"


def _times(case: dict) -> str:
    times = f"{case['forward_ms'][1]:.3g} / {case['both_ms'][1]:.3g}"
    return f"{times} ({case['peak_forward']:.2f} / {case['peak_both']:.2f})"


def plot(found: dict, names: Sequence[str], path: Path) -> None:
    """Time of each rival relative to the naive moments, with quartiles."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        1, len(found["sizes"]), figsize=(11, 3), sharey=True, layout="constrained"
    )
    for axis, (shape, size) in zip(axes, found["sizes"].items(), strict=True):
        unit = size["cases"]["naive, masked"]["both_ms"][1]
        for position, name in enumerate(names):
            low, middle, high = (t / unit for t in size["cases"][name]["both_ms"])
            color = "tab:orange" if name.startswith("moments") else "tab:gray"
            axis.barh(position, middle, xerr=[[middle - low], [high - middle]], color=color)
        axis.set_title(shape, fontsize=10)
        axis.set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    axes[0].set_xlabel("time, forward + backward, naive = 1", loc="left")
    figure.savefig(path, dpi=120)
    plt.close(figure)
