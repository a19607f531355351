"""From requests to images: for each stage conditions and denoising, then decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sdmodule.components.checkpoint import Components
from sdmodule.components.ip_adapter import set_scale
from sdmodule.conditioning.inpaint_crop import InpaintCrop
from sdmodule.diffusion.sampler import denoise
from sdmodule.errors import SettingsError
from sdmodule.sampling.conditions import NOTHING_GIVEN, BatchConditions, Given, prepare_conditions
from sdmodule.sampling.decode import Decoding, decode
from sdmodule.sampling.freeu import freeu_applied
from sdmodule.sampling.guided_denoiser import GuidedDenoiser
from sdmodule.sampling.metadata import describe
from sdmodule.sampling.requests import SampleRequest, task_of
from sdmodule.sampling.result import Samples
from sdmodule.sampling.schedule import latent_shape, sized_like
from sdmodule.sampling.settings import SamplingSettings
from sdmodule.sampling.stages import plan_stages
from sdmodule.sampling.stopwatch import Stopwatch
from sdmodule.sampling.text_conditions import GivenText, check_texts, chunks_needed
from sdmodule.speed.apply import accelerated
from sdmodule.speed.attention import check_kernels
from sdmodule.speed.batch_sizes import rows_to_compute
from sdmodule.speed.deep_cache import deep_cache, run_all_layers
from sdmodule.speed.fused_step import fused_steps
from sdmodule.speed.hint_cache import hint_cache
from sdmodule.speed.step_graphs import graphs_of
from sdmodule.speed.text_kv_cache import text_kv_cache
from sdmodule.tome.apply import apply_merging

OnStep = Callable[[int, Tensor], Tensor | None]
"""Called after each denoising step with the number of steps done and the latents ``[B, 4, h, w]``.

