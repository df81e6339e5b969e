"""Run the contract and print what works and what is refused: ``python -m tests.contract.matrix``.

A row is a test and its cases. A case works if the test of it passes, is refused if the test asserts an error (then the
message is shown), and is silent if the test fails: training that differs from the oracle without an error. What is not
installed is skipped.
"""

import sys
from collections import defaultdict
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
FOLDERS = [TESTS / name for name in ("contract", "optimizer", "integrations")]


class Matrix:
    """A pytest plugin that sorts the cases of each test by their outcome."""

    def __init__(self) -> None:
        self.rows = defaultdict(lambda: {"works": 0, "refused": 0, "silent": 0, "skipped": 0})
        self.messages = defaultdict(set)

    def pytest_runtest_logreport(self, report):
        if report.when != "call" and report.passed:
            return
        file, *_, test = report.nodeid.split("::")
        row = Path(file).stem, test.split("[")[0].removeprefix("test_").replace("_", " ")
        refused = [value for name, value in report.user_properties if name == "refused"]
        self.messages[row].update(refused)
        outcome = "refused" if refused or " refuse" in row[1] else "works"
        self.rows[row][{"failed": "silent", "skipped": "skipped"}.get(report.outcome, outcome)] += 1

    def report(self) -> str:
        width = max((len(test) for _, test in self.rows), default=0)
        lines, file = [], None
        head = f"{'':{width}}  {'works':>6}{'refused':>9}{'silent':>8}{'skipped':>9}"
        for (name, test), row in self.rows.items():
            if name != file:
                lines += ["", head, name]
                file = name
            lines.append(
                f"{test:{width}}  {row['works']:6}{row['refused']:9}{row['silent']:8}{row['skipped']:9}"
            )
            lines += [f"    {message}" for message in sorted(self.messages[name, test])]
        total = {
            key: sum(row[key] for row in self.rows.values())
            for key in ("works", "refused", "silent", "skipped")
        }
        cases = sum(total.values())
        return "\n".join(
            [*lines, "", f"{cases} cases: " + ", ".join(f"{n} {key}" for key, n in total.items())]
        )


def main(arguments: list[str]) -> int:
    """Run the files of the contract, with further arguments of pytest, and print the matrix."""
    matrix = Matrix()
    status = pytest.main(
        ["-q", "--no-header", "--no-summary", *map(str, FOLDERS), *arguments], plugins=[matrix]
    )
    sys.stdout.write(matrix.report() + "\n")
    return int(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
