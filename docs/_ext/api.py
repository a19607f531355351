"""The API reference: pages of autodoc directives for the public names, found where the source defines them."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

from _ext.pages import toctree, write_pages

PAGES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "module": ("The module", "One class fine-tunes and samples.", ("StableDiffusionModule", "SettingsError")),
    "settings": (
        "Settings",
        "What the groups of the constructor, of the configuration and of `infer` take.",
        (
            "SamplingSettings",
            "InpaintSettings",
            "TokenMerging",
            "SpeedSettings",
            "Objective",
            "TrainingSettings",
            "FullTuning",
            "LoraTuning",
            "TextualInversion",
            "ControlNetTuning",
        ),
    ),
    "callbacks": ("Callbacks", "Each works with any Lightning `Trainer`.", ("sdmodule.callbacks.*",)),
    "data": (
        "Data",
        "Data modules, and where images come from.",
        ("sdmodule.data.*", "ImageSource", "WeightedSource", "Folder", "Shards", "HuggingFaceData", "Example"),
    ),
    "evaluation": (
        "Evaluation",
        "Scorers, metrics as functions of features, and the figures of a set of images.",
        ("sdmodule.evaluation.*",),
    ),
    "diffusion": (
        "Diffusion",
        "The equations, as functions of tensors: no Lightning, no file, no configuration.",
        ("sdmodule.diffusion.*",),
    ),
    "files": (
        "Files",
        "Checkpoint folders, adapters and run folders from Python.",
        ("load_components", "save_components", "Components", "make_scheduler", "load_average", "read_metadata"),
    ),
}
"""Title, introduction and names of each page; ``package.*`` stands for all public names of a package."""


def definitions(package: Path) -> dict[str, tuple[str, str]]:
    """Where each public class and function is defined: its full name and its kind, by its short name."""
    found: dict[str, tuple[str, str]] = {}
    for path in sorted(package.rglob("*.py")):
        module = ".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_"):
                kind = "autoclass" if isinstance(node, ast.ClassDef) else "autofunction"
                found.setdefault(node.name, (f"{module}.{node.name}", kind))
    return found


def public(dotted: str, known: dict[str, tuple[str, str]]) -> list[str]:
    """The public names of a package: those of its ``__all__``, or else what its files define."""
    names = getattr(importlib.import_module(dotted), "__all__", None)
    if names is None:
        functions_too = dotted.endswith(".diffusion")  # elsewhere functions serve the classes
        names = [
            name
            for name, (full, kind) in known.items()
            if full.startswith(f"{dotted}.") and (functions_too or kind == "autoclass")
        ]
    return sorted((name for name in names if name in known), key=str.lower)


def public_path(full: str) -> str:
    """The shortest name under which users import something: that of a package which has it in its ``__all__``."""
    package, _, name = full.rpartition(".")
    while "." in package:
        package = package.rpartition(".")[0]
        if name in getattr(importlib.import_module(package), "__all__", ()):
            return f"{package}.{name}"
    return full


def api_pages(package: Path) -> dict[str, str]:
    """The pages of the reference, by file name.

    Raises:
        LookupError: for a name that nothing defines, which a rename leaves behind.
    """
    known = definitions(package)
    pages = {}
    placed: set[str] = set()
    for page, (title, introduction, names) in PAGES.items():
        parts = [f"# {title}\n\n{introduction}\n"]
        for name in names:
            for one in public(name.removesuffix(".*"), known) if name.endswith(".*") else [name]:
                if one not in known:
                    raise LookupError(f"{one} is not defined in sdmodule; fix PAGES in docs/_ext/api.py")
                if one not in placed:
                    full, kind = known[one]
                    parts.append(_directive(public_path(full), kind))
                placed.add(one)
        pages[f"{page}.md"] = "\n".join(parts)
    intro = "# API reference\n\nThe public names, from their docstrings.\n\n"
    return {"index.md": intro + toctree(list(PAGES), maxdepth="2")} | pages


def _directive(full: str, kind: str) -> str:
    name = full.rpartition(".")[2]
    options = "   :members:\n   :show-inheritance:\n" if kind == "autoclass" else ""
    return f"## {name}\n\n```{{eval-rst}}\n.. {kind}:: {full}\n{options}```\n"


def generate(package: Path, target: Path) -> None:
    """Write the pages for a package's source folder into the folder ``target``."""
    write_pages(target, api_pages(package))
