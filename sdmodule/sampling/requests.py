"""Sample requests: what each image of a run is sampled from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from sdmodule.conditioning.control import Controls, read_control_sets
from sdmodule.conditioning.masked_image import MaskedImage, count_images, pair_images_and_masks, read_all, read_images
from sdmodule.conditioning.prompt_syntax import parse_weights
from sdmodule.errors import MAX_SEED, SettingsError, check_bool, check_int, check_seed
from sdmodule.io.run_folder import IMAGES, INPUTS
from sdmodule.sampling.prompt_files import read_prompts

TEXT2IMAGE, INPAINT, IMAGE2IMAGE = TASKS = ("text2image", "inpaint", "image2image")
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
        masked: the image to inpaint with its mask, or None.
        image: the image to start from, or its latents ``[4, h, w]``; None unless an image becomes another.
        control: the control image for each ControlNet, or None.
        kept: False for an image that only fills up a batch, and is not written.
        prompt_2: what the second text encoder reads instead of ``prompt``, or None.
        negative_prompt_2: likewise, instead of ``negative_prompt``.
        image_prompt: images for an IP-Adapter, which count together.
    """

    index: int
    prompt: str
    negative_prompt: str
    seed: int
    masked: MaskedImage | None = None
    control: Controls | None = None
    kept: bool = True
    image: Image.Image | Tensor | None = None
    prompt_2: str | None = None
    negative_prompt_2: str | None = None
    image_prompt: tuple[Image.Image, ...] = ()

    @property
    def texts(self) -> tuple[str, str | None]:
        """The prompt for the text encoders: for the first, and for the second if it is another one."""
        return self.prompt, self.prompt_2

    @property
    def negative_texts(self) -> tuple[str, str | None]:
        """The negative prompt, likewise."""
        return self.negative_prompt, self.negative_prompt_2

    def inputs(self) -> dict[str, list[Image.Image]]:
        """The input images, by the names of the settings that gave them: ``image``, ``mask``, ``control``."""
        inputs: dict[str, Any] = {"image": self.image}
        if self.masked is not None:
            inputs |= {"image": self.masked.image, "mask": self.masked.mask}
        found = {name: [image] for name, image in inputs.items() if isinstance(image, Image.Image)}
        several = {"control": self.control or (), "ip_adapter_image": self.image_prompt}
        return {name: list(images) for name, images in several.items() if images} | found


def task_of(request: SampleRequest) -> str:
    """The task that a request is for, by the images that it has."""
    if request.masked is not None:
        return INPAINT
    return TEXT2IMAGE if request.image is None else IMAGE2IMAGE


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
    second = {"prompt_2": request.prompt_2, "negative_prompt_2": request.negative_prompt_2}
    metadata |= {key: text for key, text in second.items() if text is not None}
    for key, images in request.inputs().items():
        names = [input_name(image) for image in images]
        metadata[key] = names[0] if len(names) == 1 else names
    return metadata


