"""The images to evaluate, and their prompts: those of a predict run, or of any folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from sdmodule.errors import SettingsError, check_path, count_of
from sdmodule.io.image_files import SUFFIXES, open_image, open_upright
from sdmodule.io.redact import shorten_home
from sdmodule.io.run_folder import RECORDS, read_records
from sdmodule.io.transparency import on_white


@dataclass(frozen=True)
class ImageSet:
    """Image files in their order, opened one at a time.

    Attributes:
        folder: where they are.
        key: the setting that named it, for messages.
        files: the images.
        prompts: one per image; None if they have none.
        seeds: one per image of a predict run; None otherwise.
    """

    folder: Path
    key: str
    files: tuple[Path, ...]
    prompts: tuple[str, ...] | None = None
    seeds: tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        """The folder as reports call it."""
        return shorten_home(str(self.folder))

    @property
    def setting(self) -> str:
        """``run=outputs/predict/…``, for messages."""
        return f"{self.key}={self.name}"

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[Image.Image]:
        """The images, RGB on white; each is read when it is asked for.

        Raises:
            SettingsError: for one that cannot be read.
        """
        for file in self.files:
            try:
                image = on_white(open_upright(file))
            except Exception as error:  # a damaged file ends in many kinds
                raise SettingsError(
                    f"{self.setting}: {file.relative_to(self.folder)} cannot be read ({error}); remove it, or make it "
                    "again."
                ) from error
            yield image

    def is_paired_with(self, other: ImageSet) -> bool:
        """Whether image k of both was made for the same prompt from the same seed."""
        mine = (self.prompts, self.seeds)
        return self.seeds is not None and mine == (other.prompts, other.seeds)


def read_image_set(folder: str | Path, key: str = "run") -> ImageSet:
    """The images of a predict run, by its ``predictions.jsonl``, or all those in a folder and the folders in it.

    Images of a folder have prompts if each of them is a PNG that predict wrote.

    Args:
        folder: the folder.
        key: the setting that named it, for messages.

    Raises:
        SettingsError: if there is no such folder, it is one of another kind, or images are missing.
    """
    check_path(key, folder)
    place = Path(folder).expanduser()
    if not place.is_dir():
        found = "is a file" if place.exists() else "not found"
        raise SettingsError(f"{key}={folder}: {found}; give the folder of a predict run, or one of images.")
    if (place / RECORDS).is_file():
        return _run(place, key)
    _check_kind(place, key)
    files = sorted(file for file in place.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    if not files:
        raise SettingsError(f"{key}={folder}: has no images; give the folder of a predict run, or one of images.")
    return ImageSet(place, key, tuple(files), *_prompts_in_png(files))


def _run(folder: Path, key: str) -> ImageSet:
    records = list(read_records(folder / RECORDS))
    if not records:
        raise SettingsError(f"{key}={folder}: its {RECORDS} names no images; sample some with predict first.")
    if not all(isinstance(record.get(name), str) for record in records for name in ("file", "prompt")):
        raise SettingsError(f"{key}={folder}: its {RECORDS} lacks files or prompts; give one that predict wrote.")
    files = [folder / record["file"] for record in records]
    outside = [file for file in files if not file.resolve().is_relative_to(folder.resolve())]
    if outside:
        raise SettingsError(f"{key}={folder}: its {RECORDS} names {outside[0]}, which is not in it; give another run.")
    if missing := [file for file in files if not file.is_file()]:
        raise SettingsError(
            f"{key}={folder}: {RECORDS} names {count_of(len(files), 'image')}, and {len(missing)} of them are missing, "
            f"such as {missing[0].relative_to(folder)}; sample again with resume=true."
        )
    seeds = [record.get("seed") for record in records]
    whole = all(isinstance(seed, int) for seed in seeds)
    prompts = tuple(record["prompt"] for record in records)
    return ImageSet(folder, key, tuple(files), prompts, tuple(map(int, seeds)) if whole else None)  # type: ignore[arg-type]


def _check_kind(folder: Path, key: str) -> None:
    """Refuse folders whose images, if any, are not those that one means to score."""
    if (folder / "model_index.json").is_file():
        raise SettingsError(f"{key}={folder}: is a checkpoint, without images; sample with pretrained={folder} first.")
    if any((folder / name).is_dir() for name in ("checkpoints", "export")):
        raise SettingsError(
            f"{key}={folder}: is the folder of a training; sample with what it exported, and give that run."
        )
    if jobs := sorted(file.parent for file in folder.glob(f"*/{RECORDS}")):
        raise SettingsError(f"{key}={folder}: has {count_of(len(jobs), 'run')}; give one of them, such as {jobs[0]}.")


def _prompts_in_png(files: list[Path]) -> tuple[tuple[str, ...] | None, tuple[int, ...] | None]:
    """The prompts and seeds in the PNG text of images; None if one has none."""
    prompts: list[str] = []
    seeds: list[int] = []
    for file in files:
        try:
            with open_image(file) as image:
                prompts.append(str(image.info["prompt"]))
                seeds.append(int(image.info["seed"]))
        except Exception:  # without either, or damaged, which is said when its pixels are read
            return None, None
    return tuple(prompts), tuple(seeds)
