"""Whether model, data and callbacks can be trained together, asked before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import shorten
from typing import Any

from lightning import Callback
from lightning.pytorch.utilities import rank_zero_warn

from sdmodule.callbacks.class_images import ClassImages
from sdmodule.callbacks.latent_cache import LatentCache
from sdmodule.data.example import Example
from sdmodule.errors import SettingsError
from sdmodule.sampling.requests import INPAINT, TEXT2IMAGE
from sdmodule.training.textual_inversion import TextualInversion


def check_compatible(model: Any, data: Any, callbacks: Sequence[Callback]) -> None:
    """Check what only several of them know; nothing is read but captions.

    Args:
        model: the module, set up.
        data: the data module, set up.
        callbacks: those of the trainer.

    Raises:
        SettingsError: if they cannot.
    """
    _check_size(model, data)
    _check_masks(model, data)
    _check_word(model, data)
    _check_priors(model, data, callbacks)
    for callback in callbacks:
        if isinstance(callback, LatentCache):
            callback.check(data, model)


def _check_size(model: Any, data: Any) -> None:
    """Whether the autoencoder makes whole latents of images of this size."""
    autoencoder, size = getattr(model, "vae", None), getattr(data, "size", None)
    if autoencoder is None or size is None:
        return
    factor = 2 ** (len(autoencoder.config.block_out_channels) - 1)
    if odd := [side for side in size if side % factor]:
        below = max(odd[0] // factor, 1) * factor
        raise SettingsError(
            f"resolution={size[0]}x{size[1]} is not allowed (height x width); give multiples of {factor}, such as "
            f"{below} or {below + factor}."
        )


def _check_masks(model: Any, data: Any) -> None:
    """Whether all images have masks where the loss needs them, and all or none where they are repainted."""
    bare = getattr(data, "bare", [])
    if not bare:
        return
    cure = "name them in a column mask_file_name of its metadata"
    if getattr(model, "objective", None) and model.objective.masked:
        raise SettingsError(f"objective.masked=true and {bare[0].source} has no masks; {cure}.")
    if getattr(model, "task", None) == INPAINT and len(bare) < len(data.sources):
        raise SettingsError(
            f"model=inpaint and {bare[0].source} has no masks, which other sources have; {cure}, or give none, and "
            "masks are drawn."
        )


def _check_word(model: Any, data: Any) -> None:
    """Whether captions name the word that is to be learned; without it nothing is."""
    tuning = getattr(model, "tuning", None)
    images: Any = getattr(data, "train_set", None)
    if not isinstance(tuning, TextualInversion) or not hasattr(images, "examples"):
        return
    tokenizer = model.parts.tokenizer
    word = tokenizer.convert_tokens_to_ids(tuning.placeholder)
    of_the_thing = getattr(data, "instances", 0) or len(images)  # of DreamBooth's others none should name it
    texts = dict.fromkeys(_texts(images.examples[index]) for index in range(of_the_thing))
    captions = {text: tokenizer(list(text), add_special_tokens=False, verbose=False).input_ids for text in texts}
    bare = [text[0] for text, tokens in captions.items() if not any(word in own for own in tokens)]
    if len(bare) == len(captions):
        raise SettingsError(
            f"tuning.placeholder={tuning.placeholder} is in no caption, such as {shorten(bare[0], 60)!r}, and would "
            f'not be learned; set data.prompt="a photo of {tuning.placeholder}", or name it in the captions.'
        )
    if bare:
        rank_zero_warn(
            f"tuning.placeholder={tuning.placeholder} is not in {len(bare)} of {len(captions)} captions, such as "
            f"{shorten(bare[0], 60)!r}; their images do not teach it."
        )


def _texts(example: Example) -> tuple[str, ...]:
    """A caption in each of its templates, of which one is drawn at a time."""
    style = example.style
    return tuple(style._replace(templates=(one,)).text(example.caption, None) for one in style.templates or ("{}",))


def _check_priors(model: Any, data: Any, callbacks: Sequence[Callback]) -> None:
    """Whether somebody makes the images of DreamBooth's kind that are not there."""
    missing = sum(not file.is_file() for file in getattr(data, "priors", []))
    if missing and getattr(model, "task", None) != TEXT2IMAGE:
        raise SettingsError(
            f"data.class_prompt={data.class_prompt} needs {missing} images that are not in {data.class_root}, and "
            "model=text2image alone can make them; put them there."
        )
    if missing and not any(isinstance(callback, ClassImages) for callback in callbacks):
        raise SettingsError(
            f"data.class_prompt={data.class_prompt} needs {missing} images that are not in {data.class_root}; add "
            "prior to callbacks=[…], which makes them, or put them there."
        )
