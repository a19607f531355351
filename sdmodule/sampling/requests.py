"""What a run of sampling is asked for: one request an image."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from sdmodule.conditioning.control import read_controls
from sdmodule.conditioning.masked_image import MaskedImage, count_images, pair_images_and_masks
from sdmodule.conditioning.text import parse_weights
from sdmodule.errors import SettingsError, choices
from sdmodule.io.run_folder import IMAGES, INPUTS
from sdmodule.ranges import check_flag

LARGEST_SEED = 2**64 - 1
"""Of torch's generators."""

TEXT2IMAGE, INPAINT = TASKS = ("text2image", "inpaint")
"""What a model is asked to do."""


@dataclass
class SampleRequest:
    """One image to sample.

    Not frozen, since Lightning cannot move a frozen dataclass to a device or to half precision.

    Args:
        index: the image's place in the run.
        prompt: what it shows; empty for unconditional.
        negative_prompt: what guidance leads away from.
        seed: seed of its initial noise.
        masked: the image to repaint, and where; None for an image from text alone.
        control: the image that a ControlNet follows; None where there is none.
        kept: False for an image that is not written: it only fills up the batch of others.
    """

    index: int
    prompt: str
    negative_prompt: str
    seed: int
    masked: MaskedImage | None = None
    control: Image.Image | None = None
    kept: bool = True

    def inputs(self) -> dict[str, Image.Image]:
        """The images that it was given, by the names of the settings that gave them."""
        given = {"control": self.control}
        if self.masked is not None:
            given |= {"image": self.masked.image, "mask": self.masked.mask}
        return {name: image for name, image in given.items() if image is not None}


def image_name(request: SampleRequest) -> str:
    """Path of a request's image within its run folder."""
    return f"{IMAGES}/{request.index:05d}-{request.seed}.png"


def request_metadata(request: SampleRequest) -> dict[str, Any]:
    """What was requested of one image, in plain types; input images are named by their content."""
    metadata: dict[str, Any] = {
        "index": request.index,
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "seed": request.seed,
    }
    return metadata | {key: _input_name(image) for key, image in request.inputs().items()}


def _input_name(image: Image.Image) -> str:
    """Path of an input image within a run folder: a hash of its mode, size and pixels."""
    digest = hashlib.blake2b(f"{image.mode} {image.size}".encode() + image.tobytes(), digest_size=8)
    return f"{INPUTS}/{digest.hexdigest()}.png"


def build_requests(
    prompt: str | Sequence[str] | None = None,
    prompts: str | None = None,
    negative_prompt: str | Sequence[str] | None = None,
    num_images_per_prompt: int = 1,
    seed: int = 0,
    *,
    image: Any = None,
    mask: Any = None,
    task: str = TEXT2IMAGE,
    control: Any = None,
    control_edges: bool = False,
) -> list[SampleRequest]:
    """List the images of a run: all images of the first prompt, then of the second; image k has seed ``seed + k``.

    Args:
        prompt: one or several prompts; an empty string samples without a condition.
        prompts: instead, a ``.txt`` with a prompt a line, or a ``.jsonl`` with an object a line: ``prompt`` and,
            optionally, its own ``negative_prompt`` and ``seed`` (its images use ``seed``, ``seed + 1``, …).
            Blank lines are skipped.
        negative_prompt: one for all prompts, or one for each.
        num_images_per_prompt: images of each prompt.
        seed: seed of the first image.
        image: for inpainting, the image to repaint, or one for each prompt; see ``masked_image.pair_images_and_masks``.
        mask: where to repaint it, or one for each.
        task: ``text2image`` or ``inpaint``.
        control: the image that a ControlNet follows, or one for each prompt; see ``controlnet.read_controls``.
        control_edges: ``control`` is a photo, of which the edges are followed.

    Raises:
        SettingsError: if a setting or the file cannot be used.
    """
    if not _is_count(num_images_per_prompt) or num_images_per_prompt < 1:
        raise SettingsError(f"num_images_per_prompt={num_images_per_prompt} is too small; give 1 or more.")
    if not _is_count(seed):
        raise SettingsError(f"seed={seed!r} is no seed; give a whole number, 0 or more.")
    if prompt is not None and prompts is not None:
        raise SettingsError(f"Both prompt={prompt!r} and prompts={prompts} are given; give one of them.")
    if prompts is not None:
        rows = _read_prompts(Path(prompts).expanduser())
    elif prompt is not None:
        rows = [{"prompt": text} for text in _strings(prompt, "prompt")]
    else:
        raise SettingsError("No prompt is given; set prompt to a text or prompts to a .txt or .jsonl file.")

    if task == INPAINT and len(rows) == 1 and (count := count_images(image, mask)) > 1:
        # one prompt for many images; a seed of its own counts on, as over its images
        own = rows[0].get("seed")
        steps = range(0, count * num_images_per_prompt, num_images_per_prompt)
        rows = [rows[0] if own is None else {**rows[0], "seed": own + k} for k in steps]
    negatives = _strings("" if negative_prompt is None else negative_prompt, "negative_prompt")
    if negative_prompt is None or isinstance(negative_prompt, str):
        negatives *= len(rows)
    if len(negatives) != len(rows):
        raise SettingsError(
            f"negative_prompt has {len(negatives)} texts for {len(rows)} prompts; give one text, or one a prompt."
        )
    images = _images(image, mask, len(rows), task)
    controls = _controls(control, control_edges, len(rows))
    for text in {*negatives, *(text for row in rows for text in row.values() if isinstance(text, str))}:
        check_text(text)
        parse_weights(text)  # a wrong weight is told of before anything is sampled
    requests: list[SampleRequest] = []
    for row, negative, masked, followed in zip(rows, negatives, images, controls, strict=True):
        first = len(requests)
        first_seed = row.get("seed", seed + first)
        if (last := first_seed + num_images_per_prompt - 1) > LARGEST_SEED:
            raise SettingsError(f"seed={last} of an image is more than {LARGEST_SEED}; give a smaller seed.")
        requests += [
            SampleRequest(
                first + i, row["prompt"], row.get("negative_prompt", negative), first_seed + i, masked, followed
            )
            for i in range(num_images_per_prompt)
        ]
    return requests


