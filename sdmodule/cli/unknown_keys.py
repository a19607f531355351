"""The sentence for a key, a group or an option that does not exist, with what was probably meant."""

from __future__ import annotations

from collections.abc import Iterable

from sdmodule.cli.command_tree import COMMANDS, CommandTree
from sdmodule.cli.config_files import file_chain
from sdmodule.cli.config_keys import conf_dir
from sdmodule.cli.key_hints import nearest_keys, nearest_names
from sdmodule.cli.typed_line import TypedLine, one_of, program
from sdmodule.errors import SettingsError, choices

GROUPS_OF_BOTH = ("data", "model")
"""Groups that both commands have, with different options."""


def unknown_key(key: str, typed: TypedLine) -> str:
    """The sentence for a key or a group that the command does not have."""
    tree, told = typed.tree, typed.argument(key)
    value, group = told.partition("=")[2], key.partition("@")[0]
    if key in tree.choices:
        return f"{told}: sets a key that {key} does not have; --help {key} shows its keys."
    if group in tree.choices:
        return f"{told}: {group} can be chosen for one place only; write {group}={value}."
    if key in tree.unchosen_keys:
        return f"{told}: only {one_of(tree.unchosen_keys[key])} has this key; add it to the command."
    meant = meant_keys(key, value, typed)
    if other := other_command(key, typed, groups_only=bool(meant)):
        return f"{told}: is for {other}, and {typed.script} has nothing like it; leave it out."
    group, parent = key.partition(".")[0], key.rpartition(".")[0]
    if not isinstance(tree.keys.get(parent, {}), dict):
        return f"{told}: {parent} is a value and has no keys; write {parent}=VALUE."
    hint = f"did you mean {one_of(meant)}? " if meant else ""
    shown = f"--help {group} shows its keys" if group in tree.choices else "--help shows all keys"
    return f"{told}: there is no key {key}; {hint}{shown}."


def meant_keys(key: str, value: str, typed: TypedLine) -> list[str]:
    """What was probably meant by a key that does not exist: other keys, or an option of a group."""
    tree = typed.tree
    if key.startswith("hydra"):
        return nearest_keys(key, dict.fromkeys(group for group in tree.choices if "hydra" in group) | tree.hydra_keys)
    groups = [group for group in tree.choices if not group.startswith("hydra")]
    having = groups_with(value, typed)
    if "." not in key and having:
        close = nearest_names(key, having)
        if close or len(having) < 3:
            return [f"{group}={value}" for group in close or having]
    meant = nearest_keys(key, dict.fromkeys(groups) | tree.keys)
    if meant and (_ends_with(key, tree.keys) or not _ends_with(key, tree.unchosen_keys)):
        return meant
    unchosen = nearest_keys(key, dict.fromkeys(tree.unchosen_keys))
    return [f"{name} with {one_of(tree.unchosen_keys[name])}" for name in unchosen]


def _ends_with(key: str, names: Iterable[str]) -> bool:
    return any(f".{name}".endswith(f".{key}") for name in names)


def groups_with(option: str, typed: TypedLine) -> list[str]:
    """Groups that have an option of this name; experiments only if no other group has one."""
    groups = [group for group in typed.tree.choices if not group.startswith("hydra")]
    having = [group for group in groups if option in typed.tree.offered(group)]
    return [group for group in having if group != "experiment"] or having


def other_command(key: str, typed: TypedLine, groups_only: bool = False) -> str:
    """The other command, if it has a key or a group of this name."""
    for other in COMMANDS:
        tree = CommandTree(other)
        if other != typed.command and (key in tree.own_groups or (not groups_only and tree.has(key))):
            return program(other)
    return ""


def foreign_choice(file: str, group: str, typed: TypedLine) -> str:
    """The sentence for a file that chooses an option of a group which this command does not have.

    Args:
        file: path of the file in the configuration, such as ``experiment/lora``.
        group: the group that it chooses an option of.
        typed: what was typed.
    """
    told = file.replace("/", "=", 1)
    other = other_command(group, typed, groups_only=True)
    return (
        f"{told}: {f'is for {other}' if other else 'cannot be used here'}, because it chooses an option of {group}, "
        f"which {typed.script} does not have; leave it out."
    )


def unknown_option(group: str, option: str, typed: TypedLine) -> str:
    """The sentence for an option that a group does not have."""
    tree = typed.tree
    options = tree.offered(group) or tree.options(group)
    meant = [f"{group}={name}" for name in nearest_names(option, options)]
    meant = meant or [f"{other}={option}" for other in groups_with(option, typed)]
    hint = f"did you mean {one_of(meant)}? " if meant else ""
    return f"{group}={option}: unknown; {hint}choose one of {choices(options)}."


def nothing_to_remove(told: str, typed: TypedLine) -> str:
    """The sentence for a key or group that is removed with ``~`` and does not exist."""
    key = told.partition("=")[0]
    if chosen := typed.tree.choices.get(key):
        return f"~{told}: {key}={','.join(chosen)} is chosen; write ~{key} to remove that."
    meant = [f"~{name}" for name in nearest_keys(key, dict.fromkeys(typed.tree.choices) | typed.tree.keys)]
    hint = f"did you mean {one_of(meant)}? " if meant else ""
    return f"~{told}: there is no key {key} to remove; {hint}--help shows all keys."


def check_options(typed: TypedLine) -> None:
    """Refuse an option of ours that is for the other command only, such as ``data=emoji`` of predict.

    Raises:
        SettingsError: for such an option.
    """
    for told in typed.arguments:
        group, _, option = told.lstrip("+").partition("=")
        if group == "experiment":
            _check_experiment(told, option, typed)
        if group in GROUPS_OF_BOTH and _is_foreign(group, option, typed):
            taken = one_of([f"{group}={name}" for name in CommandTree(typed.command).offered(group)])
            raise SettingsError(f"{told}: {typed.script} does not take it; choose {taken}.")


def _check_experiment(told: str, name: str, typed: TypedLine) -> None:
    for file in file_chain(conf_dir(), "experiment", name):
        for chosen in file.groups:
            if chosen.name in GROUPS_OF_BOTH and _is_foreign(chosen.name, chosen.value, typed):
                other = next(program(command) for command in COMMANDS if command != typed.command)
                raise SettingsError(
                    f"{told}: is for {other}, because it chooses {chosen.name}={chosen.value}; leave it out."
                )


def _is_foreign(group: str, option: str, typed: TypedLine) -> bool:
    """Whether an option of ours is not one that the command takes."""
    return (conf_dir() / group / f"{option}.yaml").is_file() and option not in CommandTree(typed.command).offered(group)
