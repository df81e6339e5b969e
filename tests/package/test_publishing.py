"""What is published: one version everywhere, and a README whose links lead somewhere from any page."""

import importlib.util
import re
import tomllib
from pathlib import Path

import pytest

from tests import needs

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
ADDRESS = "https://forge.example/somebody/gradbalance"
BUILT = {
    "GITHUB_SERVER_URL": "https://forge.example",
    "GITHUB_REPOSITORY": "somebody/gradbalance",
    "GITHUB_SHA": "0123abc",
}


@pytest.fixture
def metadata(monkeypatch):
    """What the hook fills in for a project with this README, somewhere or nowhere."""
    needs("hatchling")
    spec = importlib.util.spec_from_file_location("metadata", ROOT / ".ci" / "metadata.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def filled(folder, readme, environment):
        for name in BUILT:
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        (folder / "README.md").write_text(readme, encoding="utf-8")
        found = {}
        module.RepositoryMetadata(str(folder), {}).update(found)
        return found

    return filled


def test_the_version_is_the_same_everywhere():
    citation = (ROOT / ".github" / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^version: (.+)$", citation, re.MULTILINE)[1] == PROJECT["version"]


def test_the_oldest_torch_is_the_one_that_is_tested():
    workflow = (ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8")
    [oldest] = re.findall(r"torch==([\d.]+)", workflow)
    [bound] = [name for name in PROJECT["dependencies"] if name.startswith("torch")]
    assert bound == f"torch>={oldest.removesuffix('.0')}"


def test_links_of_the_readme_lead_to_the_commit_that_was_built(metadata, tmp_path):
    readme = "![a figure](a/b.png) [text](c.md#d) [`code`](e) [far](https://x.org) [here](#top)"
    readme += ' <img alt="" src="a/c.png" height="9">'
    found = metadata(tmp_path, readme, BUILT)
    assert found["readme"]["text"] == (
        f"![a figure]({ADDRESS}/raw/0123abc/a/b.png) [text]({ADDRESS}/blob/0123abc/c.md#d) "
        f"[`code`]({ADDRESS}/blob/0123abc/e) [far](https://x.org) [here](#top)"
        f' <img alt="" src="{ADDRESS}/raw/0123abc/a/c.png" height="9">'
    )
    assert found["urls"]["Repository"] == ADDRESS


def test_code_of_the_readme_that_looks_like_a_link_stays(metadata, tmp_path):
    readme = 'Say `rules["x"](m)`.\n\n```python\nmodel["text"](x)\n```\n'
    assert metadata(tmp_path, readme, BUILT)["readme"]["text"] == readme


def test_without_a_repository_the_readme_stays_as_it_is(metadata, tmp_path):
    readme = "[text](c.md)"
    expected = {"readme": {"content-type": "text/markdown", "text": readme}}
    assert metadata(tmp_path, readme, {}) == expected


def test_no_link_of_the_published_readme_is_relative(metadata, tmp_path):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    published = metadata(tmp_path, text, BUILT)["readme"]["text"]
    text = re.sub(r"^```.*?^```", "", published, flags=re.M | re.S)
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r' src="([^"]+)"', text)
    assert len(links) > 10
    assert [link for link in links if not link.startswith(("https://", "#"))] == []


def test_the_documentation_shows_the_figure_of_the_readme():
    needs("pdoc", "docs")
    place = ROOT / ".ci" / "docs" / "__main__.py"
    spec = importlib.util.spec_from_file_location("docs", place)
    docs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(docs)
    pages = docs.Pages(["README.md"])
    assert 'src="files/examples/quickstart.png"' in pages.modules["index"].docstring
    assert Path("examples/quickstart.png") in pages.files
