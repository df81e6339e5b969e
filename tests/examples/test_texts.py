"""The texts: every link leads somewhere, and every figure of the README stands in the table that it names."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXTS = [
    path
    for path in ROOT.rglob("*.md")
    if not {".git", "build", "runs"} & set(path.relative_to(ROOT).parts)
]
INTERVAL = r"[+−-]?\d+\.\d+ (?:± \d+\.\d+|\[[^\]]*\])"


def anchors(text):
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(path):
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if not link.startswith(("http://", "https://")):
            place, _, anchor = link.partition("#")
            target = path.parent / place if place else path
            assert target.exists(), link
            assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


def test_every_figure_of_the_readme_stands_in_a_table_that_it_names():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tables = " ".join(
        (ROOT / link).read_text(encoding="utf-8")
        for link in re.findall(r"\]\(((?:benchmarks|examples)/[^)]+\.md)\)", text)
    )
    figures = re.findall(INTERVAL, text)
    assert len(figures) > 8
    assert [figure for figure in figures if figure.lstrip("+") not in tables] == []
