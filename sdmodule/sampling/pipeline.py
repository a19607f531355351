"""From requests to images: conditions, denoising, decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from sdmodule.components.checkpoint import Components
from sdmodule.diffusion.sampler import Generators, denoise
from sdmodule.errors import SettingsError
from sdmodule.sampling.conditions import BatchConditions, chunks_needed, prepare_conditions
from sdmodule.sampling.decode import decode
from sdmodule.sampling.guided_denoiser import GuidedDenoiser
from sdmodule.sampling.metadata import describe
from sdmodule.sampling.requests import SampleRequest
from sdmodule.sampling.result import Samples
from sdmodule.sampling.schedule import latent_shape
from sdmodule.sampling.settings import SamplingSettings
from sdmodule.sampling.stopwatch import Stopwatch
from sdmodule.speed.deep_cache import deep_cache, run_all_layers
from sdmodule.speed.text_kv_cache import text_kv_cache
from sdmodule.tome.apply import apply_merging

OnStep = Callable[[int, Tensor], None]
"""Called after each denoising step with the number of steps done and the latents ``[B, 4, h, w]``."""


@torch.no_grad()
def sample(
    parts: Components,
    requests: Sequence[SampleRequest],
    settings: SamplingSettings,
    *,
    noise: Tensor | None = None,
    generators: Generators | None = None,
    on_step: OnStep | None = None,
) -> Samples:
    """Sample one batch of images, all of the same size and length of text.

    Args:
        parts: the model.
        requests: B images; each is drawn from its own seed.
        settings: steps, guidance and the rest.
        noise: initial noise ``[B, 4, h, w]``, instead of the seeds'.
        generators: one per image, or one for all, instead of the seeds'.
        on_step: called after each denoising step.
    """
    watch = Stopwatch(parts.unet.device)
    conditions = prepare_conditions(parts, requests, settings, watch, noise, generators)
    with watch.stage("denoise"):
        latents = denoise_batch(parts, conditions, settings, watch, on_step)
    with watch.stage("decode"):
        decoded = decode(parts, latents).cpu()
    return Samples(
        decoded,
        list(requests),
        watch.seconds,
        describe(parts, settings, bool(conditions.crops)),
        conditions.crops,
        [(row, len(requests)) for row in range(len(requests))],
        watch.steps(),
    )


def denoise_batch(
    parts: Components,
    conditions: BatchConditions,
    settings: SamplingSettings,
    watch: Stopwatch,
    on_step: OnStep | None = None,
) -> Tensor:
    """Latents of a batch, ``[B, 4, h, w]``: the denoising loop with token merging and feature caching in place."""

    def after_step(done: int, latents: Tensor) -> None:
        watch.mark()
        if on_step is not None:
            on_step(done, latents)

    merging = apply_merging(
        parts.unet, conditions.merging, conditions.merge_seeds, conditions.latent_size, len(conditions.steps)
    )
    cached = deep_cache(parts.unet, settings.speed.cache_layers) if settings.speed.cache_every > 1 else None
    with (
        merging as start_merging,
        cached or nullcontext(run_all_layers) as start_caching,
        text_kv_cache(parts.unet, conditions.text.hidden_states),
    ):
        watch.mark()
        return denoise(
            GuidedDenoiser(parts, conditions, start_merging, start_caching),
            conditions.latents,
            conditions.scheduler,
            conditions.generators,
            settings.eta,
            skipped=conditions.skipped,
            keep=None if conditions.inpaint is None else conditions.restore_known_region,
            on_step=after_step,
        )


def sample_requests(
    parts: Components,
    requests: Sequence[SampleRequest],
    settings: SamplingSettings,
    *,
    noise: Tensor | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    on_step: OnStep | None = None,
) -> Samples:
    """Sample images whose prompts may need different lengths of text, and return them in the order asked for.

    Prompts of one length share a batch: padding a short prompt to its neighbour's length would change its image.

    Args:
        parts: the model.
        requests: what to sample.
        settings: steps, guidance and the rest.
        noise: initial noise ``[B, 4, h, w]``, instead of the seeds'.
        generator: source of all noise, or one per image, instead of the seeds'.
        on_step: called after each denoising step.

    Raises:
        SettingsError: for noise of another shape or another number of generators.
    """
    shape = (len(requests), *latent_shape(parts, settings))
    if noise is not None and tuple(noise.shape) != shape:
        raise SettingsError(f"latents: have shape {tuple(noise.shape)}; give {shape}.")
    single = generator is None or isinstance(generator, torch.Generator)
    if not single and len(generator) != len(requests):  # type: ignore[arg-type]
        raise SettingsError(
            f"generator: has {len(generator)} entries for {len(requests)} images; give one, or one for each."  # type: ignore[arg-type]
        )
    groups: dict[int, list[int]] = {}
    for position, request in enumerate(requests):
        groups.setdefault(chunks_needed(parts, request), []).append(position)
    batches = [
        sample(
            parts,
            [requests[p] for p in positions],
            settings,
            noise=None if noise is None else noise[positions],
            generators=generator if single else [generator[p] for p in positions],  # type: ignore[index]
            on_step=on_step,
        )
        for positions in groups.values()
    ]
    order = torch.tensor([p for positions in groups.values() for p in positions]).argsort().tolist()
    return batches[0] if len(batches) == 1 else Samples.joined(batches, list(requests), order)
