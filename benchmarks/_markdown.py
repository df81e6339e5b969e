"""Tables of Markdown, and what the GPU gave to fill them."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

GPU = Path(__file__).parent / "results" / "gpu"  # a file for each part
NOT_RUN = "not run: `python -m benchmarks.gpu`"
FAILED = "failed, see `results/gpu`"


def text(quartiles: list[float]) -> str:
    return "{1:.2f} [{0:.2f}, {2:.2f}]".format(*quartiles)


def span(values: list[float]) -> str:
    """Smallest to largest."""
    return f"{min(values):.2f} to {max(values):.2f}"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """The lines of a table; None is a cell without a value."""
    lines = [
        ["–" if value is None else str(value) for value in row]
        for row in (head, ["---"] * len(head), *rows)
    ]
    return [f"| {' | '.join(line)} |" for line in lines] + [""]


def gpu_results(path: Path = GPU) -> dict:
    """What each part of ``benchmarks.gpu`` wrote; nothing if it has not run."""
    return {part.stem: json.loads(part.read_text()) for part in sorted(path.glob("*.json"))}


def cell(results: Any, path: tuple[str, ...], show: Callable[[Any], str]) -> str:
    """What stands at ``path`` in the results of the GPU, or why nothing does."""
    for key in path:
        if key not in results:
            return FAILED if "error" in results else NOT_RUN
        results = results[key]
    return FAILED if isinstance(results, dict) and "error" in results else show(results)
