"""Errors of Hydra and OmegaConf as one sentence of ours: what was typed, what is allowed, what to do."""

from __future__ import annotations

import re
from collections.abc import Callable

from sdmodule.cli.key_hints import nearest_keys
from sdmodule.cli.overrides import quote_overrides, reads
from sdmodule.cli.typed_line import OVERRIDE, TypedLine, one_of
from sdmodule.cli.unknown_keys import foreign_choice, nothing_to_remove, other_command, unknown_key, unknown_option
from sdmodule.errors import SettingsError, choices

TYPES = {"bool": "true or false", "integer": "a whole number", "int": "a whole number", "float": "a number"}
"""OmegaConf's types in words."""

Found = re.Match[str]


def explain(error: BaseException, typed: TypedLine) -> str | None:
    """An error of Hydra or OmegaConf as one sentence; None for one that is not known.

    Args:
        error: what was raised.
        typed: what was typed.
    """
    if ours := error_of_resolver(error):
        return str(ours)
    text = str(error)
    if not text or text.startswith("Error merging override"):
        text = f"{text} {error.__cause__}"  # Hydra leaves what matters to the cause
    text = " ".join(text.split())
    for pattern, sentence in SENTENCES.items():
        if found := re.search(pattern, text):
            return sentence(found, typed)
    return None


def error_of_resolver(error: BaseException) -> SettingsError | None:
    """Our own error, if a resolver of the configuration raised it and OmegaConf wrapped it."""
    found = re.search(r"SettingsError raised while resolving interpolation: (.*)", str(error))
    return SettingsError(found[1]) if found else None


def _missing_file(found: Found, typed: TypedLine) -> str:
    group, _, option = found[1].rpartition("/")
    return unknown_option(group, option, typed) if group else f"{option}: there is no such file in the configuration."


def _missing_option(found: Found, typed: TypedLine) -> str:
    return f"{found[1]}: missing; add {found[1]}=OPTION with one of {choices(typed.tree.offered(found[1]))}."


def _no_option(found: Found, typed: TypedLine) -> str:
    """A group with something that cannot be the name of an option, such as a number."""
    groups = typed.tree.choices
    told = typed.find(rf"^\+?({'|'.join(map(re.escape, groups))})=(null|true|false|[-+.\d]+)$")
    group = told.lstrip("+").partition("=")[0] or "GROUP"
    allowed = f" ({choices(typed.tree.offered(group))})" if group in groups else ""
    return (
        f"{told or 'the value of a group'}: must be an option of the group{allowed}; to set one of its keys, write "
        f"{group}.KEY=VALUE (--help {group} shows them)."
    )


def _already_there(found: Found, typed: TypedLine) -> str:
    key = found[1].lstrip("+").partition("=")[0]
    told = typed.find(rf"^\++{re.escape(key)}=") or f"+{key}"
    chosen = typed.tree.choices.get(key)
    there = f"{key}={','.join(chosen)} is chosen already" if chosen else f"{key} exists already"
    return f"{told}: {there}; write {told.lstrip('+')}, without the plus sign."


def _other_value(found: Found, typed: TypedLine) -> str:
    return f"{typed.argument(found[1])}: {found[1]} is {found[2]}; write ~{found[1]} to remove it."


def _wrong_type(found: Found, typed: TypedLine) -> str:
    told, reason = found[1], found[2].partition(" full_key:")[0]
    if converted := re.search(r"could not be converted to (\w+)|is not a valid (\w+)", reason):
        return f"{told}: must be {TYPES.get((converted[1] or converted[2]).lower(), 'of another type')}."
    if allowed := re.search(r"expected one of \[(.*?)\]", reason):
        return f"{told}: unknown; choose one of {choices(allowed[1].split(', '))}."
    return f"{told}: cannot be used here ({reason}); --help shows all keys and what they take."