def check_text(text: str) -> None:
    """Check that a prompt is text.

    Raises:
        SettingsError: for half of a character, as is left where text was cut between the two.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise SettingsError(f"prompt {text!r} has half of a character ({error.reason}); write it anew.") from error


def _images(image: Any, mask: Any, count: int, task: str) -> Sequence[MaskedImage | None]:
    """The masked image of each of ``count`` prompts; None for each where images come from text alone."""
    if task == TEXT2IMAGE:
        for name, value in (("image", image), ("mask", mask)):
            if value is not None:
                raise SettingsError(
                    f"{name} was given and model=text2image makes images from text alone; use model=inpaint or leave "
                    f"{name} out."
                )
        return [None] * count
    if image is None:
        raise SettingsError("model=inpaint needs an image to repaint; give image=… and mask=….")
    return pair_images_and_masks(image, mask, count)


def _controls(control: Any, edges: bool, count: int) -> Sequence[Image.Image | None]:
    """The control image of each of ``count`` prompts; None for each where there is none."""
    check_flag("control_edges", edges)
    if control is not None:
        return read_controls(control, edges, count)
    if edges:
        raise SettingsError("control_edges=true was given and no image to take edges of; add control=PHOTO.")
    return [None] * count


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _strings(value: str | Sequence[str], key: str) -> list[str]:
    """Turn one text or a list of them into a list."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, Sequence) or not all(isinstance(text, str) for text in value):
        raise SettingsError(f"{key}={value!r} is no text; give a string or a list of strings (quote numbers).")
    if not value:
        raise SettingsError(f"{key}=[] is empty; give at least one text.")
    return list(value)


def _read_prompts(path: Path) -> list[dict]:
    """Read a file of prompts as rows with ``prompt`` and, optionally, ``negative_prompt`` and ``seed``."""
    if path.suffix not in {".txt", ".jsonl"}:
        raise SettingsError(f"prompts={path} is neither .txt (a prompt a line) nor .jsonl (an object a line).")
    if not os.path.isfile(path):
        raise SettingsError(f"prompts={path} is no file; give the path of a .txt or .jsonl file.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise SettingsError(f"prompts={path} is not UTF-8 text ({error}); save it as UTF-8.") from error
    lines = {number: line.strip() for number, line in enumerate(text.split("\n"), start=1) if line.strip()}
    if not lines:
        raise SettingsError(f"prompts={path} is blank; write a prompt a line.")
    if path.suffix == ".txt":
        return [{"prompt": line} for line in lines.values()]
    return [_parse_row(line, f"prompts={path}, line {number}") for number, line in lines.items()]


def _parse_row(line: str, where: str) -> dict:
    types = {"prompt": "a string", "negative_prompt": "a string", "seed": "a whole number, 0 or more"}
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"{where} is no JSON ({error}); write an object a line.") from error
    if not isinstance(row, dict) or "prompt" not in row:
        raise SettingsError(f'{where} is {line}; write an object with at least "prompt".')
    for name, value in row.items():
        if name not in types:
            raise SettingsError(f"{where} has the unknown key {name!r}; allowed are {choices(types)}.")
        if not (_is_count(value) if name == "seed" else isinstance(value, str)):
            raise SettingsError(f"{where} has {name}={value!r}; give {types[name]}.")
    return row
