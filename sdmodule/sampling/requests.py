"""Sample requests: what each image of a run is sampled from."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from sdmodule.conditioning.control import read_controls
from sdmodule.conditioning.masked_image import MaskedImage, count_images, pair_images_and_masks
from sdmodule.conditioning.text import parse_weights
from sdmodule.errors import MAX_SEED, SettingsError, check_bool, check_int, check_seed, choices, is_int
from sdmodule.io.run_folder import IMAGES, INPUTS

TEXT2IMAGE, INPAINT = TASKS = ("text2image", "inpaint")
"""Tasks of a model."""


@dataclass
class SampleRequest:
    """One image to sample.

    Not frozen, since Lightning cannot move a frozen dataclass to a device or to half precision.

    Args:
        index: number of the image in the run.
        prompt: what the image shows; empty for unconditional sampling.
        negative_prompt: what guidance leads away from.
        seed: seed of its initial noise.
        masked: the image to inpaint with its mask; None for text-to-image.
        control: the control image for a ControlNet, or None.
        kept: False for an image that only fills up a batch, and is not written.
    """

    index: int
    prompt: str
    negative_prompt: str
    seed: int
    masked: MaskedImage | None = None
    control: Image.Image | None = None
    kept: bool = True

    def inputs(self) -> dict[str, Image.Image]:
        """The input images, by the names of the settings that gave them: ``image``, ``mask``, ``control``."""
        inputs = {"control": self.control}
        if self.masked is not None:
            inputs |= {"image": self.masked.image, "mask": self.masked.mask}
        return {name: image for name, image in inputs.items() if image is not None}


def as_requests(batch: Any, batch_idx: int, batch_size: int | None) -> list[SampleRequest]:
    """A batch of prediction as requests; plain prompts are drawn from the seeds 0, 1, … in their order.

    Args:
        batch: requests, prompts, or a mapping whose ``caption`` holds prompts.
        batch_idx: index of the batch.
        batch_size: prompts in a full batch; that of this batch if None.

    Raises:
        SettingsError: for anything else.
    """
    if isinstance(batch, Mapping):
        batch = batch.get("caption")
    if isinstance(batch, str):
        batch = [batch]
    if not isinstance(batch, Sequence) or not all(isinstance(one, (str, SampleRequest)) for one in batch):
        raise SettingsError(
            f"the data loader gave a {type(batch).__name__}; a batch of predict is a list of prompts, or of requests."
        )
    first = batch_idx * (batch_size or len(batch))
    return [
        SampleRequest(first + k, one, "", first + k) if isinstance(one, str) else one for k, one in enumerate(batch)
    ]


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
    """The requests of a run: all images of the first prompt, then of the second; image k has seed ``seed + k``.

    Args:
        prompt: one prompt or several; an empty one samples unconditionally.
        prompts: instead of ``prompt``, a ``.txt`` file with one prompt per line, or a ``.jsonl`` file with one object
            per line: ``prompt`` and, optionally, its own ``negative_prompt`` and ``seed`` (its images use ``seed``,
            ``seed + 1``, …). Blank lines are skipped.
        negative_prompt: one for all prompts, or one per prompt.
        num_images_per_prompt: images of each prompt.
        seed: seed of the first image.
        image: for inpainting, one image for all prompts, or one per prompt; see `pair_images_and_masks`.
        mask: for inpainting, where: one mask for all prompts, or one per prompt.
        task: ``text2image`` or ``inpaint``.
        control: for a ControlNet, one control image for all prompts, or one per prompt; see `read_controls`.
        control_edges: ``control`` is a photo whose edges are the control image.

    Raises:
        SettingsError: if a setting or the file cannot be used.
    """
    check_int("num_images_per_prompt", num_images_per_prompt)
    check_seed("seed", seed)
    if prompt is not None and prompts is not None:
        raise SettingsError(f"prompt={prompt!r}, prompts={prompts}: exclude each other; give one of them.")
    if prompts is not None:
        rows = _read_prompts(Path(prompts).expanduser())
    elif prompt is not None:
        rows = [{"prompt": text} for text in _strings(prompt, "prompt")]
    else:
        raise SettingsError("prompt: missing; give prompt=TEXT, or prompts=FILE with a .txt or .jsonl file.")

    if task == INPAINT and len(rows) == 1 and (count := count_images(image, mask)) > 1:
        # one prompt for many images; a seed of its own counts up over all of them
        own = rows[0].get("seed")
        steps = range(0, count * num_images_per_prompt, num_images_per_prompt)
        rows = [rows[0] if own is None else {**rows[0], "seed": own + k} for k in steps]
    negatives = _strings("" if negative_prompt is None else negative_prompt, "negative_prompt")
    if negative_prompt is None or isinstance(negative_prompt, str):
        negatives *= len(rows)
    if len(negatives) != len(rows):
        raise SettingsError(
            f"negative_prompt: {len(negatives)} texts for {len(rows)} prompts; give one for all, or one per prompt."
        )
    images = _images(image, mask, len(rows), task)
    controls = _controls(control, control_edges, len(rows))
    for text in {*negatives, *(text for row in rows for text in row.values() if isinstance(text, str))}:
        check_text(text)
        parse_weights(text)  # so that an invalid weight is reported before anything is sampled
    requests: list[SampleRequest] = []
    for row, shared_negative, masked, control_image in zip(rows, negatives, images, controls, strict=True):
        first = len(requests)
        first_seed = row.get("seed", seed + first)
        if (last := first_seed + num_images_per_prompt - 1) > MAX_SEED:
            raise SettingsError(f"seed={first_seed}: the last image would have seed {last}; seeds end at {MAX_SEED}.")
        negative = row.get("negative_prompt", shared_negative)
        requests += [
            SampleRequest(first + i, row["prompt"], negative, first_seed + i, masked, control_image)
            for i in range(num_images_per_prompt)
        ]
    return requests


def check_text(text: str) -> None:
    """Check that a prompt can be encoded.

    Raises:
        SettingsError: for an unpaired surrogate, which is left where a text was cut within a character.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise SettingsError(f"prompt={text!r}: contains an unpaired surrogate ({error.reason}); retype it.") from error


