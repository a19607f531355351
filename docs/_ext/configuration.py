"""The configuration reference: every group, file, key, default and comment of ``conf/``."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from _ext.pages import table, toctree, write_pages
from sdmodule.cli.config_files import ConfigFile, Setting, read_config

FIRST = (
    "train",
    "predict",
    "evaluate",
    "pack",
    "model",
    "tuning",
    "objective",
    "training",
    "optimizer",
    "lr_scheduler",
    "data",
    "cache",
)
"""Pages in the order in which people look for them; the others follow by name."""

WITHOUT_A_SCRIPT = {"evaluate": "sdmodule-evaluate", "pack": "python -m sdmodule.data.pack"}
"""How commands are called that have no script."""


def _rows(settings: list[Setting], key: str, value: str) -> list[dict[str, str]]:
    """Settings as rows of a table, with the heads of its first two columns."""
    return [
        {key: f"`{one.name}`", value: f"`{one.value}`" if one.value else "", "what it is": _text(one.comment)}
        for one in settings
    ]


def _text(comment: str) -> str:
    """A comment as Markdown, in which it has no markup."""
    return re.sub(r"([<*_\[\]])", r"\\\1", comment.strip())


def _section(config: ConfigFile, group: str) -> str:
    """What the reference says of one file."""
    selected = config.name if "shared" in group else f"{group}={config.name}"
    title = f"(conf-{group.replace('/', '-')}-{config.name})=\n## `{selected}`" if group else ""
    parts = [title, _about(config.about)]
    if config.globally and group:
        parts.append("*Sets keys at the root of the configuration.*")
    if config.bases:
        parts.append("Starts from " + ", ".join(f"`{base}`" for base in config.bases) + ".")
    if config.groups:
        parts.append(table(_rows(config.groups, "group", "option")))
    if config.keys:
        parts.append(table(_rows(config.keys, "key", "default")))
    elif not config.bases and not config.groups:
        parts.append("Sets nothing.")
    return "\n\n".join(part for part in parts if part) + "\n"


def _about(lines: list[str]) -> str:
    """Leading comments as Markdown: prose, and indented lines as commands."""
    text, commands = [], []
    for line in lines:
        (commands if line.startswith("  ") else text).append(line.strip())
    return _text(" ".join(text)) + ("\n\n```text\n" + "\n".join(commands) + "\n```" if commands else "")


def _order(name: str) -> tuple[int, str]:
    return (FIRST.index(name) if name in FIRST else len(FIRST), name)


def registered_samplers(conf: Path) -> dict[str, str]:
    """Options of ``sampler`` that have no file: ``SAMPLERS`` of ``conf/__init__.py``, with a word on each."""
    for node in ast.parse((conf / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "SAMPLERS" for t in node.targets):
            return ast.literal_eval(node.value)
    return {}


def configuration_pages(conf: Path) -> dict[str, str]:
    """The pages of the reference, one for each command and each group."""
    pages = {}
    for path in conf.glob("*.yaml"):
        config = read_config(path)
        program = WITHOUT_A_SCRIPT.get(path.stem, f"{path.stem}.py")
        pages[path.stem] = f"# `{program}`\n\n" + _section(config, "")
    for folder in sorted({path.parent for path in conf.rglob("*.yaml")} - {conf}):
        group = folder.relative_to(conf).as_posix()
        sections = [_section(read_config(path, group), group) for path in sorted(folder.glob("*.yaml"))]
        if group == "sampler" and (samplers := registered_samplers(conf)):
            rows = [{"option": f"`sampler={name}`", "what it is": _text(about)} for name, about in samplers.items()]
            sections.insert(0, f"These start from `checkpoint` and change `sampler.scheduler`:\n\n{table(rows)}\n")
        pages[group.replace("/", "-")] = f"# `{group}`\n\n" + "\n".join(sections)
    names = sorted(pages, key=_order)
    intro = (
        "# Configuration reference\n\n"
        "Every group, file, key and default of `conf/`, with the comment that stands beside it. The pages are "
        "generated from the files when the documentation is built.\n\n"
        "A key is set with `key=value` on the command line, a group with `group=option`. `--cfg job` prints the whole "
        "configuration of a command, `--help` its keys with these comments, `--help GROUP` one group.\n\n"
    )
    return {"index.md": intro + toctree(names, maxdepth="1")} | {f"{name}.md": text for name, text in pages.items()}


def generate(conf: Path, target: Path) -> None:
    """Write the reference of the configuration in ``conf`` into the folder ``target``."""
    write_pages(target, configuration_pages(conf))
