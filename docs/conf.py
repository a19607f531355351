"""Sphinx: the documentation site. ``make docs`` builds it into ``docs/_build/html``."""

from __future__ import annotations

import os
import re
import shutil
import sys
import urllib.request
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path[:0] = [str(ROOT), str(DOCS)]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))  # for notebooks
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # notebooks run small layers, for which one thread is enough

from _ext import api, benchmarks, configuration  # noqa: E402

from sdmodule import __version__  # noqa: E402

project = "sdmodule"
author = "the authors of sdmodule"
copyright = "the authors of sdmodule, Apache-2.0"
release = version = __version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.intersphinx",
    "sphinx.ext.viewcode",
    "sphinx_design",
]
exclude_patterns = ["_build", "_ext"]
default_role = "py:obj"  # a name in backquotes links to its definition, where there is one

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
python_maximum_signature_line_length = 100
toc_object_entries = False

nb_execution_mode = "cache"
nb_execution_cache_path = str(DOCS / "_build" / "notebooks")
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_output_stderr = "remove"

html_theme = "pydata_sphinx_theme"
html_title = f"sdmodule {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_sidebars = {"getting_started": [], "faq": []}  # pages without others below them
html_theme_options = {
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "navbar_persistent": ["search-button"],
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": ["sphinx-version"],
}

INVENTORIES = {
    "python": "https://docs.python.org/3/",
    "torch": "https://docs.pytorch.org/docs/stable/",
    "lightning": "https://lightning.ai/docs/pytorch/stable/",
}


def reachable(urls: dict[str, str], folder: Path) -> dict[str, tuple[str, str]]:
    """Inventories of other projects, downloaded into a folder; those that cannot be reached are left out.

    ``DOCS_OFFLINE=1`` tries none.
    """
    found: dict[str, tuple[str, str]] = {}
    folder.mkdir(parents=True, exist_ok=True)
    for name, url in urls.items():
        file = folder / f"{name}.inv"
        try:
            if not file.is_file():
                with urllib.request.urlopen(f"{url}objects.inv", timeout=3) as answer:
                    content = answer.read()
                if not content.startswith(b"# Sphinx inventory"):
                    continue
                file.write_bytes(content)
        except (OSError, ValueError):
            continue
        found[name] = (url, str(file))
    return found


intersphinx_mapping = (
    {} if os.environ.get("DOCS_OFFLINE") == "1" else reachable(INVENTORIES, DOCS / "_build" / "inventories")
)

configuration.generate(ROOT / "conf", DOCS / "generated" / "configuration")
benchmarks.generate(ROOT, DOCS / "generated" / "benchmarks", release)
api.generate(ROOT / "sdmodule", DOCS / "generated" / "api")
(DOCS / "examples").mkdir(exist_ok=True)
for notebook in (ROOT / "examples").glob("*.ipynb"):
    if not (copy := DOCS / "examples" / notebook.name).is_file() or copy.read_bytes() != notebook.read_bytes():
        shutil.copyfile(notebook, copy)


def shorten_defaults(
    app: Any, what: str, name: str, thing: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """A signature in which a default that is a whole object is three dots."""
    if signature:
        signature = re.sub(r"=\s*[A-Z]\w+\((?:[^()]|\([^()]*\))*\)", "= ...", signature)
    return signature, returns


def setup(app: Any) -> None:
    """Let Sphinx know of what this file adds to it."""
    app.connect("autodoc-process-signature", shorten_defaults)