def _images(image: Any, mask: Any, count: int, task: str) -> Sequence[MaskedImage | None]:
    """The masked image of each of ``count`` prompts; None for each of text-to-image."""
    if task == TEXT2IMAGE:
        for name, value in (("image", image), ("mask", mask)):
            if value is not None:
                raise SettingsError(
                    f"{name}: model=text2image samples from text alone; use model=inpaint, or leave {name} out."
                )
        return [None] * count
    if image is None:
        raise SettingsError("model=inpaint: needs an image to inpaint; give image=… and mask=….")
    return pair_images_and_masks(image, mask, count)


def _controls(control: Any, edges: bool, count: int) -> Sequence[Image.Image | None]:
    """The control image of each of ``count`` prompts; None for each if there are none."""
    check_bool("control_edges", edges)
    if control is not None:
        return read_controls(control, edges, count)
    if edges:
        raise SettingsError("control_edges=true: needs a photo to find edges in; give control=PHOTO.")
    return [None] * count


def _strings(value: str | Sequence[str], key: str) -> list[str]:
    """One text, or a list of texts, as a list."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, Sequence) or not all(isinstance(text, str) for text in value):
        raise SettingsError(f"{key}={value!r}: must be a text or a list of texts; put numbers in quotes.")
    if not value:
        raise SettingsError(f"{key}=[]: is empty; give at least one text.")
    return list(value)


def _read_prompts(path: Path) -> list[dict]:
    """The rows of a file of prompts: each has ``prompt`` and, optionally, ``negative_prompt`` and ``seed``."""
    if path.suffix not in {".txt", ".jsonl"}:
        raise SettingsError(
            f"prompts={path}: must be a .txt (one prompt per line) or .jsonl file (one object per line)."
        )
    if not os.path.isfile(path):
        raise SettingsError(f"prompts={path}: not found; give the path of a .txt or .jsonl file.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise SettingsError(f"prompts={path}: is not UTF-8 text ({error}); save it as UTF-8.") from error
    lines = {number: line.strip() for number, line in enumerate(text.split("\n"), start=1) if line.strip()}
    if not lines:
        raise SettingsError(f"prompts={path}: is empty; write one prompt per line.")
    if path.suffix == ".txt":
        return [{"prompt": line} for line in lines.values()]
    return [_parse_row(line, f"prompts={path}: line {number}") for number, line in lines.items()]


def _parse_row(line: str, where: str) -> dict:
    allowed = {"prompt": "a text", "negative_prompt": "a text", "seed": f"a whole number from 0 to {MAX_SEED}"}
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"{where} is not JSON ({error}); write one object per line.") from error
    if not isinstance(row, dict) or "prompt" not in row:
        raise SettingsError(f'{where} is {line}, not an object with a "prompt"; write one per line.')
    for name, value in row.items():
        if name not in allowed:
            raise SettingsError(f"{where} has the unknown key {name!r}; use {choices(allowed)}.")
        if not (is_int(value) and 0 <= value <= MAX_SEED if name == "seed" else isinstance(value, str)):
            raise SettingsError(f"{where} has {name}={value!r}; {name} must be {allowed[name]}.")
    return row
