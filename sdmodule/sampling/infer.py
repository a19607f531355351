"""Images from Python, in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from sdmodule.conditioning.inpaint_crop import check_inpaint_settings
from sdmodule.io.progress import denoising_bar
from sdmodule.modes import evaluating
from sdmodule.sampling.pipeline import sample_all
from sdmodule.sampling.requests import build_requests
from sdmodule.speed.apply import speed_applied
from sdmodule.speed.speed_settings import choose_speed
from sdmodule.tome.token_merging import choose_merging

if TYPE_CHECKING:
    from sdmodule.module import StableDiffusionModule


def infer(
    module: StableDiffusionModule,
    prompt: str | Sequence[str],
    image: Any = None,
    mask: Any = None,
    *,
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

    Settings left out are those of the module's ``sampling``; if nothing was said, 50 steps and the checkpoint's
    own guidance: 2 for the embedded model, 7.5 for any that names none.

    Args:
        module: the model; as its method, itself.
        prompt: one prompt or several; of any length, with ``(words:1.3)`` to weigh words.
        image: for ``task="inpaint"``, the image to repaint: a path, a PIL image, an array or a tensor, or a list.
        mask: where: white in an image of the same size, a box ``[x0, y0, x1, y1]``, ``"alpha"``, or a list.
        control: the image that a ControlNet follows, in any form of ``image``; or one for each prompt.
        control_scale: how much the ControlNet counts.
        height: pixels, a multiple of the autoencoder's factor.
        width: pixels, likewise.
        num_inference_steps: denoising steps.
        guidance_scale: strength of classifier-free guidance; 1 or less is none.
        guidance_rescale: share of the correction of guidance's overexposure.
        negative_prompt: what to keep away from: one for all prompts, or one for each.
        num_images_per_prompt: images of each prompt.
        eta: share of DDPM noise in DDIM, 0 to 1.
        generator: source of all noise instead of ``seed``: one for all images, or one for each.
        latents: initial noise instead of the seed's, ``[images, 4, height / factor, width / factor]``.
        seed: image k is drawn from ``seed + k``.
        scheduler: name or settings of a scheduler.
        inpaint: strength, mask_blur, only_masked and padding; see ``InpaintSettings``.
        tome: token merging, ``{"ratio": 0}`` for none; see ``TokenMerging``.
        speed: means of sampling faster, ``{}`` for none; see ``SpeedSettings``.
        return_type: ``image`` for PIL, ``numpy`` for ``[B, H, W, 3]``, ``tensor`` for ``[B, 3, H, W]``; in [0, 1].
        show_progress: show a bar of the steps, in a terminal.

    Returns:
        ``samples``, all images of the first prompt first; ``seeds`` and ``prompts`` beside them; ``seconds`` of
        the stages text, denoise and decode; and ``metadata``, the settings in plain types.

    Raises:
        SettingsError: for an input that cannot be used.
    """
    settings = module.sampling.updated(
        height=height,
        width=width,
        steps=num_inference_steps,
        guidance_scale=guidance_scale,
        guidance_rescale=guidance_rescale,
        eta=eta,
        scheduler=scheduler,
        inpaint=replace(module.sampling.inpaint, **(inpaint or {})),
        control_scale=control_scale,
        merging=None if tome is None else choose_merging(tome),
        speed=None if speed is None else choose_speed(speed),
    )
    check_inpaint_settings(settings.inpaint, module.task)
    requests = build_requests(
        prompt,
        None,
        negative_prompt,
        num_images_per_prompt,
        seed,
        image=image,
        mask=mask,
        task=module.task,
        control=control,
    )
    bar = denoising_bar(settings.steps_taken, show_progress)
    with (
        module.full_precision_weights(),
        evaluating(module),
        speed_applied(module.parts, settings.speed),
        bar as on_step,
    ):
        samples = sample_all(module.parts, requests, settings, noise=latents, generator=generator, on_step=on_step)
    return {
        "samples": samples.converted(return_type),
        "prompts": [r.prompt for r in requests],
        "seeds": [r.seed for r in requests],
        "seconds": samples.seconds,
        "metadata": samples.metadata,
    }
