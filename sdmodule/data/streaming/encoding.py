"""Latents and text embeddings that are packed beside the images of a set."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from sdmodule.conditioning.prompt_syntax import escape_prompt
from sdmodule.data.cache.latents import FORM
from sdmodule.data.cache.text import embed_prompts, text_fingerprint
from sdmodule.data.example import View
from sdmodule.data.streaming.dataset import EMPTY_PROMPT, FLIPPED, HIDDEN_STATES, MOMENTS, POOLED
from sdmodule.data.streaming.index import Encoded
from sdmodule.errors import SettingsError
from sdmodule.io.atomic import atomic_write
from sdmodule.io.fingerprint import model_fingerprint
from sdmodule.training.loss import encode_moments

IMAGES = 8
"""Images that are encoded at once; part of what the results depend on, by rounding."""


class Encoder:
    """Encodes images as moments of latents, and captions as text embeddings.

    Args:
        parts: the model.
        device: where it computes.
        flipped: encode the mirrored images too.
        text: encode captions.
        readers: threads that read images.
    """

    def __init__(self, parts: Any, device: torch.device, flipped: bool, text: bool, readers: int = 1) -> None:
        self.parts = parts
        self.device = device
        self.flipped = flipped
        self.text = text
        self.readers = readers
        vae = model_fingerprint(parts.vae, parts.vae.config)
        self.about = Encoded(parts.source, vae, FORM, flipped, text_fingerprint(parts) if text else None)
        for network in (parts.vae, *(encoder for _, encoder in parts.text_encoders)):
            network.to(device).eval().requires_grad_(False)

    def __call__(self, images: Any, indices: np.ndarray) -> Iterator[dict[str, Tensor]]:
        """The tensors of some samples of one size, in their order: see `StreamedExamples.encoded`."""
        with ThreadPoolExecutor(self.readers) as pool:
            for start in range(0, len(indices), IMAGES):
                own = [int(index) for index in indices[start : start + IMAGES]]
                yield from self._rows(images, own, pool)

    def _rows(self, images: Any, indices: list[int], pool: ThreadPoolExecutor) -> Iterator[dict[str, Tensor]]:
        rows: list[dict[str, Tensor]] = [{} for _ in indices]
        for name, flipped in ((MOMENTS, False), (FLIPPED, True))[: 1 + self.flipped]:
            loaded = pool.map(images.load, indices, repeat(View(flipped=flipped)))
            batch = torch.stack([one["image"] for one in loaded]).to(self.device)
            for row, moments in zip(rows, encode_moments(self.parts, batch).cpu(), strict=True):
                row[name] = moments.contiguous().clone()
        if self.text:
            prompts = [escape_prompt(images.caption(index)) for index in indices]
            for row, text in zip(rows, self._texts(prompts), strict=True):
                row |= text
        yield from rows

    def _texts(self, prompts: list[str]) -> Iterator[dict[str, Tensor]]:
        for rows in embed_prompts(prompts, self.parts):
            for _, hidden_states, pooled in rows:
                text = {HIDDEN_STATES: hidden_states.contiguous().clone()}
                yield text if pooled is None else {**text, POOLED: pooled.contiguous().clone()}

    def save_empty_prompt(self, folder: Path) -> None:
        """Write the embeddings of the empty prompt, if captions are encoded."""
        if self.text:
            with atomic_write(folder / EMPTY_PROMPT) as aside:
                aside.write_bytes(save(next(self._texts([""]))))


def check_encodable(images: Any, text: bool) -> None:
    """Check that images and captions are the same in every epoch.

    Raises:
        SettingsError: if they vary.
    """
    if not images.center_crop:
        raise SettingsError(
            "data.center_crop=false: crops images at random, which cannot be encoded before; set "
            "data.center_crop=true, or encode=none."
        )
    if text and not images.fixed_captions:
        raise SettingsError(
            "encode=all: data.shuffle_tags=true and several templates vary the captions, which cannot be encoded "
            "before; leave them out, or use encode=latents."
        )
