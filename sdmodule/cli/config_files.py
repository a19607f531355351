"""The files of ``conf/`` as people read them: keys, defaults as written, and the comments beside them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml

GLOBAL = "# @package _global_"
LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class Setting:
    """A key of a file, or a group that it chooses an option of.

    Attributes:
        name: dotted name of the key, or name of the group.
        value: the default or the option, as written, on one line; empty for a key with keys below it.
        comment: what stands beside it.
        heading: the comment that stands above a block of keys and is about all of them.
        begins_block: whether it is the first key of a file, or stands below an empty line.
    """

    name: str
    value: str
    comment: str
    heading: str = ""
    begins_block: bool = False


@dataclass
class ConfigFile:
    """One file of ``conf/``.

    Attributes:
        name: the option that selects it, such as ``lora``.
        about: its leading comment.
        globally: whether its keys stand at the root of the configuration (``# @package _global_``).
        bases: other files that it starts from, such as ``checkpoint`` or ``shared/images``.
        groups: the groups that it chooses an option of.
        keys: its keys.
    """

    name: str
    about: list[str] = field(default_factory=list)
    globally: bool = False
    bases: list[str] = field(default_factory=list)
    groups: list[Setting] = field(default_factory=list)
    keys: list[Setting] = field(default_factory=list)

    @property
    def summary(self) -> str:
        """Its leading comment on one line, without the commands in it."""
        return " ".join(line for line in self.about if not line.startswith("  "))


def read_config(path: Traversable | Path, group: str = "") -> ConfigFile:
    """Read a file of a group with its comments, which a YAML parser would drop."""
    lines = path.read_text(encoding="utf-8").splitlines()
    config = ConfigFile(Path(path.name).stem)
    head = next((k for k, line in enumerate(lines) if line.strip() and not line.startswith("#")), len(lines))
    for line in lines[:head]:
        if line.startswith("# @package"):
            config.globally = line == GLOBAL
        elif line.startswith("#"):
            config.about.append(line.removeprefix("#").removeprefix(" "))
    root = yaml.compose("\n".join(lines), Loader=LOADER)
    if not isinstance(root, yaml.MappingNode):
        return config
    prefix = "" if config.globally or group in ("", "shared") else f"{group.partition('/')[0]}."
    for key, value in root.value:
        if key.value == "defaults":
            _read_defaults(value, lines, config)
        else:
            config.keys += _settings(key, value, lines, prefix, head)
    return config


def _read_defaults(entries: yaml.SequenceNode, lines: list[str], config: ConfigFile) -> None:
    for entry in entries.value:
        if isinstance(entry, yaml.ScalarNode):
            if entry.value != "_self_":
                config.bases.append(entry.value)
            continue
        for key, value in entry.value:
            name = key.value.removeprefix("override ").removeprefix("/")
            config.groups.append(Setting(name, _source(value, lines), _beside(key, value, lines)))


def _settings(key: yaml.Node, value: yaml.Node, lines: list[str], prefix: str, head: int) -> Iterator[Setting]:
    name, beside = f"{prefix}{key.value}", _beside(key, value, lines)
    above = _above(key, lines, head)
    comment, heading = (beside, above) if beside else (above, "")
    before = next((line for line in reversed(lines[: key.start_mark.line]) if not line.lstrip().startswith("#")), "")
    if isinstance(value, yaml.MappingNode) and value.value and not value.flow_style:
        if comment:
            yield Setting(name, "", comment, heading, not before)
        for inner, node in value.value:
            yield from _settings(inner, node, lines, f"{name}.", head)
    else:
        yield Setting(name, _source(value, lines), comment, heading, not before)


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


def _beside(key: yaml.Node, value: yaml.Node, lines: list[str]) -> str:
    """The comment at the end of a key's line."""
    end = value.end_mark if value.end_mark.line == key.start_mark.line else key.end_mark
    found = re.search(r"(?:^|\s)#\s?(.*)", lines[key.start_mark.line][end.column :])
    return found[1].strip() if found else ""


def _above(key: yaml.Node, lines: list[str], head: int) -> str:
    """The lines of comment right above a key, below line ``head``."""
    above: list[str] = []
    for line in reversed(lines[head : key.start_mark.line]):
        if not re.match(rf"\s{{{key.start_mark.column}}}#", line):
            break
        above.insert(0, line.strip().removeprefix("#").strip())
    return " ".join(above)


def file_chain(conf: Traversable, group: str, option: str) -> list[ConfigFile]:
    """The file of an option after all that it starts from, so that what comes later wins; empty without a file."""
    path = conf.joinpath(*group.split("/"), f"{option}.yaml")
    if not path.is_file():
        return []
    own = read_config(path, group)
    bases = [base.partition("@")[0] for base in own.bases]
    return [*(file for base in bases for file in file_chain(conf, group, base)), own]
