"""Images from Python, in one call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Literal, TypedDict

import numpy as np
import torch
from torch import Tensor

from sdmodule.components.checkpoint import Components
from sdmodule.conditioning.inpaint_crop import InpaintSettings, check_inpaint_settings
from sdmodule.errors import SettingsError, build_settings, check_choice
from sdmodule.io.images import RETURN_TYPES
from sdmodule.io.progress import denoising_bar
from sdmodule.sampling.pipeline import sample_requests
from sdmodule.sampling.requests import build_requests
from sdmodule.sampling.settings import SamplingSettings
from sdmodule.speed.apply import apply_speed
from sdmodule.speed.speed_settings import SpeedSettings
from sdmodule.tome.token_merging import choose_merging


class InferOptions(TypedDict, total=False):
    """Keyword arguments of `infer`, which describes them."""

    mask_image: Any
    control: Any
    control_scale: float | None
    height: int | None
    width: int | None
    num_inference_steps: int | None
    guidance_scale: float | None
    guidance_rescale: float | None
    negative_prompt: str | Sequence[str] | None
    num_images_per_prompt: int
    eta: float | None
    generator: torch.Generator | Sequence[torch.Generator] | None
    latents: Tensor | None
    seed: int
    scheduler: str | Mapping[str, Any] | None
    inpaint: Mapping[str, Any] | None
    tome: Mapping[str, Any] | None
    speed: Mapping[str, Any] | None
    return_type: Literal["image", "numpy", "tensor"]
    show_progress: bool


def infer(
    parts: Components,
    sampling: SamplingSettings,
    task: str,
    prompt: str | Sequence[str],
    image: Any = None,
    mask: Any = None,
    *,
    mask_image: Any = None,
    control: Any = None,
    control_scale: float | None = None,
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    guidance_rescale: float | None = None,
    negative_prompt: str | Sequence[str] | None = None,
    num_images_per_prompt: int = 1,
    eta: float | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    latents: Tensor | None = None,
    seed: int = 0,
    scheduler: str | Mapping[str, Any] | None = None,
    inpaint: Mapping[str, Any] | None = None,
    tome: Mapping[str, Any] | None = None,
    speed: Mapping[str, Any] | None = None,
    return_type: Literal["image", "numpy", "tensor"] = "image",
    show_progress: bool = True,
) -> dict[str, Any]:
    """Sample images.

    Settings left out are those of ``sampling``: unless it says otherwise, 50 steps and the checkpoint's own guidance
    (2 for the embedded model, 7.5 for a checkpoint that names none).

    Args:
        parts: the model.
        sampling: settings for what is not given here.
        task: ``text2image`` or ``inpaint``.
        prompt: one prompt or several; of any length, with ``(words:1.3)`` to weight words.
        image: for ``task="inpaint"``, the image to inpaint: a path, a PIL image, an array or a tensor, or a list.
        mask: where: white in an image of the same size, a box ``[x0, y0, x1, y1]``, ``"alpha"``, or a list.
        mask_image: diffusers' name of ``mask``.
        control: the control image for a ControlNet, in any form of ``image``; or one per prompt.
        control_scale: weight of the ControlNet's residuals.
        height: pixels, a multiple of the VAE's factor.
        width: pixels, likewise.
        num_inference_steps: denoising steps.
        guidance_scale: strength of classifier-free guidance; 1 or less is none.
        guidance_rescale: share of the correction for overexposure by guidance.
        negative_prompt: what guidance leads away from: one for all prompts, or one per prompt.
        num_images_per_prompt: images of each prompt.
        eta: share of DDPM noise in DDIM, 0 to 1.
        generator: source of all noise instead of ``seed``: one for all images, or one per image.
        latents: initial noise instead of the seed's, ``[images, 4, height / factor, width / factor]``.
        seed: image k is drawn from ``seed + k``.
        scheduler: name or settings of a scheduler.
        inpaint: strength, mask_blur, only_masked and padding; see ``InpaintSettings``.
        tome: token merging, ``{"ratio": 0}`` for none; see ``TokenMerging``.
        speed: what is done to sample faster, ``{}`` for nothing; see ``SpeedSettings``.
        return_type: ``image`` for PIL, ``numpy`` for ``[B, H, W, 3]``, ``tensor`` for ``[B, 3, H, W]``; in [0, 1].
        show_progress: show a progress bar of the steps, in a terminal.

    Returns:
        ``samples``, all images of the first prompt first; ``seeds`` and ``prompts`` beside them; ``seconds`` of the
        stages text, denoise and decode; and ``metadata``, the settings in plain types.

    Raises:
        SettingsError: for an input that cannot be used.
    """
    check_choice("return_type", return_type, RETURN_TYPES)
    if mask is not None and mask_image is not None:
        raise SettingsError("mask, mask_image: are two names of one argument; give one of them.")
    mask = mask_image if mask is None else mask
    height, width, num_inference_steps = (_plain(value) for value in (height, width, num_inference_steps))
    guidance_scale, guidance_rescale, eta = (_plain(value) for value in (guidance_scale, guidance_rescale, eta))
    num_images_per_prompt, seed, control_scale = (_plain(v) for v in (num_images_per_prompt, seed, control_scale))
    settings = sampling.updated(
        height=height,
        width=width,
        steps=num_inference_steps,
        guidance_scale=guidance_scale,
        guidance_rescale=guidance_rescale,
        eta=eta,
        scheduler=scheduler,
        inpaint=None if inpaint is None else _updated_inpainting(sampling.inpaint, inpaint),
        control_scale=control_scale,
        merging=None if tome is None else choose_merging(tome),
        speed=None if speed is None else build_settings(SpeedSettings, "speed", speed),
    )
    check_inpaint_settings(settings.inpaint, task)
    requests = build_requests(
        prompt,
        None,
        negative_prompt,
        num_images_per_prompt,
        seed,
        image=image,
        mask=mask,
        task=task,
        control=control,
    )
    bar = denoising_bar(settings.steps_taken, show_progress)
    with evaluating(parts), apply_speed(parts, settings.speed), bar as on_step:
        samples = sample_requests(parts, requests, settings, noise=latents, generator=generator, on_step=on_step)
    return {
        "samples": samples.converted(return_type),
        "prompts": [request.prompt for request in requests],
        "seeds": [request.seed for request in requests],
        "seconds": samples.seconds,
        "metadata": samples.metadata,
    }


def _plain(value: Any) -> Any:
    """A NumPy scalar as a number of Python."""
    return value.item() if isinstance(value, np.generic) else value


def _updated_inpainting(own: InpaintSettings, given: Any) -> InpaintSettings:
    changes = {**asdict(own), **given} if isinstance(given, Mapping) else given
    return build_settings(InpaintSettings, "inpaint", changes)


@contextmanager
def evaluating(parts: Components) -> Iterator[None]:
    """Evaluation mode for all networks inside the block; afterwards each layer is in its own mode again."""
    networks = list(parts.networks.values())
    if parts.controlnet is not None:
        networks.append(parts.controlnet)
    modes = {layer: layer.training for network in networks for layer in network.modules()}
    for network in networks:
        network.eval()
    try:
        yield
    finally:
        for layer, mode in modes.items():
            layer.training = mode
