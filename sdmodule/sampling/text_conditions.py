"""What the denoiser of a batch is told of its prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sdmodule.components.checkpoint import Components
from sdmodule.components.ip_adapter import embed_images
from sdmodule.conditioning.text import chunks_of, encode_texts
from sdmodule.diffusion.upload import upload
from sdmodule.errors import SettingsError
from sdmodule.families.conditioning import Conditioning
from sdmodule.sampling.requests import SampleRequest
from sdmodule.sampling.schedule import image_size
from sdmodule.sampling.settings import SamplingSettings


@dataclass(frozen=True)
class GivenText:
    """Embeddings of B prompts that are given instead of the prompts.

    Attributes:
        prompt: of the prompts.
        negative: of the negative prompts; those of the requests are encoded if None.
    """

    prompt: Conditioning
    negative: Conditioning | None = None

    def __getitem__(self, rows: Sequence[int]) -> GivenText:
        """These rows, in this order."""
        return GivenText(self.prompt[rows], None if self.negative is None else self.negative[rows])


def given_text(
    prompt_embeds: Tensor | None,
    negative_prompt_embeds: Tensor | None,
    pooled: Tensor | None,
    negative_pooled: Tensor | None,
    parts: Components,
) -> GivenText | None:
    """Given embeddings, checked; None if there are none.

    Args:
        prompt_embeds: hidden states of the prompts, ``[B, L, D]``.
        negative_prompt_embeds: of the negative prompts, likewise.
        pooled: pooled embeddings of the prompts, ``[B, P]``, for a family that has some.
        negative_pooled: of the negative prompts, likewise.
        parts: the model.

    Raises:
        SettingsError: for embeddings of another shape, or without those that they need beside them.
    """
    if prompt_embeds is None:
        lone = {
            "negative_prompt_embeds": negative_prompt_embeds,
            "pooled_prompt_embeds": pooled,
            "negative_pooled_prompt_embeds": negative_pooled,
        }
        for name, value in lone.items():
            if value is not None:
                raise SettingsError(f"{name}: needs prompt_embeds beside it; give both, or prompts alone.")
        return None
    prompt = _embeddings("prompt_embeds", prompt_embeds, "pooled_prompt_embeds", pooled, parts)
    if negative_prompt_embeds is None:
        return GivenText(prompt)
    names = "negative_prompt_embeds", "negative_pooled_prompt_embeds"
    negative = _embeddings(names[0], negative_prompt_embeds, names[1], negative_pooled, parts)
    if negative.hidden_states.shape != prompt.hidden_states.shape:
        found, wanted = (tuple(one.hidden_states.shape) for one in (negative, prompt))
        raise SettingsError(f"negative_prompt_embeds: have shape {found} and prompt_embeds {wanted}; give equal ones.")
    return GivenText(prompt, negative)


def _embeddings(name: str, hidden: Tensor, pooled_name: str, pooled: Tensor | None, parts: Components) -> Conditioning:
    width = parts.unet.config.cross_attention_dim
    if hidden.ndim != 3 or hidden.shape[-1] != width:
        raise SettingsError(f"{name}: have shape {tuple(hidden.shape)}; give [images, tokens, {width}].")
    if (pooled is None) == parts.family.pools_text:
        needs = f"needs {pooled_name} beside it" if parts.family.pools_text else f"takes no {pooled_name}"
        raise SettingsError(f"{name}: {parts.family.title} {needs}.")
    if pooled is not None and (pooled.ndim != 2 or len(pooled) != len(hidden)):
        raise SettingsError(f"{pooled_name}: have shape {tuple(pooled.shape)}; give one row for each of {name}.")
    device = parts.unet.device
    return Conditioning(hidden.to(device), None if pooled is None else pooled.to(device))


def chunks_needed(parts: Components, request: SampleRequest) -> int:
    """Chunks of text that a request's prompt and negative prompt need; both are encoded at one length."""
    texts = [text for text in (*request.texts, *request.negative_texts) if text is not None]
    return chunks_of(texts, parts)


def check_texts(parts: Components, requests: Sequence[SampleRequest]) -> None:
    """Check that texts for a second text encoder have one to read them, and images an IP-Adapter.

    Raises:
        SettingsError: if they have not.
    """
    check_image_prompts(parts, requests)
    if len(parts.family.text_encoders) > 1:
        return
    for name in ("prompt_2", "negative_prompt_2"):
        if any(getattr(request, name) is not None for request in requests):
            raise SettingsError(
                f"{name}: is for a second text encoder, and {parts.family.title} has one; leave it out."
            )


