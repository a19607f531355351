"""Checks that model, data and callbacks fit together, made before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import shorten
from typing import Any

from lightning import Callback
from lightning.pytorch.utilities import rank_zero_warn

from sdmodule.callbacks.class_images import ClassImages
from sdmodule.callbacks.export import Export
from sdmodule.callbacks.latent_cache import LatentCache
from sdmodule.callbacks.metrics import QualityMetrics
from sdmodule.data.example import Example
from sdmodule.errors import SettingsError
from sdmodule.sampling.requests import INPAINT, TEXT2IMAGE
from sdmodule.training.textual_inversion import TextualInversion


def check_compatible(model: Any, data: Any, callbacks: Sequence[Callback]) -> None:
    """Check that a model can be trained on the data with these callbacks; of the data only captions are read.

    Args:
        model: module on which ``setup("fit")`` was called.
        data: data module on which ``setup("fit")`` was called.
        callbacks: all callbacks of the trainer.

    Raises:
        SettingsError: if it cannot.
    """
    _check_size(model, data)
    _check_masks(model, data)
    _check_placeholder(model, data)
    _check_class_images(model, data, callbacks)
    for callback in callbacks:
        if isinstance(callback, LatentCache):
            callback.check(data, model)
        if isinstance(callback, Export):
            callback.check(model)
        if isinstance(callback, QualityMetrics):
            callback.load(model, model.trainer.strategy.root_device)


def _check_size(model: Any, data: Any) -> None:
    """Check that the sides of images are multiples of the VAE's downsampling factor."""
    autoencoder, size = getattr(model, "vae", None), getattr(data, "size", None)
    if autoencoder is None or size is None:
        return
    factor = 2 ** (len(autoencoder.config.block_out_channels) - 1)
    if odd := [side for side in size if side % factor]:
        below = max(odd[0] // factor, 1) * factor
        raise SettingsError(
            f"resolution={size[0]}x{size[1]} (height x width): must be multiples of {factor}, such as {below} or "
            f"{below + factor}."
        )
    _warn_of_size(model, (size[0], size[1]))


def _warn_of_size(model: Any, size: tuple[int, int]) -> None:
    """Say that a size is not one of those that the checkpoint's family was trained on, if it was on certain ones."""
    parts: Any = getattr(model, "parts", None)
    trained = parts.family.trained_sizes if parts else ()
    if not trained or size in trained or (parts.resolution, parts.resolution) not in trained:
        return
    rank_zero_warn(
        f"resolution={size[0]}x{size[1]} (height x width): {parts.family.title} was trained on other sizes, and needs "
        f"many steps to adapt to this one; leave it out for {parts.resolution}."
    )


def _check_masks(model: Any, data: Any) -> None:
    """Check that all images have masks if the loss needs them, and all or none of them for inpainting."""
    unmasked = getattr(data, "bare", [])
    if not unmasked:
        return
    remedy = "name them in a column mask_file_name of its metadata"
    if getattr(model, "objective", None) and model.objective.masked:
        raise SettingsError(f"objective.masked=true: {unmasked[0].source} has no masks; {remedy}.")
    if getattr(model, "task", None) == INPAINT and len(unmasked) < len(data.sources):
        raise SettingsError(
            f"model=inpaint: {unmasked[0].source} has no masks, but other sources have; {remedy}, or remove those to "
            "draw all masks at random."
        )


def _check_placeholder(model: Any, data: Any) -> None:
    """Check that captions contain the placeholder of textual inversion; only those teach it."""
    tuning = getattr(model, "tuning", None)
    images: Any = getattr(data, "train_set", None)
    if not isinstance(tuning, TextualInversion) or not hasattr(images, "examples"):
        return
    tokenizer = model.parts.tokenizer
    word = tokenizer.convert_tokens_to_ids(tuning.placeholder)
    instances = getattr(data, "instances", 0) or len(images)  # DreamBooth's class images come after these
    texts = dict.fromkeys(_texts(images.examples[index]) for index in range(instances))
    captions = {text: tokenizer(list(text), add_special_tokens=False, verbose=False).input_ids for text in texts}
    without = [text[0] for text, tokens in captions.items() if not any(word in one for one in tokens)]
    if len(without) == len(captions):
        raise SettingsError(
            f"tuning.placeholder={tuning.placeholder}: not in any caption, such as {shorten(without[0], 60)!r}, so it "
            f'cannot be learned; set data.prompt="a photo of {tuning.placeholder}", or put it into the captions.'
        )
    if without:
        rank_zero_warn(
            f"tuning.placeholder={tuning.placeholder} is not in {len(without)} of {len(captions)} captions, such as "
            f"{shorten(without[0], 60)!r}; their images do not teach it."
        )


def _texts(example: Example) -> tuple[str, ...]:
    """The caption of an example in each of its templates."""
    style = example.style
    templates = style.templates or ("{}",)
    return tuple(style._replace(templates=(template,)).text(example.caption, None) for template in templates)


def _check_class_images(model: Any, data: Any, callbacks: Sequence[Callback]) -> None:
    """Check that missing class images of DreamBooth can be generated."""
    missing = sum(not file.is_file() for file in getattr(data, "priors", []))
    if missing and getattr(model, "task", None) != TEXT2IMAGE:
        raise SettingsError(
            f"data.class_prompt={data.class_prompt}: {missing} class images are missing in {data.class_root}, and only "
            "model=text2image can generate them; put them there."
        )
    if missing and not any(isinstance(callback, ClassImages) for callback in callbacks):
        raise SettingsError(
            f"data.class_prompt={data.class_prompt}: {missing} class images are missing in {data.class_root}; add "
            "prior to callbacks=[…] to generate them, or put them there."
        )
