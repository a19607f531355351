"""What ``--help`` prints: every key with its default and its explanation, grouped as the configuration is."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import yaml
from hydra._internal.hydra import Hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sdmodule.cli.command_tree import CommandTree
from sdmodule.cli.config_files import ConfigFile, file_chain
from sdmodule.cli.config_keys import conf_dir
from sdmodule.cli.key_hints import nearest_names, references
from sdmodule.cli.typed_line import OVERRIDE, one_of
from sdmodule.conf import SAMPLERS
from sdmodule.errors import SettingsError

WIDTH = 100
COLUMN = 36
"""Where explanations begin."""

CLASS = {"_target_": "the class", "_partial_": "the class gets its other arguments later"}

FOOT = """\
--help GROUP           the options and keys of one group: --help sampler, --help data=dreambooth
--cfg job              the whole configuration of a run, in YAML; runs nothing
-m KEY=A,B             one run for each value
--version              the versions of sdmodule, torch, lightning and diffusers
--hydra-help           the options of Hydra
HYDRA_FULL_ERROR=1     in front of the command: errors with their traceback"""


@contextmanager
def our_help(topics: Sequence[str]) -> Iterator[None]:
    """Let ``--help`` print this page instead of Hydra's.

    Args:
        topics: groups or keys to explain; everything if there are none.
    """
    hydras = Hydra.app_help

    def app_help(hydra: Hydra, config_name: str, args_parser: Any, args: Any) -> None:
        cfg = hydra.compose_config(config_name, args.overrides, RunMode.RUN, with_log_configuration=False)
        HydraConfig.instance().set_config(cfg)
        tree = CommandTree(config_name, cfg=cfg, loader=hydra.config_loader)
        chosen = [text.lstrip("+").partition("=")[0] for text in args.overrides if OVERRIDE.match(text)]
        print(
            help_page(tree, list(dict.fromkeys([*topics, *(name for name in chosen if name in tree.choices)]))),
            flush=True,
        )

    Hydra.app_help = app_help  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        Hydra.app_help = hydras  # type: ignore[method-assign]


def help_page(tree: CommandTree, topics: Sequence[str] = ()) -> str:
    """The page of a command, or of some of its groups and keys.

    Args:
        tree: what the command takes.
        topics: groups or keys to explain; everything if there are none.

    Raises:
        SettingsError: for a topic that does not exist.
    """
    page = _Page(tree)
    if not topics:
        return "\n".join(page.everything())
    return "\n\n".join("\n".join(page.topic(topic)) for topic in topics)


class _Page:
    """Lines of the page of one command."""

    def __init__(self, tree: CommandTree) -> None:
        self.tree = tree
        self.groups = [group for group in tree.choices if not group.startswith("hydra")]
        self.primary = file_chain(conf_dir(), "", tree.command)
        files = [*self.primary, *(file for group in self.groups for file in self.chosen_files(group))]
        settings = [one for file in files for one in file.keys]
        self.comments = {one.name: one.comment for one in reversed(settings) if one.comment}
        self.blocks = {one.name for one in settings if one.begins_block}
        self.headings = {one.name: one.heading for one in reversed(settings) if one.heading}

    def chosen_files(self, group: str) -> list[ConfigFile]:
        """Files of the chosen options of a group, each after those that it starts from."""
        chains = [option_files(group, option) for option in self.tree.choices[group]]
        return [file for chain in chains for file in chain]

    def everything(self) -> Iterator[str]:
        """All keys, then all groups with theirs."""
        yield from wrapped(self.primary[-1].summary if self.primary else "")
        for key in self.tree.keys:
            if key.partition(".")[0] not in self.groups:
                yield from self.line(key)
        for group in self.groups:
            yield ""
            yield from columns(self.choice(group), self.allowed(group))
            for key in self.tree.keys:
                if key.startswith(f"{group}."):
                    yield from self.line(key, "  ")
        yield ""
        yield FOOT

    def topic(self, name: str) -> Iterator[str]:
        """One group with its options and keys, or one key with those below it."""
        keys = [key for key in self.tree.keys if f"{key}.".startswith(f"{name}.")]
        if name not in self.groups and not keys:
            meant = nearest_names(name, [*self.groups, *self.tree.keys])
            hint = f"did you mean {one_of(meant)}? " if meant else ""
            raise SettingsError(f"--help {name}: there is no such group or key; {hint}--help shows all.")
        if name in self.groups:
            yield f"{self.choice(name)} is chosen; the options of {name} are:"
            for option in self.tree.offered(name):
                yield from columns(f"  {option}", option_summary(name, option), 24)
            yield from self.also_set(name)
            yield ""
            yield f"Keys of {self.choice(name)}:" if len(keys) > 1 else f"{self.choice(name)} has no keys."
        for key in keys:
            yield from self.line(key, "  ")

    def also_set(self, group: str) -> Iterator[str]:
        """Keys of other groups that the chosen option sets."""
        settings = [one for file in self.chosen_files(group) for one in file.keys]
        outside = [one for one in settings if one.value and one.name.partition(".")[0] != group]
        chosen = [one for file in self.chosen_files(group) for one in file.groups]
        if outside or chosen:
            yield ""
            yield f"{self.choice(group)} sets:"
        for one in [*chosen, *outside]:
            yield from columns(f"  {one.name}={one.value}", one.comment)

    def choice(self, group: str) -> str:
        """``sampler=ddim``, ``callbacks=[timing, progress]``."""
        chosen = self.tree.choices[group]
        several = f"[{', '.join(chosen)}]" if chosen else "null"
        return f"{group}={chosen[0] if len(chosen) == 1 else several}"

    def allowed(self, group: str) -> str:
        """The options of a group and what it is for."""
        comment, options = self.tree.comment(group), self.tree.offered(group)
        if " | " in comment or len(options) < 2:
            return comment
        return " | ".join(options) + (f": {comment}" if comment else "")

    def line(self, key: str, indent: str = "") -> Iterator[str]:
        """A key, its default and its explanation; a key with keys below it only if there is something to say of it."""
        value, comment = self.tree.keys[key], self.comments.get(key, "")
        if key in self.blocks and not indent:
            yield ""
        if key in self.headings:
            yield from wrapped(f"{indent}{self.headings[key]}:")
        if isinstance(value, dict) and value:
            if comment:
                yield from columns(f"{indent}{key}", comment)
            return
        comment = comment or CLASS.get(key.rpartition(".")[2], "") or handed_on(value)
        comment = f"must be given; {comment}".removesuffix("; ") if value == "???" else comment
        yield from columns(f"{indent}{key}={self.default(key, value)}", comment)

    def default(self, key: str, value: Any) -> str:
        """The value of a key as one types it; one that is handed on is resolved where that makes it shorter."""
        if handed_on(value):
            target = self.tree.keys.get(references(value)[0], None)
            try:
                resolved = OmegaConf.select(self.tree.cfg, key)
            except OmegaConfBaseException:
                return value
            if not OmegaConf.is_config(resolved) and not (isinstance(target, str) and "${" in target):
                value = resolved
        shown = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), allow_unicode=True)
        return shown.removesuffix("...\n").strip() if not isinstance(value, str) else value or '""'


def handed_on(value: Any) -> str:
    """``as steps`` for ``${steps}`` and ``${oc.select:steps,50}``; an empty text for all other values."""
    whole = isinstance(value, str) and re.fullmatch(r"\$\{([\w.]+|oc\.select:.*|given:.*)\}", value)
    return f"as {references(value)[0]}" if whole and references(value) else ""


def option_files(group: str, option: str) -> list[ConfigFile]:
    """Files of an option; the samplers that have none start from ``checkpoint``."""
    return file_chain(conf_dir(), group, "checkpoint" if group == "sampler" and option in SAMPLERS else option)


def option_summary(group: str, option: str) -> str:
    """What an option is, in a line."""
    if group == "sampler" and option in SAMPLERS:
        return SAMPLERS[option]
    files = file_chain(conf_dir(), group, option)
    return files[-1].summary if files else ""


def columns(left: str, right: str, column: int = COLUMN) -> Iterator[str]:
    """A name and its explanation, which goes on below itself if it is long."""
    if not right:
        yield left
        return
    line = f"{left.ljust(column - 2)}  {right}"
    if len(line) <= WIDTH:
        yield line
        return
    first, *rest = wrapped(right, WIDTH - column)
    if len(left) > column - 2:
        yield left
        left = ""
    yield f"{left.ljust(column)}{first}"
    yield from (" " * column + text for text in rest)


def wrapped(text: str, width: int = WIDTH) -> list[str]:
    """A text in lines."""
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)
