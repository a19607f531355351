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
from sdmodule.conditioning.control_settings import Each
from sdmodule.conditioning.inpaint_crop import InpaintSettings, check_inpaint_settings
from sdmodule.errors import SettingsError, build_settings, check_choice
from sdmodule.io.images import RETURN_TYPES
from sdmodule.io.progress import denoising_bar
from sdmodule.sampling.pipeline import OnStep, sample_requests
from sdmodule.sampling.requests import build_requests
from sdmodule.sampling.schedule import check_settings, sized_like
from sdmodule.sampling.settings import SamplingSettings, freeu_of
from sdmodule.sampling.size_conditions import Size
from sdmodule.sampling.stages import total_steps, work_ahead
from sdmodule.sampling.text_conditions import given_text
from sdmodule.speed.apply import apply_speed
from sdmodule.speed.speed_settings import SpeedSettings
from sdmodule.tome.token_merging import choose_merging

Prompts = str | Sequence[str] | None
"""One prompt or several, or none beside ``prompt_embeds``."""


class InferOptions(TypedDict, total=False):
    """Keyword arguments of `infer`, which describes them."""

    mask_image: Any
    strength: float | None
    control: Any
    ip_adapter_image: Any
    ip_adapter_scale: float | None
    control_scale: Each | None
    control_guidance_start: Each | None
    control_guidance_end: Each | None
    guess_mode: bool | None
    height: int | None
    width: int | None
    num_inference_steps: int | None
    guidance_scale: float | None
    guidance_rescale: float | None
    negative_prompt: str | Sequence[str] | None
    prompt_2: str | Sequence[str] | None
    negative_prompt_2: str | Sequence[str] | None
    prompt_embeds: Tensor | None
    negative_prompt_embeds: Tensor | None
    pooled_prompt_embeds: Tensor | None
    negative_pooled_prompt_embeds: Tensor | None
    clip_skip: int | None
    original_size: Size | None
    crop_top_left: Size | None
    target_size: Size | None
    negative_original_size: Size | None
    negative_crop_top_left: Size | None
    negative_target_size: Size | None
    timesteps: Sequence[int] | None
    sigmas: Sequence[float] | None
    denoising_start: float | None
    denoising_end: float | None
    hires: float | None
    hires_strength: float | None
    hires_upscale: str | None
    freeu: Mapping[str, float] | None
    num_images_per_prompt: int
    eta: float | None
    generator: torch.Generator | Sequence[torch.Generator] | None
    latents: Tensor | None
    seed: int
    scheduler: str | Mapping[str, Any] | None
    inpaint: Mapping[str, Any] | None
    tome: Mapping[str, Any] | None
    speed: Mapping[str, Any] | None
    return_type: Literal["image", "numpy", "tensor", "latent"]
    callback_on_step_end: OnStep | None
    show_progress: bool


