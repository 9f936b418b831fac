"""Sphinx's settings: the pages of docs/, and texts of the repository that have their place among them."""

from __future__ import annotations

import os
import re
import sys
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))

from generated import commands, names, settings  # noqa: E402

project = "coreinfer_sim"
author = "the authors of coreinfer_sim"
release = version = version_of("coreinfer-sim")
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
default_role = "code"
smartquotes = False  # would turn the hyphens of options into dashes
myst_heading_anchors = 4
myst_links_external_new_tab = False
autodoc_typehints = "description"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": False}
html_theme = "furo"
html_title = "coreinfer_sim"
html_show_copyright = False
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}
highlight_language = "bash"
nitpick_ignore_regex = [(r"py:.*", r".*")]  # annotations name other packages, whose documents are not linked
nb_execution_mode = "cache"  # a notebook's outputs come of a run: a cell that fails fails the build
nb_execution_timeout = 900
nb_execution_raise_on_error = True
nb_output_stderr = "remove"  # bars

PLACES = {
    "figures/README.md": "results/figures",
    "indexes/README.md": "reference/index-format",
    "CONTRIBUTING.md": "project/contributing",
    "CHANGELOG.md": "project/changelog",
    "SECURITY.md": "project/security",
    "README.md": "index",
}
"""Texts of the repository, and the page of the site that each is; README.md has one that is shorter."""
GENERATED = {"commands": commands, "settings": settings, "names": names}
"""What makes the text that stands in place of ``<!-- NAME -->``."""
_LINK = re.compile(r"(\]\()(?!https?:|mailto:|#)([^)#\s]+)")


def _linked(text: str, folder: Path, page: str) -> str:
    """Return a text whose links to files of the repository lead to their pages, as seen from a page of the site.

    Args:
        text: in Markdown.
        folder: that its links are relative to.
        page: that shows it.
    """
    here = (DOCS / page).parent

    def link(found: re.Match[str]) -> str:
        target = Path(os.path.normpath(folder / found[2]))
        place = PLACES.get(target.relative_to(DOCS.parent).as_posix()) or PLACES.get(f"{target.name}/README.md")
        target = target if place is None else DOCS / f"{place}.md"
        return found[1] + Path(os.path.relpath(target, here)).as_posix()

    return _LINK.sub(link, text)


def _read(_app: Any, page: str, source: list[str]) -> None:
    """Put in what a page shows of the repository and of the code."""
    outside = next((name for name, place in PLACES.items() if place == page != "index"), None)
    if outside is None:
        source[0] = _linked(source[0], (DOCS / page).parent, page)
    else:
        text = DOCS.parent / outside
        source[0] = _linked(text.read_text(encoding="utf-8"), text.parent, page)
    for name, make in GENERATED.items():
        mark = f"<!-- {name} -->"
        if mark in source[0]:
            source[0] = source[0].replace(mark, make())


def setup(app: Any) -> None:
    """Connect the above; called by Sphinx."""
    app.connect("source-read", _read)