def text_conditions(
    parts: Components,
    requests: Sequence[SampleRequest],
    settings: SamplingSettings,
    guided: bool,
    given: GivenText | None = None,
) -> Conditioning:
    """Text and sizes of a batch of B images, those of the negative prompts first if guided: B or 2B of them.

    Args:
        parts: the model.
        requests: B images, all of the same length of text.
        settings: size, skipped layers and micro-conditions.
        guided: whether the denoiser runs on the negative prompts too.
        given: embeddings instead of the prompts.
    """
    size = image_size(parts, settings)
    text = encode_requests(parts, requests, guided, settings.clip_skip, given).to(parts.unet.dtype)
    text = with_image_prompts(parts, requests, text)
    told = [settings.sizes.of_prompt(size)] * len(requests)
    return parts.family.with_sizes(text, [settings.sizes.of_negative(size)] * len(requests) + told if guided else told)


def with_image_prompts(parts: Components, requests: Sequence[SampleRequest], text: Conditioning) -> Conditioning:
    """The conditioning with the images of an IP-Adapter, if the model has one."""
    prompts = parts.image_prompts
    if prompts is None:
        return text
    unique = {tuple(map(id, request.image_prompt)): request.image_prompt for request in requests}
    embedded = {key: embed_images(prompts, list(images), text.hidden_states.dtype) for key, images in unique.items()}
    each = [embedded[tuple(map(id, request.image_prompt))] for request in requests]
    seen, unseen = (torch.stack(rows) for rows in zip(*each, strict=True))
    return replace(text, images=torch.cat([unseen, seen]) if len(text) > len(requests) else seen)


def check_image_prompts(parts: Components, requests: Sequence[SampleRequest]) -> None:
    """Check that an IP-Adapter and images for it come together, and that all requests have as many.

    Raises:
        SettingsError: if they do not.
    """
    given = bool(requests) and bool(requests[0].image_prompt)
    if given and parts.image_prompts is None:
        raise SettingsError("ip_adapter_image: needs an IP-Adapter; add ip_adapter=FILE.")
    if parts.image_prompts is not None and not given:
        raise SettingsError("ip_adapter: needs an image; add ip_adapter_image=IMAGE.png.")


def encode_requests(
    parts: Components,
    requests: Sequence[SampleRequest],
    guided: bool,
    clip_skip: int = 0,
    given: GivenText | None = None,
) -> Conditioning:
    """Text embeddings of a batch, the negative prompts first if guided: B or 2B of them.

    Prompts and negative prompts are encoded apart, as in diffusers, whose rounding this keeps. A text that occurs
    several times is encoded once. As in diffusers, layers are skipped for prompts, and not for negative prompts.
    """
    if given is not None and (given.negative is not None or not guided):
        return given.negative.followed_by(given.prompt) if guided and given.negative is not None else given.prompt
    if given is None:
        chunks = max(chunks_needed(parts, request) for request in requests)
        prompts = _encode([request.texts for request in requests], parts, chunks, clip_skip)
    else:
        chunks, prompts = _chunks_given(given, parts), given.prompt
    if not guided:
        return prompts
    texts = [request.negative_texts for request in requests]
    negatives = _encode(texts, parts, chunks)
    if parts.zero_empty_prompts:
        negatives = negatives.zeroed([row for row, pair in enumerate(texts) if not any(pair)])
    return negatives.followed_by(prompts)


def _encode(
    texts: Sequence[tuple[str, str | None]], parts: Components, chunks: int, clip_skip: int = 0
) -> Conditioning:
    unique = list(dict.fromkeys(texts))
    second = [first if other is None else other for first, other in unique]
    encoded = encode_texts([first for first, _ in unique], parts, chunks, second, clip_skip)
    rows = torch.tensor([unique.index(pair) for pair in texts])
    return encoded[upload(rows, encoded.hidden_states.device)]


def _chunks_given(given: GivenText, parts: Components) -> int:
    """Chunks of text as long as the given embeddings."""
    length, tokens = parts.text_encoders[0][0].model_max_length, given.prompt.hidden_states.shape[1]
    if given.negative is None and tokens % length:
        raise SettingsError(
            f"prompt_embeds: have {tokens} tokens, which the negative prompt cannot have; give negative_prompt_embeds."
        )
    return max(tokens // length, 1)
