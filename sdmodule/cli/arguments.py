"""The words of a command line, checked before Hydra reads them: options, overrides, and words that are neither."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from sdmodule.cli import overrides
from sdmodule.cli.config_keys import key_tags
from sdmodule.cli.key_hints import nearest_keys, nearest_names
from sdmodule.cli.typed_line import OVERRIDE, TypedLine, one_of
from sdmodule.cli.unknown_keys import check_options, groups_with
from sdmodule.errors import SettingsError, choices

CHOICES = {
    "--cfg": ("all", "hydra", "job"),
    "--info": ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
}
SHORT = {"-h": "--help", "-c": "--cfg", "-p": "--package", "-r": "--run", "-m": "--multirun", "-i": "--info"}
SHORT |= {"-cp": "--config-path", "-cn": "--config-name", "-cd": "--config-dir", "-sc": "--shell-completion"}
TASKS = ("--run", "--cfg", "--multirun", "--info", "--shell-completion")
"""Options of which a command line has one at most."""

WITH_A_VALUE = (*(name for name in overrides.WITH_A_VALUE if name.startswith("--")), "--from")
OPTIONS = tuple(dict.fromkeys(("--help", "--hydra-help", "--version", "--resolve", *TASKS, *WITH_A_VALUE)))

OPTION = re.compile(r"-{1,2}[A-Za-z]")
"""How a word begins that is an option; a negative number is none."""


def check_words(typed: TypedLine) -> list[str]:
    """Check every word of a command line that is no override; overrides are Hydra's to check.

    Returns:
        What ``--help`` is asked about: the words that are neither options nor overrides.

    Raises:
        SettingsError: for a word that cannot be used.
    """
    words, given, topics = typed.arguments, [], []
    asks_help = any(full_name(word) == "--help" for word in words)
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        if OVERRIDE.match(word) and word.lstrip("+~").partition("=")[0]:
            continue
        if not OPTION.match(word):
            if not asks_help:
                _refuse_bare_word(typed, position - 1)
            topics.append(word)
            continue
        name, _, value = full_name(word).partition("=")
        if name not in OPTIONS or (name == "--from" and typed.command != "predict"):
            _refuse_option(typed, position - 1)
        if name == "--help" and value:
            topics.append(value)
        follows = words[position] if position < len(words) else ""
        if not value and (name in WITH_A_VALUE or (name == "--info" and re.fullmatch(r"[\w-]+", follows))):
            value, position = follows, position + 1
        _check_value(name, value)
        if name == "--package":
            _check_package(value, typed)
        given.append(name)
    _check_together(given)
    check_options(typed)
    return topics


def without_topics(arguments: Sequence[str], topics: Sequence[str]) -> list[str]:
    """The words of a command line without what ``--help`` is asked about."""
    words = [word for word in arguments if word not in topics]
    return ["--help" if full_name(word).startswith("--help=") else word for word in words]


def full_name(word: str) -> str:
    """An option by its long name, as Hydra completes it: ``--multirun`` for ``-m`` and ``--multi``."""
    name, equals, value = word.partition("=")
    if found := re.fullmatch(r"-c(job|hydra|all)", word):
        return f"--cfg={found[1]}"
    completed = [option for option in OPTIONS if option.startswith(name)] if len(name) > 3 else []
    if name not in OPTIONS and len(completed) == 1:
        name = completed[0]
    return SHORT.get(name, name) + equals + value


def _check_value(name: str, value: str) -> None:
    if name in WITH_A_VALUE and not value:
        allowed = f"; choose one of {choices(CHOICES[name])}" if name in CHOICES else f", as in {name}=VALUE"
        raise SettingsError(f"{name}: needs a value{allowed}.")
    if name in CHOICES and value and value not in CHOICES[name]:
        raise SettingsError(f"{name}={value}: unknown; choose one of {choices(CHOICES[name])}.")


def _check_package(package: str, typed: TypedLine) -> None:
    added = any(word.startswith("+") for word in typed.arguments)
    if added or package == "_global_" or typed.tree.has(package) or package in typed.tree.hydra_keys:
        return
    meant = nearest_keys(package, typed.tree.keys)
    hint = f"did you mean {one_of(meant)}? " if meant else ""
    raise SettingsError(f"--package={package}: there is no such key; {hint}--help shows all keys.")


def _check_together(given: list[str]) -> None:
    tasks = list(dict.fromkeys(name for name in given if name in TASKS))
    if len(tasks) > 1:
        raise SettingsError(f"{' '.join(tasks)}: cannot be given together; give one of them.")
    if "--resolve" in given and not {"--cfg", "--help"} & set(given):
        raise SettingsError("--resolve: resolves what --cfg shows; write --cfg job --resolve.")


def _refuse_option(typed: TypedLine, position: int) -> None:
    """Refuse an option that does not exist; mostly it is a key with dashes in front."""
    word, following = typed.arguments[position], _run(typed.arguments[position + 1 :])
    name, equals, value = word.partition("=")
    value = value if equals else " ".join(following)
    told = word if equals else " ".join([word, *following])
    key = name.lstrip("-").replace("-", "_")
    if not typed.tree.has(key):
        options = [option.lstrip("-") for option in OPTIONS if option != "--from"]
        if option := nearest_names(name.lstrip("-"), options):
            raise SettingsError(f"{word}: there is no such option; did you mean --{option[0]}?")
        meant = nearest_keys(key, typed.tree.keys)
        if not meant:
            raise SettingsError(
                f"{word}: there is no such option; write settings as key=value, without dashes; --help shows all keys."
            )
        key = meant[0]
    raise SettingsError(f"{told}: settings are written without dashes; write {assignment(key, value)}.")


def _refuse_bare_word(typed: TypedLine, position: int) -> None:
    """Refuse a word without ``=``; mostly the shell has split a value at its spaces."""
    words = typed.arguments
    before, word, following = words[position - 1] if position else "", words[position], words[position + 1 :]
    if "=" in word:
        raise SettingsError(f"{word}: there is no key before the =; write key=value.")
    if following and following[0].startswith("="):
        value = " ".join([following[0][1:], *_run(following[1:])]).strip()
        told = " ".join([word, following[0], *_run(following[1:])])
        raise SettingsError(f"{told}: has spaces around the =; write {assignment(word, value)}.")
    key, equals, value = before.partition("=")
    if OVERRIDE.match(before) and equals:
        rest = " ".join([word, *_rest_of_value(value, word, following)])
        if not value:
            raise SettingsError(f"{before} {rest}: has a space after the =; write {assignment(key, rest)}.")
        whole = assignment(key, f"{value} {rest}")
        raise SettingsError(f"{before} {rest}: the shell splits this at its spaces; put it in quotes: {whole}.")
    run = [word, *_run(following)]
    raise SettingsError(f"{' '.join(run)}: settings are written as key=value; {_advice(typed, run)}.")


def _run(words: list[str]) -> list[str]:
    """The words up to the next option or override."""
    return list(takewhile(lambda word: not OPTION.match(word) and not OVERRIDE.match(word), words))


def _rest_of_value(value: str, word: str, following: list[str]) -> list[str]:
    """The words that belong to a value which the shell has split: up to its last bracket, or the next override."""
    if value.startswith(("[", "{")):
        closing = "]" if value.startswith("[") else "}"
        ends = [k for k, text in enumerate([word, *following]) if text.endswith(closing)]
        return following[: ends[0]] if ends else _run(following)
    return _run(following)


def _advice(typed: TypedLine, run: list[str]) -> str:
    """What to write instead of words without ``=``."""
    text, tree = " ".join(run), typed.tree
    if len(run) == 1:
        if f"--{text}" in OPTIONS:
            return f"write --{text}"
        if tree.has(text):
            return f"write {text}=VALUE, and see --help {text}"
        if groups := groups_with(text, typed):
            return f"write {one_of([f'{group}={text}' for group in groups])}"
    if typed.command in ("train", "pack"):
        return f"write {assignment('data.root', text if Path(text).is_dir() else 'FOLDER')}, and see --help"
    if typed.command == "evaluate":
        return f"write {assignment('run', text)}, and see --help"
    return f"write {assignment('prompts' if text.endswith(('.txt', '.jsonl')) else 'prompt', text)}"


def assignment(key: str, value: str) -> str:
    """``key=value`` as a shell reads it in one word."""
    if key_tags().get(key) == "prompt" and value.startswith("["):
        return f"""'{key}=["…", "…"]'"""
    if re.fullmatch(r"[\w./,:=+@%-]*", value):
        return f"{key}={value or '…'}"
    if value.startswith(("[", "{")) or re.search(r'["$`\\!]', value):
        return shlex.quote(f"{key}={value}")
    return f'{key}="{value}"'