def _sweep_without_m(found: Found, typed: TypedLine) -> str:
    key, _, value = found[1].partition("=")
    one_only = key in typed.tree.own_groups and key not in ("callbacks", "logger")
    as_list = "" if "(" in value or one_only else f", or write {key}=[{value}] for a list"
    return f"{found[1]}: several values are a sweep; add -m (--multirun) to run one after the other{as_list}."


def _sweep_of_hydra(found: Found, typed: TypedLine) -> str:
    return f"{found[1]}: settings of Hydra cannot be swept; give one value."


def _unreadable(found: Found, typed: TypedLine) -> str:
    overrides = [text for text in typed.arguments if OVERRIDE.match(text)]
    told = next((text for text in overrides if not all(map(reads, quote_overrides([text])))), "an argument")
    key, _, value = told.partition("=")
    if not re.fullmatch(r"[+~]*[\w./@:-]+", key):
        return f"{told}: {key!r} is no name of a key; write key=value, as in steps=20."
    if call := re.match(r"(choice|range|interval|glob|sort|shuffle)\(", value):
        example = "range(1,4)" if call[1] in ("range", "interval") else "choice(1,2,3)"
        return f"{told}: cannot be read as a sweep; write numbers or names in it, such as {key}={example}."
    if any(value.count(one) != value.count(other) for one, other in ("[]", "{}", "()")) or value.startswith(("[", "{")):
        return f"{told}: brackets or quotes do not match; write a list as '{key}=[a, b]', settings as '{key}={{a: 1}}'."
    return f"{told}: has characters that mean something to Hydra; put the value in two kinds of quotes: '{key}=\"…\"'."


def _no_sweep(found: Found, typed: TypedLine) -> str:
    told = typed.find(rf"={found[1].lower()}\(")
    return f"{told}: cannot be run as a sweep; write values such as 1,2,3, or range(1,4)."


def _unknown_reference(found: Found, typed: TypedLine) -> str:
    """``${key}`` of a key that does not exist, or that was removed."""
    name = found[1]
    if told := typed.find(r"\$\{[^}]*" + re.escape(name)):
        meant = [f"${{{key}}}" for key in nearest_keys(name, typed.tree.keys)]
        hint = f"did you mean {one_of(meant)}? " if meant else ""
        return f"{told}: refers to {name}, which does not exist; {hint}--help shows all keys."
    user = f", and {found[2]} needs it" if found.lastindex == 2 else ""
    if (recipe := typed.find(r"^\+?experiment=")) and (other := other_command(name, typed)):
        return f"{recipe}: is for {other}, because it needs {name}, which {typed.script} does not have; leave it out."
    return f"{name}: is missing{user}; {_put_back(name, typed)}."


def _put_back(name: str, typed: TypedLine) -> str:
    """What to do about a key that is missing: mostly it was removed with ``~``."""
    told = typed.find(rf"^~{re.escape(name.partition('.')[0])}\b")
    return f"leave out {told}" if told else f"add +{name}=…"


def _entry_of_list(found: Found, typed: TypedLine) -> str:
    told = typed.find(rf"\.{re.escape(found[1])}(\.|=)")
    parent = told.partition(f".{found[1]}")[0].lstrip("+~")
    return f"{told}: {parent} is a list and has no keys; write '{parent}=[…]'."


def _refers_to_itself(found: Found, typed: TypedLine) -> str:
    return f"{typed.find(r'[$][{]') or found[1] or 'a key'}: refers to itself; give a value."


def _no_list_of_folders(found: Found, typed: TypedLine) -> str:
    return f"{typed.argument('hydra.searchpath')}: must be a list of folders, such as [file:///my/configuration]."


def _unknown_resolver(found: Found, typed: TypedLine) -> str:
    told = typed.find(r"\$\{" + re.escape(found[1]) + ":") or "${" + found[1] + ":…}"
    return f"{told}: there is no resolver {found[1]}; use oc.env for environment variables, or ${{KEY}} for a key."


