"""The merge command: the parts of a predict run, joined into one run folder."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from sdmodule.cli.console import echo
from sdmodule.cli.error_messages import printable
from sdmodule.errors import SettingsError, check_path, count_of, unwritable
from sdmodule.io.folder_lock import folder_locked
from sdmodule.io.merge_parts import GivenPart, check_complete, check_output, merge_parts, read_parts
from sdmodule.io.progress import LONG_TASK, progress
from sdmodule.io.run_folder import CONFIG

HELP = """\
Join the parts of a run, which predict wrote with shard=1/N to shard=N/N, into one run folder.

usage: {program} PART... output_dir=FOLDER

PART                   the folder of a part, such as my_run/part-3-of-4
output_dir=FOLDER      where the run goes; my_run, if you like

It is equal to what one process writes: images, predictions.jsonl, index.html, timings.json, grid.png. Images are hard
links where the file system has them. If it is interrupted, the same command continues."""


def merge_main() -> None:
    """Entry point of ``sdmodule-merge`` and of ``python -m sdmodule.merge``; bad input ends it with one sentence."""
    try:
        merge(sys.argv[1:])
    except SettingsError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted: the same command continues", file=sys.stderr)
        sys.exit(130)


def merge(words: Sequence[str]) -> None:
    """Join parts. Whatever is wrong with them is reported before anything is written.

    Args:
        words: the folders of the parts, and ``output_dir=FOLDER``.

    Raises:
        SettingsError: if they cannot be joined, or the folder cannot be written.
    """
    if {"-h", "--help"} & set(words):
        print(HELP.format(program=_program()))
        return
    folders, output = read_words(words)
    check_output(output)
    parts = read_parts(folders)
    total = parts[0].about.total
    with progress(total, "checking images", delay=LONG_TASK) as on_done:
        check_complete(parts, on_done)
    try:
        with folder_locked(output):
            written = merge_parts(parts, output, _config(parts[0], output))
    except OSError as error:
        raise unwritable(output, error.strerror) from error
    if not written:
        echo(f"{output} holds the {count_of(total, 'image')} of this run already")
        return
    echo(f"Merged {count_of(len(parts), 'part')}: {count_of(total, 'image')}")
    echo(f"Wrote {output / 'grid.png'} and {output / 'index.html'}")


def read_words(words: Sequence[str]) -> tuple[list[Path], Path]:
    """The folders of the parts and the output folder.

    Raises:
        SettingsError: if a word is neither, or one of them is missing.
    """
    folders: list[Path] = []
    output = None
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or Path(word).is_dir():
            folders.append(Path(word).expanduser())
        elif key == "output_dir":
            check_path("output_dir", value)
            output = Path(value).expanduser()
        else:
            raise SettingsError(f"{word}: merge takes the folders of parts, and output_dir=FOLDER; leave it out.")
    if option := next((str(folder) for folder in folders if str(folder).startswith("-")), None):
        raise SettingsError(f"{option}: there is no such option; merge takes folders of parts, output_dir= and --help.")
    if output is None or not folders:
        missing = "the folders of the parts" if output else "output_dir"
        raise SettingsError(f"{missing}: missing; write {_program()} PART… output_dir=FOLDER.")
    return folders, output


def _program() -> str:
    return "sdmodule-merge" if Path(sys.argv[0]).name == "sdmodule-merge" else "python -m sdmodule.merge"


def _config(part: GivenPart, output: Path) -> str:
    """The ``config.yaml`` of the run that the parts make up."""
    if not (part.folder / CONFIG).is_file():
        return ""
    config = OmegaConf.load(part.folder / CONFIG)
    config.shard, config.output_dir = None, str(output)
    return OmegaConf.to_yaml(config)
