"""Latents and text embeddings that a set was packed with, checked against the training that asks for them."""

from __future__ import annotations

from safetensors.torch import load

from sdmodule.data.cache.latents import FORM
from sdmodule.data.streaming.datamodule import StreamingDataModule
from sdmodule.data.streaming.dataset import EMPTY_PROMPT, BatchEmbeddings, StreamedMoments, empty_prompt
from sdmodule.data.streaming.index import Encoded, typed_size
from sdmodule.data.streaming.remote import Remote
from sdmodule.errors import SettingsError


def packed_moments(
    data: StreamingDataModule, vae: str, text: str | None, with_images: bool
) -> tuple[StreamedMoments, BatchEmbeddings | None]:
    """The moments that a set was packed with, and the embeddings of the empty prompt.

    Args:
        data: the set, set up.
        vae: fingerprint of the VAE of the training.
        text: fingerprint of the text encoders whose embeddings are wanted; None for none.
        with_images: return images beside their moments.

    Raises:
        SettingsError: if the set has none, or of other networks, another resolution or without mirrored ones.
    """
    asked, encoded, images = "latents" if text is None else "all", data.index.encoded, data.train_set
    if encoded is None:
        raise SettingsError(
            f"cache={asked}: {data.source} was packed without latents, and a streamed set is not encoded before the "
            f"training; pack it with encode={asked} and pretrained=…, or set cache=none."
        )
    if problem := _problem(data, encoded, vae, text):
        raise SettingsError(f"cache={asked}: {data.source} was packed {problem}; pack it again, or set cache=none.")
    if text is None:
        return StreamedMoments(images, with_images, with_text=False), None
    content = Remote(data.source.key).read(f"{str(data.source.addresses[0]).rstrip('/')}/{EMPTY_PROMPT}")
    return StreamedMoments(images, with_images, with_text=True), BatchEmbeddings(empty_prompt(load(content)))


def _problem(data: StreamingDataModule, encoded: Encoded, vae: str, text: str | None) -> str:
    """Why what is packed does not serve a training; empty if it does."""
    if encoded.vae != vae:
        return f"with the VAE of pretrained={encoded.pretrained}, which is not that of this training"
    if text is not None and encoded.text is None:
        return "without text embeddings"
    if text is not None and encoded.text != text:
        return f"with the text encoder of pretrained={encoded.pretrained}, which is not that of this training"
    if encoded.form != FORM:
        return "by another version, which resized images differently"
    if data.index.resolution != data.size:
        return f"for resolution={typed_size(data.index.resolution)}, and this is {typed_size(data.size)}"
    if data.index.buckets is not None and not data.buckets:
        return "in buckets, and this training is without"
    if data.random_flip and not encoded.flipped:
        return "without mirrored images, and data.random_flip=true"
    return ""