def _unset_variable(found: Found, typed: TypedLine) -> str:
    told = typed.find(re.escape(found[1])) or f"${{oc.env:{found[1]}}}"
    default = f"${{oc.env:{found[1]},DEFAULT}}"
    return f"{told}: the environment variable {found[1]} is not set; set it, or give a default as in {default}."


def _removed(found: Found, typed: TypedLine) -> str:
    return f"{found[1]}: is missing; {_put_back(found[1], typed)}."


def _missing_value(found: Found, typed: TypedLine) -> str:
    return f"{found[1]}: missing; add {found[1]}=… to the command."


def _no_primary(found: Found, typed: TypedLine) -> str:
    return (
        f"--config-name={found[1]}: not found; leave it out, or name a file in a folder of yours, which "
        "--config-dir=FOLDER adds."
    )


def _no_module(found: Found, typed: TypedLine) -> str:
    return "--config-path: there is no configuration of sdmodule; use --config-dir=FOLDER to add files of your own."


def _no_folder(found: Found, typed: TypedLine) -> str:
    return f"--config-dir={found[1]}: not found; give an existing folder."


def _twice(found: Found, typed: TypedLine) -> str:
    return f"{typed.argument(found[1])}: {found[1]} is chosen twice; choose one option of it."


SENTENCES: dict[str, Callable[[Found, TypedLine], str]] = {
    r"^In '([^']+)': Could not override '([^'@]+)[^']*'\. No match": lambda f, typed: foreign_choice(f[1], f[2], typed),
    r"Could not override '([^']+)'": lambda f, typed: unknown_key(f[1], typed),
    r"looks like a config group override, but config group '([^']+)'": lambda f, typed: unknown_key(f[1], typed),
    r"Could not (?:find|load) '([^']+)'": _missing_file,
    r"You must specify '([^']+)'": _missing_option,
    r"^Config group override must be": _no_option,
    r"^invalid literal for int\(\) with base 10: '([^']+)'": _entry_of_list,
    r"^Could not append to config\. An item is already at '([^']+)'": _already_there,
    r"^Multiple values for ([^ ]+)\.": _already_there,
    r"^force-add of config groups is not supported: '([^']+)'": _already_there,
    r"^Could not delete from config\. '([^']+)' does not exist": lambda f, typed: nothing_to_remove(f[1], typed),
    r"^Could not delete '([^']+)'": lambda f, typed: nothing_to_remove(f[1], typed),
    r"^Could not delete from config\. The value of '([^']+)' is (.*) and not": _other_value,
    r"^Error merging override (\S+) (.*)": _wrong_type,
    r"^Ambiguous value for argument '(.*?)' 1\. ": _sweep_without_m,
    r"^Sweep parameters '(.*)' requires --multirun": _sweep_without_m,
    r"^Sweeping over Hydra's configuration is not supported : '(.*)'": _sweep_of_hydra,
    r"does not support sweep type : ([A-Z]+)_": _no_sweep,
    r"override_grammar/basic": _unreadable,
    r"Interpolation key '([^']+)' not found(?: full_key: (\S+))?": _unknown_reference,
    r"^(?:Recursive interpolation|Interpolation to parent node) detected(?: full_key: (\S+))?": _refers_to_itself,
    r"^hydra\.searchpath must be a list": _no_list_of_folders,
    r"Unsupported interpolation type (\S+)": _unknown_resolver,
    r"Environment variable '([^']+)' not found": _unset_variable,
    r"Missing mandatory value: (\S+)": _missing_value,
    r"^(?:Key '\w+' is not in struct|Missing key \w+) full_key: (\S+)": _removed,
    r"^Cannot find primary config '([^']+)'": _no_primary,
    r"^Primary config (?:module|directory)": _no_module,
    r"^Additional config directory '([^']+)' not found": _no_folder,
    r"^(\S+) appears more than once in the final defaults list": _twice,
}
"""What the messages of Hydra 1.3 look like, and the sentence for each; the first that fits is taken."""