def input_name(image: Image.Image) -> str:
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
    controlnets: int = 1,
    ip_adapter_image: Any = None,
    prompt_2: str | Sequence[str] | None = None,
    negative_prompt_2: str | Sequence[str] | None = None,
) -> list[SampleRequest]:
    """The requests of a run: all images of the first prompt, then of the second; image k has seed ``seed + k``.

    Args:
        prompt: one prompt or several; an empty one samples unconditionally.
        prompts: instead of ``prompt``, a ``.txt`` file with one prompt per line, or a ``.jsonl`` file with one object
            per line: ``prompt`` and, optionally, its own ``negative_prompt``, ``prompt_2``, ``negative_prompt_2`` and
            ``seed`` (its images use ``seed``, ``seed + 1``, …). Blank lines are skipped.
        negative_prompt: one for all prompts, or one per prompt.
        num_images_per_prompt: images of each prompt.
        seed: seed of the first image.
        image: to inpaint or to start from: one image for all prompts, one per prompt, or a folder; see
            `pair_images_and_masks`.
        mask: where to inpaint: one mask for all prompts, or one per prompt.
        task: ``text2image``, ``inpaint`` or ``image2image``.
        control: for a ControlNet, one control image for all prompts, or one per prompt; see `read_controls`.
        control_edges: ``control`` is a photo whose edges are the control image.
        controlnets: number of ControlNets.
        ip_adapter_image: for an IP-Adapter, an image for all prompts, or several that count together.
        prompt_2: for the second text encoder: one for all prompts, or one per prompt; ``prompt`` if None.
        negative_prompt_2: likewise; ``negative_prompt`` if None.

    Raises:
        SettingsError: if a setting or the file cannot be used.
    """
    check_int("num_images_per_prompt", num_images_per_prompt)
    check_seed("seed", seed)
    if prompt is not None and prompts is not None:
        raise SettingsError(f"prompt={prompt!r}, prompts={prompts}: exclude each other; give one of them.")
    if prompts is not None:
        rows = read_prompts(Path(prompts).expanduser())
    elif prompt is not None:
        rows = [{"prompt": text} for text in _strings(prompt, "prompt")]
    else:
        raise SettingsError("prompt: missing; give prompt=TEXT, or prompts=FILE with a .txt or .jsonl file.")

    if task != TEXT2IMAGE and len(rows) == 1 and (count := count_images(image, mask)) > 1:
        # one prompt for many images; a seed of its own counts up over all of them
        own = rows[0].get("seed")
        steps = range(0, count * num_images_per_prompt, num_images_per_prompt)
        rows = [rows[0] if own is None else {**rows[0], "seed": own + k} for k in steps]
    shared = {
        "negative_prompt": _per_prompt("negative_prompt", negative_prompt or "", len(rows)),
        "prompt_2": _per_prompt("prompt_2", prompt_2, len(rows)),
        "negative_prompt_2": _per_prompt("negative_prompt_2", negative_prompt_2, len(rows)),
    }
    rows = [{name: texts[k] for name, texts in shared.items()} | row for k, row in enumerate(rows)]
    images = _images(image, mask, len(rows), task)
    image_prompt = () if ip_adapter_image is None else tuple(read_all(ip_adapter_image, "ip_adapter_image"))
    controls = _controls(control, control_edges, len(rows), controlnets)
    for text in {text for row in rows for text in row.values() if isinstance(text, str)}:
        check_text(text)
        parse_weights(text)  # so that an invalid weight is reported before anything is sampled
    requests: list[SampleRequest] = []
    for row, given, control_image in zip(rows, images, controls, strict=True):
        first = len(requests)
        first_seed = row.pop("seed", seed + first)
        if (last := first_seed + num_images_per_prompt - 1) > MAX_SEED:
            raise SettingsError(f"seed={first_seed}: the last image would have seed {last}; seeds end at {MAX_SEED}.")
        masked, start = (given, None) if isinstance(given, MaskedImage) else (None, given)
        requests += [
            SampleRequest(
                index=first + i,
                seed=first_seed + i,
                masked=masked,
                image=start,
                control=control_image,
                image_prompt=image_prompt,
                **row,
            )
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


def _per_prompt(key: str, given: str | Sequence[str] | None, count: int) -> Sequence[str | None]:
    """A text of each of ``count`` prompts, given once for all or once for each; None for each if it is not given."""
    if given is None:
        return [None] * count
    texts = _strings(given, key) * (count if isinstance(given, str) else 1)
    if len(texts) != count:
        raise SettingsError(f"{key}: {len(texts)} texts for {count} prompts; give one for all, or one per prompt.")
    return texts


def _images(image: Any, mask: Any, count: int, task: str) -> Sequence[MaskedImage | Image.Image | Tensor | None]:
    """The image of each of ``count`` prompts, masked or not; None for each of text-to-image."""
    if task == TEXT2IMAGE:
        for name, value in (("image", image), ("mask", mask)):
            if value is not None:
                raise SettingsError(
                    f"{name}: model=text2image samples from text alone; use model=inpaint or model=image2image, or "
                    f"leave {name} out."
                )
        return [None] * count
    if task == IMAGE2IMAGE and image is None:
        raise SettingsError("model=image2image: needs an image to start from; give image=….")
    if task == IMAGE2IMAGE and mask is None:
        return read_images(image, count)
    if image is None:
        raise SettingsError("model=inpaint: needs an image to inpaint; give image=… and mask=….")
    return pair_images_and_masks(image, mask, count)


def _controls(control: Any, edges: bool, count: int, nets: int) -> Sequence[Controls | None]:
    """The control images of each of ``count`` prompts; None for each if there are none."""
    check_bool("control_edges", edges)
    if control is not None:
        return read_control_sets(control, edges, count, nets)
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
