"""The configuration reference: every group, file, key, default and comment of ``conf/``."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from _ext.pages import table, toctree, write_pages

FIRST = ("train", "predict", "model", "tuning", "objective", "training", "optimizer", "lr_scheduler", "data", "cache")
"""Pages in the order in which people look for them; the others follow by name."""


@dataclass
class ConfigFile:
    """One file of ``conf/``.

    Attributes:
        name: the option that selects it, such as ``lora``.
        about: its leading comment.
        globally: whether its keys stand at the root of the configuration (``# @package _global_``).
        bases: other files of its group that it starts from.
        groups: a row for each group that it selects: its name, the option and the comment.
        keys: a row for each key: its dotted name, its default and its comment.
    """

    name: str
    about: list[str] = field(default_factory=list)
    globally: bool = False
    bases: list[str] = field(default_factory=list)
    groups: list[dict[str, str]] = field(default_factory=list)
    keys: list[dict[str, str]] = field(default_factory=list)


def read_config(path: Path, group: str = "") -> ConfigFile:
    """Read a file of a group with its comments, which a YAML parser would drop."""
    lines = path.read_text(encoding="utf-8").splitlines()
    config = ConfigFile(path.stem)
    head = next((k for k, line in enumerate(lines) if line.strip() and not line.startswith("#")), len(lines))
    for line in lines[:head]:
        if line.startswith("# @package"):
            config.globally = "_global_" in line
        elif line.startswith("#"):
            config.about.append(line.removeprefix("#").removeprefix(" "))
    root = yaml.compose("\n".join(lines))
    if not isinstance(root, yaml.MappingNode):
        return config
    prefix = "" if config.globally or group in ("", "shared") else f"{group.partition('/')[0]}."
    for key, value in root.value:
        if key.value == "defaults":
            _read_defaults(value, lines, config)
        else:
            config.keys += _rows(key, value, lines, prefix, head)
    return config


def _read_defaults(entries: yaml.SequenceNode, lines: list[str], config: ConfigFile) -> None:
    for entry in entries.value:
        if isinstance(entry, yaml.ScalarNode):
            if entry.value != "_self_":
                config.bases.append(entry.value)
            continue
        for key, value in entry.value:
            config.groups.append(
                {
                    "group": f"`{key.value.removeprefix('override ').removeprefix('/')}`",
                    "option": f"`{_source(value, lines)}`",
                    "what it is": _comment(key, value, lines, 0),
                }
            )


def _rows(key: yaml.Node, value: yaml.Node, lines: list[str], prefix: str, head: int) -> Iterator[dict[str, str]]:
    name, comment = f"{prefix}{key.value}", _comment(key, value, lines, head)
    if isinstance(value, yaml.MappingNode) and value.value and not value.flow_style:
        if comment:
            yield {"key": f"`{name}`", "default": "", "what it is": comment}
        for inner, node in value.value:
            yield from _rows(inner, node, lines, f"{name}.", head)
    else:
        yield {"key": f"`{name}`", "default": f"`{_source(value, lines)}`", "what it is": comment}


def _source(node: yaml.Node, lines: list[str]) -> str:
    """A value as the file has it, on one line; a block of text is folded."""
    if isinstance(node, yaml.ScalarNode) and node.style in (">", "|"):
        return " ".join(node.value.split())
    first, last = node.start_mark, node.end_mark
    if first.line == last.line:
        return lines[first.line][first.column : last.column].strip()
    if isinstance(node, yaml.SequenceNode):
        return "[" + ", ".join(_source(one, lines) for one in node.value) + "]"
    if isinstance(node, yaml.MappingNode):
        return ", ".join(f"{key.value}: {_source(value, lines)}" for key, value in node.value)
    return str(node.value)


def _comment(key: yaml.Node, value: yaml.Node, lines: list[str], head: int) -> str:
    """The comment at the end of a key's line, or else the lines of comment right above it, below line ``head``."""
    end = value.end_mark if value.end_mark.line == key.start_mark.line else key.end_mark
    if found := re.search(r"(?:^|\s)#\s?(.*)", lines[key.start_mark.line][end.column :]):
        return _text(found[1])
    above: list[str] = []
    for line in reversed(lines[head : key.start_mark.line]):
        if not re.match(rf"\s{{{key.start_mark.column}}}#", line):
            break
        above.insert(0, line.strip().removeprefix("#").strip())
    return _text(" ".join(above))


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
        parts.append(table(config.groups))
    if config.keys:
        parts.append(table(config.keys))
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
        pages[path.stem] = f"# `{path.stem}.py`\n\n" + _section(config, "")
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
        "configuration of a command, `--help` the groups and their options.\n\n"
    )
    return {"index.md": intro + toctree(names, maxdepth="1")} | {f"{name}.md": text for name, text in pages.items()}


def generate(conf: Path, target: Path) -> None:
    """Write the reference of the configuration in ``conf`` into the folder ``target``."""
    write_pages(target, configuration_pages(conf))
