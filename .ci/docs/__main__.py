"""Build the documentation: chapters out of the texts and examples, the API out of the docstrings.

    pip install -e ".[docs]" && python .ci/docs OUT

Texts stay where they are. Whatever a chapter links to becomes a page too, or is copied. A warning, or a link that leads
nowhere, is an error.
"""

import ast
import re
import shutil
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pdoc

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
API = (
    "gradbalance",
    "gradbalance.integrations.lightning",
    "gradbalance.integrations.transformers",
    "gradbalance.report",
)
CHAPTERS = {
    "Start": "README.md",
    "See what each tower does": "examples/lora_towers.py",
    "When it helps": "benchmarks/balancing/when_it_helps.md",
    "Write a rule": "examples/your_own_rule.py",
    "Examples": "examples/README.md",
    "Benchmarks": "benchmarks/README.md",
}
# Code is passed over, where brackets may look like a link.
LINK = re.compile(
    r"(?:^```.*?^```|`[^`\n]*`)|(\]\(|src=\")([^)\"\s]+)([)\"])", re.MULTILINE | re.DOTALL
)


class Pages:
    """The texts as modules without members, which pdoc shows like any other; the links between them.

    Attributes:
        modules: The page of each text.
        files: What is copied beside the pages, by its place in the repository.
    """

    def __init__(self, chapters):
        self.modules = {}
        self.files = set()
        self._waiting = [ROOT / place for place in chapters]
        while self._waiting:
            path = self._waiting.pop()
            if name_of(path) not in self.modules:
                self.modules[name_of(path)] = self._page(path)

    def _page(self, path):
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".py":
            parsed = ast.parse(text)
            introduction = ast.get_docstring(parsed) or ""
            lines = text.splitlines()[parsed.body[0].end_lineno if introduction else 0 :]
            code = "\n".join(lines).strip()
            name = path.relative_to(ROOT).as_posix()
            text = f"# {name}\n\n{introduction}\n\n```python\n{code}\n```\n"
        page = ModuleType(name_of(path), LINK.sub(lambda link: self._follow(path, link), text))
        page.__docformat__ = "markdown"
        return pdoc.doc.Module(page)

    def _follow(self, path, link):
        start, target, end = link.groups()
        if target is None or target.startswith(("http://", "https://", "#")):
            return link[0]
        place, _, anchor = target.partition("#")
        found = (path.parent / place).resolve()
        if found.is_dir():
            found /= "README.md"
        if not found.is_file():
            raise FileNotFoundError(f"{path.relative_to(ROOT)}: {target} leads nowhere.")
        if found.suffix in (".md", ".py"):
            self._waiting.append(found)
            return f"{start}{name_of(found)}.html{'#' if anchor else ''}{anchor}{end}"
        self.files.add(found.relative_to(ROOT))
        return f"{start}files/{found.relative_to(ROOT).as_posix()}{end}"


def name_of(path):
    """The page of a text; that of the README is the first."""
    if path == ROOT / "README.md":
        return "index"
    return path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "-").strip(".")


def build(out):
    """Write everything into a folder."""
    pages = Pages(CHAPTERS.values())
    modules = {name: pdoc.doc.Module.from_name(name) for name in pdoc.extract.walk_specs(API)}
    chapters = {title: name_of(ROOT / place) for title, place in CHAPTERS.items()}
    pdoc.render.configure(docformat="google", math=True, template_directory=HERE)
    pdoc.render.env.globals.update(chapters=chapters, api=list(modules))
    everything = {**modules, **pages.modules}
    for name, module in everything.items():
        page = out / f"{name.replace('.', '/')}.html"
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(pdoc.render.html_module(module, everything), encoding="utf-8")
    (out / "search.js").write_text(pdoc.render.search_index(everything), encoding="utf-8")
    for place in pages.files:
        (out / "files" / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / place, out / "files" / place)
    print(f"{len(pages.modules)} texts and {len(modules)} modules in {out}")


if __name__ == "__main__":
    warnings.simplefilter("error")
    build(Path(sys.argv[1]))
