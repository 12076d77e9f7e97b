"""How the documents become a site: `sphinx-build -W docs SITE`.

It opens from disk and fetches nothing. What the documents link to outside of this folder, which is
the package's own text, becomes a page for each file, with an anchor for each line.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_for_filename

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

project = html_title = "tinygpt"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["README.md"]  # the contents for readers of the files, as index.md is here
html_theme = "furo"
html_copy_source = False
default_role = "literal"  # docstrings put names between single backquotes
autodoc_member_order = "bysource"
autodoc_typehints = "description"
napoleon_numpy_docstring = False
myst_heading_anchors = 3

_LINK = re.compile(r"\[([^\]\n]+)\]\((\.\.?/[^)\s#]*)(?:#L(\d+)|#[^)\s]*)?\)")
_linked: set[Path] = set()


def _lead_to_copies(app, docname: str, source: list[str]) -> None:
    page = Path(app.srcdir, docname).parent

    def link(found: re.Match[str]) -> str:
        text, target, line = found.groups()
        path = (page / target).resolve()
        if path.is_relative_to(app.srcdir) or not path.is_file():
            return found[0]  # Sphinx knows it, or warns of it
        _linked.add(path)
        up, anchor = "../" * docname.count("/"), f"#L-{line}" if line else ""
        return f'<a href="{up}files/{path.relative_to(ROOT).as_posix()}.html{anchor}">{text}</a>'

    source[0] = _LINK.sub(link, source[0])


def _write_copies(app, error: Exception | None) -> None:
    for path in sorted(_linked):
        name = path.relative_to(ROOT).as_posix()
        html = HtmlFormatter(full=True, title=name, linenos="inline", lineanchors="L")
        copy = Path(app.outdir, "files", f"{name}.html")
        copy.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text(encoding="utf-8")
        copy.write_text(highlight(text, get_lexer_for_filename(name), html), encoding="utf-8")


def setup(app) -> None:
    app.connect("source-read", _lead_to_copies)
    app.connect("build-finished", _write_copies)