It may return other latents to go on with.
"""


@torch.no_grad()
def sample(
    parts: Components,
    requests: Sequence[SampleRequest],
    settings: SamplingSettings,
    given: Given = NOTHING_GIVEN,
    on_step: OnStep | None = None,
    *,
    latent: bool = False,
    as_bytes: bool = False,
    rows: int | None = None,
) -> Samples:
    """Sample one batch of images, all of the same size and length of text.

    Args:
        parts: the model.
        requests: B images; each is drawn from its own seed.
        settings: steps, guidance and the rest.
        given: what is given instead of being drawn or encoded.
        on_step: called after each denoising step.
        latent: return the latents, and decode nothing.
        as_bytes: images are needed in 8 bits only; a GPU rounds them before they leave it.
        rows: rows of the batch that is denoised, B or more; the last image fills those that are left.
    """
    wanted, rows = list(requests), rows or len(requests)
    requests = [*wanted, *[wanted[-1]] * (rows - len(wanted))]
    on_step = seeing(len(wanted), rows, on_step)
    watch = Stopwatch(parts.unet.device)
    crops: list[InpaintCrop] = []
    done = 0
    for stage in plan_stages(parts, sized_like(parts, settings, requests[0].image)):
        given = stage.continued(given, watch)
        conditions = prepare_conditions(stage.parts, stage.of(requests), stage.settings, watch, given)
        with watch.stage("denoise"):
            latents = denoise_batch(stage.parts, conditions, stage.settings, watch, after(done, on_step))
        crops, done = crops or conditions.crops, done + len(conditions.steps)
        given = replace(given, noise=None, latents=latents, generators=conditions.generators)
    latents = latents[: len(wanted)]
    made: Any = None
    if not latent:
        with watch.stage("decode"):
            on_gpu = latents.device.type == "cuda"
            made = Decoding(parts, latents, as_bytes) if on_gpu else decode(parts, latents).cpu()
    return Samples(
        made,
        wanted,
        watch.seconds,
        describe(parts, settings, task_of(wanted[0])),
        crops[: len(wanted)],
        [(row, rows) for row in range(len(wanted))],
        watch.steps(),
        latents,
    )


def after(done: int, on_step: OnStep | None) -> OnStep | None:
    """``on_step`` with the steps of earlier stages counted."""
    return on_step if on_step is None or not done else lambda step, latents: on_step(done + step, latents)


def seeing(count: int, rows: int, on_step: OnStep | None) -> OnStep | None:
    """``on_step`` for the first ``count`` of the rows of a batch."""
    if on_step is None or count == rows:
        return on_step

    def seen(step: int, latents: Tensor) -> Tensor | None:
        changed = on_step(step, latents[:count])
        return None if changed is None else torch.cat([changed, latents[count:]])

    return seen


def denoise_batch(
    parts: Components,
    conditions: BatchConditions,
    settings: SamplingSettings,
    watch: Stopwatch,
    on_step: OnStep | None = None,
) -> Tensor:
    """Latents of a batch, ``[B, 4, h, w]``: the denoising loop with token merging and feature caching in place."""

    def after_step(done: int, latents: Tensor) -> Tensor | None:
        watch.mark()
        return None if on_step is None else on_step(done, latents)

    for network in accelerated(parts):
        check_kernels(settings.speed.attention, network)
    if parts.image_prompts is not None:
        set_scale(parts.unet, settings.ip_adapter_scale)
    merging = apply_merging(
        parts.unet, conditions.merging, conditions.merge_seeds, conditions.latent_size, len(conditions.steps)
    )
    cached = deep_cache(parts.unet, settings.speed.cache_layers) if settings.speed.cache_every > 1 else None
    merges = conditions.merging.ratio > 0
    obstacles = {
        "freeu": settings.freeu is not None,
        "tome.engine=tomesd": merges and conditions.merging.engine == "tomesd",
        "tome.reuse_steps above 1": merges and conditions.merging.reuse_steps > 1,
        "mixed precision": torch.is_autocast_enabled(parts.unet.device.type),
    }
    schedule, guidance = conditions.schedule, (conditions.guidance_scale, conditions.guidance_rescale)
    device = conditions.latents.device
    fused = fused_steps(parts.unet, schedule.scheduler, schedule.timesteps, settings.eta, guidance, device)
    with (
        merging as start_merging,
        cached or nullcontext(run_all_layers) as start_caching,
        text_kv_cache(accelerated(parts), conditions.text.hidden_states),
        hint_cache(parts.controlnets),
        freeu_applied(parts.unet, settings.freeu),
    ):
        watch.start()
        graphs = graphs_of(parts.unet, obstacles)
        return denoise(
            GuidedDenoiser(parts, conditions, start_merging, start_caching, graphs, guides=fused is None),
            conditions.latents,
            schedule.scheduler,
            conditions.generators,
            settings.eta,
            timesteps=schedule.timesteps,
            keep=conditions.restore_known_region if conditions.noise_levels else None,
            on_step=after_step,
            fused=fused,
        )


def sample_requests(
    parts: Components,
    requests: Sequence[SampleRequest],
    settings: SamplingSettings,
    *,
    noise: Tensor | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    text: GivenText | None = None,
    on_step: OnStep | None = None,
    latent: bool = False,
    as_bytes: bool = False,
) -> Samples:
    """Sample images of any sizes and lengths of text, and return them in the order asked for.

    Images of one size whose prompts have one length share a batch: padding a short prompt to its neighbour's length
    would change its image.

    Args:
        parts: the model.
        requests: what to sample.
        settings: steps, guidance and the rest.
        noise: initial noise ``[B, 4, h, w]``, instead of the seeds'.
        generator: source of all noise, or one per image, instead of the seeds'.
        text: embeddings of the prompts, instead of those of ``requests``.
        on_step: called after each denoising step.
        latent: return latents, and decode nothing.
        as_bytes: images are needed in 8 bits only.

    Raises:
        SettingsError: for noise of another shape, another number of generators or embeddings, or latents of several
            sizes.
    """
    check_texts(parts, requests)
    if text is not None and parts.refiner is not None:
        raise SettingsError("prompt_embeds: are not those that the refiner attends to; give the prompt.")
    single = generator is None or isinstance(generator, torch.Generator)
    if not single and len(generator) != len(requests):  # type: ignore[arg-type]
        raise SettingsError(
            f"generator: has {len(generator)} entries for {len(requests)} images; give one, or one for each."  # type: ignore[arg-type]
        )
    groups: dict[Any, list[int]] = {}
    for position, request in enumerate(requests):
        shape = latent_shape(parts, sized_like(parts, settings, request.image))
        chunks = chunks_needed(parts, request) if text is None else 0
        groups.setdefault((shape, chunks), []).append(position)
    shapes = {(len(requests), *shape) for shape, _ in groups}
    if noise is not None and {tuple(noise.shape)} != shapes:
        raise SettingsError(f"latents: have shape {tuple(noise.shape)}; give {' and '.join(map(str, sorted(shapes)))}.")
    if latent and len(shapes) > 1:
        raise SettingsError("return_type='latent': images must be of one size; give height and width.")
    drawn = noise is None and generator is None and text is None
    batches = [
        sample(
            parts,
            [requests[p] for p in positions],
            settings,
            Given(
                noise=None if noise is None else noise[positions],
                generators=generator if single else [generator[p] for p in positions],  # type: ignore[index]
                text=None if text is None else text[positions],
            ),
            on_step,
            latent=latent,
            as_bytes=as_bytes,
            rows=rows_to_compute(parts.unet, shape, len(positions)) if drawn else None,
        )
        for (shape, _), positions in groups.items()
    ]
    order = torch.tensor([p for positions in groups.values() for p in positions]).argsort().tolist()
    return batches[0] if len(batches) == 1 else Samples.joined(batches, list(requests), order)
