"""Sphinx's settings. Nothing of a page comes from another server: no fonts, no scripts, no search service."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from making.links import ROOT, source  # noqa: E402

_version = re.search(r'^__version__ = "(.+)"', (ROOT / "fossil_export" / "version.py").read_text(), re.MULTILINE)
if _version is None:
    raise SystemExit("fossil_export/version.py: no version is there")

project = "fossil-export"
version = release = _version[1]
language = "en"
extensions = ["myst_parser", "sphinx_copybutton"]
root_doc = "index"
exclude_patterns = ["extra"]
nitpicky = True
smartquotes = False  # code is quoted, too

# GitHub's rules, so that a link works in both places.
myst_heading_anchors = 6
myst_heading_slug_func = "making.links.slug"
myst_enable_extensions = ["alert", "attrs_inline"]
myst_all_links_external = False
highlight_language = "none"

copybutton_prompt_text = r"\$ |>>> |\.\.\. "
copybutton_prompt_is_regexp = True
copybutton_selector = "div:not(.highlight-none) > div.highlight > pre"  # no output, only what can be run

html_theme = "furo"
html_title = f"{project} {version}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_copyright = False
html_show_sphinx = False
html_use_index = False
html_domain_indices = False
html_baseurl = ""
pygments_style = "default"
pygments_dark_style = "github-dark"
html_theme_options: dict[str, Any] = {
    "footer_icons": [{"name": "Source", "url": source(), "html": "Source", "class": "source-link"}],
}


def setup(app: Any) -> None:
    """Images that raw HTML shows are not copied by Sphinx."""
    app.config.html_extra_path = [str(Path(app.srcdir) / "extra")]
