"""The table of the census."""

from collections.abc import Sequence
from importlib.metadata import version

from benchmarks.census.run import OUTCOMES, Verdict

DISTRIBUTIONS = {
    "torch.optim": "torch",
    "torchao.optim": "torchao",
}  # where they differ from the name


def versions(packages: Sequence[str]) -> str:
    """A line with the version of each package."""
    found = {DISTRIBUTIONS.get(package, package): None for package in packages}
    return f"Measured with {', '.join(f'{name} {version(name)}' for name in found)}, on the CPU.\n"


def table(rows: Sequence[tuple[str, str, Verdict]]) -> str:
    """Counts by package, then each optimizer with its figures."""
    packages = list(dict.fromkeys(package for package, *_ in rows))
    lines = [
        f"| package | listed | {' | '.join(OUTCOMES)} |",
        "|---|" + "--:|" * (len(OUTCOMES) + 1),
    ]
    for package in (*packages, "all"):
        own = [found.outcome for of, _, found in rows if package in (of, "all")]
        lines.append(
            f"| {package} | {len(own)} | {' | '.join(str(own.count(outcome)) for outcome in OUTCOMES)} |"
        )
    for package in packages:
        lines += [
            "",
            f"## {package}",
            "",
            "| optimizer | | slowed branch | the others | |",
            "|---|---|--:|--:|---|",
        ]
        for of, name, (outcome, worst, note) in rows:
            if of == package:
                figures = ["", ""] if worst is None else [f"{ratio:.3f}" for ratio in worst]
                words = " ".join(note.split()).replace("|", "/")
                lines.append(f"| {name} | {outcome} | {' | '.join(figures)} | {words[:300]} |")
    return "\n".join(lines) + "\n"
