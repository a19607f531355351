"""Networks in the diffusers layout, loaded with every weight accounted for: none missing, left over or misshapen."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, T2IAdapter, UNet2DConditionModel
from huggingface_hub import try_to_load_from_cache
from transformers import CLIPTextModel, CLIPTextModelWithProjection, PretrainedConfig
from transformers.utils import logging as logging_of_transformers

HARMLESS = re.compile(
    r"(^|\.)position_ids$"  # constants that transformers stored before 4.31
    r"|^(vision_model|visual_projection|text_projection)\.|^logit_scale$"  # of a whole CLIP, beside its text encoder
)
"""Keys that a file may hold beside the weights of its network; the one list of them."""

CONFIG_KINDS = {
    UNet2DConditionModel: ("UNet2DConditionModel",),
    AutoencoderKL: ("AutoencoderKL",),
    ControlNetModel: ("ControlNetModel",),
    T2IAdapter: ("T2IAdapter",),
    CLIPTextModel: ("clip_text_model", "clip"),  # a text encoder alone, or the CLIP that it is part of
    CLIPTextModelWithProjection: ("clip_text_model", "clip"),
}
"""What the configuration of each kind of network calls itself."""


OTHER_INPUTS = ("addition_embed_type", "class_embed_type", "num_class_embeds")
"""Settings of a UNet or a ControlNet that is called with more than latents, a timestep and text."""


class UnfitWeights(ValueError):
    """Weights that are not those of the network they were given for."""


def load_network(kind: Any, location: Any, other_inputs: Mapping[str, Any] | None = None, **options: Any) -> Any:
    """Load a network in float32 and evaluation mode, and check that the file held exactly its weights.

    diffusers and transformers draw what is missing at random and drop what is left over, with a warning at most.

    Args:
        kind: class of the network, a key of `CONFIG_KINDS`.
        location: a folder or a hub id.
        other_inputs: what its configuration says of `OTHER_INPUTS`; what it leaves out takes none.
        options: ``subfolder``, ``revision`` and ``variant``.

    Raises:
        UnfitWeights: for weights that are missing, unexpected or misshapen, and for a network of another kind.
        Exception: of many kinds, from the library that reads the files.
    """
    of_config = {name: value for name, value in options.items() if name != "variant"}
    _check_kind(kind, location, other_inputs or {}, of_config)
    with _quiet("diffusers", "transformers"), _without_bar_if_on_disk(location, options):
        network, found = kind.from_pretrained(
            location,
            use_safetensors=True,
            torch_dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that all of them are reported, by name
            **options,
        )
    misshapen = [key for key, *_ in found["mismatched_keys"]]
    check_weights(found["missing_keys"], found["unexpected_keys"], misshapen)
    return network


def check_weights(missing: Collection[str], unexpected: Iterable[str], misshapen: Collection[str] = ()) -> None:
    """Check that a file held exactly the weights of its network, but for keys that are known to be harmless.

    Raises:
        UnfitWeights: with the number of each kind and the first names.
    """
    surplus = [key for key in unexpected if not HARMLESS.search(key)]
    kinds = {"missing": missing, "unexpected": surplus, "misshapen": misshapen}
    problems = [
        f"{len(keys)} {kind} weight{'s' if len(keys) > 1 else ''}: {first_names(keys)}"
        for kind, keys in kinds.items()
        if keys
    ]
    if problems:
        raise UnfitWeights("; ".join(problems))


def first_names(keys: Collection[str], limit: int = 3) -> str:
    """The first names in alphabetical order, and the number of the others."""
    first = ", ".join(sorted(keys)[:limit])
    return first if len(keys) <= limit else f"{first} and {len(keys) - limit} more"


def _check_kind(kind: Any, location: Any, other_inputs: Mapping[str, Any], options: dict[str, Any]) -> None:
    """Check that a configuration is of this kind of network, as far as it says."""
    if issubclass(kind, (CLIPTextModel, CLIPTextModelWithProjection)):
        found = PretrainedConfig.get_config_dict(location, **options)[0].get("model_type")
    else:
        config = kind.load_config(location, **options)
        found = config.get("_class_name")
        other = {name: config[name] for name in OTHER_INPUTS if config.get(name)}
        if missing := [f"{name}={value}" for name, value in other_inputs.items() if other.get(name) != value]:
            raise UnfitWeights(f"its configuration must say {', '.join(missing)}")
        if more := [f"{name}={value}" for name, value in other.items() if name not in other_inputs]:
            raise UnfitWeights(f"it takes more than text ({', '.join(more)}), as that of Stable Diffusion XL does")
    if found is not None and found not in CONFIG_KINDS[kind]:
        raise UnfitWeights(f"it is {found}, not {kind.__name__}")


@contextmanager
def _without_bar_if_on_disk(location: Any, options: dict[str, Any]) -> Iterator[None]:
    """Keep transformers from drawing a bar while it reads a file that is here already; downloads keep theirs."""
    weights = "/".join(filter(None, [options.get("subfolder"), "model.safetensors"]))
    if (variant := options.get("variant")) is not None:
        weights = weights.replace(".safetensors", f".{variant}.safetensors")
    on_disk = Path(location).is_dir() or isinstance(
        try_to_load_from_cache(str(location), weights, revision=options.get("revision")), str
    )
    if not on_disk or not logging_of_transformers.is_progress_bar_enabled():
        yield
        return
    logging_of_transformers.disable_progress_bar()
    try:
        yield
    finally:
        logging_of_transformers.enable_progress_bar()


@contextmanager
def _quiet(*libraries: str) -> Iterator[None]:
    """Silence libraries that log the report of a loading which `check_weights` turns into an error."""
    loggers = [logging.getLogger(name) for name in libraries]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
