"""The committed notebooks as slides: their cells say by `slideshow.slide_type` which is what."""
from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import nbformat
from latex2mathml.converter import convert
from nbconvert import SlidesExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

from commands.site import DOCS
from engine import settings
from engine.files import write_text

REVEAL = "reveal.js"  # beside the slides


class Renderer(IPythonRenderer):
    """Markdown with its equations as MathML, which browsers draw without a script."""

    def inline_math(self, body: str) -> str:
        """An equation within a line."""
        return convert(body)

    def block_math(self, body: str) -> str:
        """An equation of its own, with its number at the right where it has one."""
        formula, _, tag = body.partition(r"\tag{")
        number = f'<span style="float: right">({tag.strip().rstrip("}")})</span>' if tag else ""
        return f"<div>{number}{convert(formula.strip(), display='block')}</div>"


class Exporter(SlidesExporter):
    """nbconvert's slides, with a look of their own and nothing from the network."""

    def markdown2html(self, source: str) -> str:
        """Cells' Markdown, and what notebooks print as Markdown, as HTML."""
        return MarkdownWithMath(renderer=Renderer(escape=False, exclude_anchor_links=True)).render(
            source)


def write_slides(folder: Path | None = None, notebooks: list[Path] | None = None) -> Path:
    """Write `<notebook>.html` for each notebook, with reveal.js beside them; their folder.

    FileNotFoundError if reveal.js is not installed.
    """
    folder = folder or settings.ROOT / "build" / "slides"
    notebooks = notebooks or sorted((settings.ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    copy_reveal(folder / REVEAL)
    exporter = Exporter(template_file=str(DOCS / "slides.html.jinja"), reveal_theme="white",
                        reveal_url_prefix=REVEAL, embed_images=True)
    for path in notebooks:
        page, _ = exporter.from_notebook_node(prepare(nbformat.read(path, as_version=4)),
                                              {"metadata": {"name": path.stem}})
        write_text(folder / f"{path.stem}.html", page)
    return folder


def prepare(book: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """A notebook whose figures, captions and sentences stand without the code that makes them."""
    for cell in book.cells:
        kinds = {kind for output in cell.get("outputs", []) for kind in output.get("data", {})}
        if kinds & {"image/png", "text/markdown"}:
            cell.metadata["transient"] = {"remove_source": True}
    return book


def copy_reveal(target: Path) -> None:
    """Copy reveal.js, as the package sphinx-revealjs brings it, without what slides do not use."""
    package = importlib.util.find_spec("sphinx_revealjs")
    if package is None:
        raise FileNotFoundError("reveal.js is not installed; `make slides` installs it, or: "
                                "pip install --requirement requirements-slides.txt")
    source = Path(package.origin).parent / "_static" / "revealjs"
    for part in ("LICENSE", "dist/reveal.css", "dist/reveal.js", "dist/theme/white.css"):
        (target / part).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / part, target / part)
    for part in ("dist/theme/fonts/source-sans-pro", "plugin/notes"):
        shutil.copytree(source / part, target / part, dirs_exist_ok=True)