def infer(
    parts: Components,
    sampling: SamplingSettings,
    task: str,
    prompt: Prompts = None,
    image: Any = None,
    mask: Any = None,
    *,
    mask_image: Any = None,
    strength: float | None = None,
    control: Any = None,
    ip_adapter_image: Any = None,
    ip_adapter_scale: float | None = None,
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    guidance_rescale: float | None = None,
    negative_prompt: str | Sequence[str] | None = None,
    prompt_2: str | Sequence[str] | None = None,
    negative_prompt_2: str | Sequence[str] | None = None,
    prompt_embeds: Tensor | None = None,
    negative_prompt_embeds: Tensor | None = None,
    pooled_prompt_embeds: Tensor | None = None,
    negative_pooled_prompt_embeds: Tensor | None = None,
    clip_skip: int | None = None,
    timesteps: Sequence[int] | None = None,
    sigmas: Sequence[float] | None = None,
    denoising_start: float | None = None,
    denoising_end: float | None = None,
    freeu: Mapping[str, float] | None = None,
    num_images_per_prompt: int = 1,
    eta: float | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    latents: Tensor | None = None,
    seed: int = 0,
    scheduler: str | Mapping[str, Any] | None = None,
    inpaint: Mapping[str, Any] | None = None,
    tome: Mapping[str, Any] | None = None,
    speed: Mapping[str, Any] | None = None,
    return_type: Literal["image", "numpy", "tensor", "latent"] = "image",
    callback_on_step_end: OnStep | None = None,
    show_progress: bool = True,
    **nested: Any,
) -> dict[str, Any]:
    """Sample images.

    Settings left out are those of ``sampling``: unless it says otherwise, 50 steps and the checkpoint's own guidance
    (2 for the embedded model, 7.5 for a checkpoint that names none).

    Args:
        parts: the model.
        sampling: settings for what is not given here.
        task: ``text2image``, ``inpaint`` or ``image2image``.
        prompt: one prompt or several; of any length, with ``(words:1.3)`` to weight words.
        image: for ``task="inpaint"`` and ``"image2image"``, the image: a path, a PIL image, an array, a tensor or a
            folder, or a list; for ``"image2image"`` also latents ``[B, 4, h, w]``.
        mask: where to inpaint: white in an image of the same size, a box ``[x0, y0, x1, y1]``, ``"alpha"``, or a list.
        mask_image: diffusers' name of ``mask``.
        strength: share of the schedule that an image goes through: 1 keeps nothing of it, or of its masked area.
        control: the control image for a ControlNet, in any form of ``image``; or one per prompt. For several
            ControlNets a list with one of these for each.
        ip_adapter_image: image for an IP-Adapter, in any form of ``image``; or several, which count together.
        ip_adapter_scale: how much it counts beside the text.
        height: pixels, a multiple of the VAE's factor.
        width: pixels, likewise.
        num_inference_steps: denoising steps.
        guidance_scale: strength of classifier-free guidance; 1 or less is none.
        guidance_rescale: share of the correction for overexposure by guidance.
        negative_prompt: what guidance leads away from: one for all prompts, or one per prompt.
        prompt_2: what the second text encoder reads instead of ``prompt``: one for all, or one per prompt.
        negative_prompt_2: likewise, instead of ``negative_prompt``.
        prompt_embeds: hidden states of text ``[B, L, D]``, instead of ``prompt``.
        negative_prompt_embeds: likewise, instead of ``negative_prompt``.
        pooled_prompt_embeds: pooled embeddings ``[B, P]`` beside ``prompt_embeds``, for Stable Diffusion XL.
        negative_pooled_prompt_embeds: likewise, beside ``negative_prompt_embeds``.
        clip_skip: last layers of the text encoder that are skipped.
        timesteps: the timesteps of the steps, instead of ``num_inference_steps``.
        sigmas: their noise levels, likewise.
        denoising_start: share of the schedule that is done already; ``image`` is the latents.
        denoising_end: share of the schedule to stop at; with ``return_type="latent"``, another model can go on.
        freeu: factors ``s1``, ``s2``, ``b1`` and ``b2``; see ``FreeU``.
        num_images_per_prompt: images of each prompt.
        eta: share of DDPM noise in DDIM, 0 to 1.
        generator: source of all noise instead of ``seed``: one for all images, or one per image.
        latents: initial noise instead of the seed's, ``[images, 4, height / factor, width / factor]``.
        seed: image k is drawn from ``seed + k``.
        scheduler: name or settings of a scheduler.
        inpaint: strength, mask_blur, only_masked and padding; see ``InpaintSettings``.
        tome: token merging, ``{"ratio": 0}`` for none; see ``TokenMerging``.
        speed: what is done to sample faster, ``{}`` for nothing; see ``SpeedSettings``.
        return_type: ``image`` for PIL, ``numpy`` for ``[B, H, W, 3]``, ``tensor`` for ``[B, 3, H, W]`` in [0, 1];
            ``latent`` for latents ``[B, 4, h, w]``.
        callback_on_step_end: called after each step with the number of steps done and the latents; it may return
            others.
        show_progress: show a progress bar of the steps, in a terminal.
        nested: the settings of ``ControlSettings`` (``control_scale``, ``control_guidance_start``,
            ``control_guidance_end``, ``guess_mode``), of ``SizeConditions`` (``original_size`` and the rest) and of
            ``Hires`` (``hires``, ``hires_strength``, ``hires_upscale``).

    Returns:
        ``samples``, all images of the first prompt first; ``seeds`` and ``prompts`` beside them; ``seconds`` of the
        stages text, denoise and decode; and ``metadata``, the settings in plain types.

    Raises:
        SettingsError: for an input that cannot be used.
    """
    check_choice("return_type", return_type, (*RETURN_TYPES, "latent"))
    if mask is not None and mask_image is not None:
        raise SettingsError("mask, mask_image: are two names of one argument; give one of them.")
    if strength is not None:
        inpaint = {**(inpaint or {}), "strength": plain_number(strength)}
    settings = sampling.updated(
        height=plain_number(height),
        width=plain_number(width),
        steps=plain_number(num_inference_steps),
        guidance_scale=plain_number(guidance_scale),
        guidance_rescale=plain_number(guidance_rescale),
        eta=plain_number(eta),
        clip_skip=plain_number(clip_skip),
        ip_adapter_scale=plain_number(ip_adapter_scale),
        timesteps=timesteps,
        sigmas=sigmas,
        denoising_start=denoising_start,
        denoising_end=denoising_end,
        freeu=freeu_of(freeu),
        scheduler=scheduler,
        inpaint=None if inpaint is None else _updated_inpainting(sampling.inpaint, inpaint),
        merging=None if tome is None else choose_merging(tome),
        speed=None if speed is None else build_settings(SpeedSettings, "speed", speed),
    ).with_nested({name: plain_number(value) for name, value in nested.items() if value is not None})
    check_inpaint_settings(settings.inpaint, task)
    check_settings(parts, settings, task)
    text = given_text(prompt_embeds, negative_prompt_embeds, pooled_prompt_embeds, negative_pooled_prompt_embeds, parts)
    if text is not None and prompt is not None:
        raise SettingsError("prompt, prompt_embeds: exclude each other; give one of them.")
    requests = build_requests(
        prompt if text is None else [""] * len(text.prompt),
        None,
        negative_prompt,
        plain_number(num_images_per_prompt),
        plain_number(seed),
        image=image,
        mask=mask_image if mask is None else mask,
        task=task,
        control=control,
        controlnets=max(len(parts.controlnets), 1),
        ip_adapter_image=ip_adapter_image,
        prompt_2=prompt_2,
        negative_prompt_2=negative_prompt_2,
    )
    if text is not None:
        text = text[[row // num_images_per_prompt for row in range(len(requests))]]
    first = sized_like(parts, settings, requests[0].image)
    work = work_ahead(parts, first, len(requests))
    bar = denoising_bar(total_steps(parts, first), show_progress)
    with evaluating(parts), apply_speed(parts, settings.speed, work), bar as on_bar:
        samples = sample_requests(
            parts,
            requests,
            settings,
            noise=latents,
            generator=generator,
            text=text,
            on_step=both(on_bar, callback_on_step_end),
            latent=return_type == "latent",
            as_bytes=return_type == "image",
        )
        converted = samples.converted(return_type)
    return {
        "samples": converted,
        "prompts": [request.prompt for request in requests],
        "seeds": [request.seed for request in requests],
        "seconds": dict(samples.seconds),
        "metadata": samples.metadata,
    }


def both(first: OnStep, second: OnStep | None) -> OnStep:
    """Call two functions after each step; the second may return other latents."""

    def on_step(step: int, latents: Tensor) -> Tensor | None:
        first(step, latents)
        return None if second is None else second(step, latents)

    return on_step


def plain_number(value: Any) -> Any:
    """A NumPy scalar as a number of Python; anything else as it is."""
    return value.item() if isinstance(value, np.generic) else value


def _updated_inpainting(own: InpaintSettings, given: Any) -> InpaintSettings:
    changes = {**asdict(own), **given} if isinstance(given, Mapping) else given
    return build_settings(InpaintSettings, "inpaint", changes)


@contextmanager
def evaluating(parts: Components) -> Iterator[None]:
    """Evaluation mode for all networks inside the block; afterwards each layer is in its own mode again."""
    networks = [*parts.networks.values(), *parts.controlnets, *parts.beside.values()]
    modes = {layer: layer.training for network in networks for layer in network.modules()}
    for network in networks:
        network.eval()
    try:
        yield
    finally:
        for layer, mode in modes.items():
            layer.training = mode
