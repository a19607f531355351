"""The parts of a latent diffusion model, loaded from a diffusers folder, a hub id or a single file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from huggingface_hub import hf_hub_download
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.models.clip.modeling_clip import CLIPTextEmbeddings

from sdmodule.components.checkpoint_checks import check_latents, check_whole_file, check_widths, default_guidance
from sdmodule.components.folder_kinds import INDEX
from sdmodule.components.load_network import load_network
from sdmodule.components.schedulers import make_scheduler
from sdmodule.components.single_file import SingleFile, load_single_file, load_single_part, open_single_file
from sdmodule.components.source import Source, find_source, folder_with_part, is_single_file
from sdmodule.errors import SettingsError, check_choice
from sdmodule.families.family import Family
from sdmodule.families.recognize import STABLE_DIFFUSION


@dataclass
class Components:
    """The parts of a latent diffusion model (Rombach et al. 2022).

    Attributes:
        unet: the denoiser.
        vae: the autoencoder between images and latents.
        text_encoder: from tokens to the embeddings that the UNet attends to.
        tokenizer: from prompts to tokens.
        scheduler: a scheduler of diffusers, with the checkpoint's noise schedule.
        source: the name the checkpoint was given by.
        guidance_scale: default guidance scale; a checkpoint's folder sets it in ``sampling.json``.
        controlnet: a ControlNet beside the UNet, a ``ModuleList`` of several, or None; not part of the checkpoint.
        refiner: the parts of a refiner that takes over at the end, or None; not part of the checkpoint.
        image_prompts: what an IP-Adapter in the UNet needs beside it, or None; see `ip_adapter.ImagePrompts`.
        origin: how the model was named beside its source (revision, adapters and so on), in plain types.
        family: what it has that checkpoints of other families have not.
        text_encoder_2: the second text encoder of a family that has two.
        tokenizer_2: its tokenizer.
        zero_empty_prompts: whether an empty negative prompt has embeddings of zeros.
        vae_overflows: whether the VAE overflowed float16 once, and computes in float32 from then on.
    """

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: Any
    source: str
    guidance_scale: float = STABLE_DIFFUSION.guidance_scale
    controlnet: Any = None
    refiner: Components | None = None
    image_prompts: Any = None
    origin: dict[str, Any] = field(default_factory=dict)
    family: Family = STABLE_DIFFUSION
    text_encoder_2: Any = None
    tokenizer_2: CLIPTokenizer | None = None
    zero_empty_prompts: bool = False
    vae_overflows: bool = False
    _schedules: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)

    def schedule_on(self, device: torch.device) -> Tensor:
        """The noise schedule ``alphas_cumprod`` ``[T]`` on a device, copied there once."""
        own = self.scheduler.alphas_cumprod
        known, copy = self._schedules.get(device, (None, None))
        if copy is None or known is not own:
            self._schedules[device] = own, (copy := own.to(device))
        return copy

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The networks of the checkpoint, by the names of their parts."""
        return {name: getattr(self, name) for name in self.family.models}

    @property
    def beside(self) -> dict[str, nn.Module]:
        """Networks that sample beside the checkpoint's and its ControlNets."""
        found = {} if self.refiner is None else dict(self.refiner.networks)
        return found if self.image_prompts is None else {**found, "image_encoder": self.image_prompts.encoder}

    @property
    def controlnets(self) -> list[Any]:
        """The ControlNets, if there are any."""
        if self.controlnet is None:
            return []
        return list(self.controlnet) if isinstance(self.controlnet, nn.ModuleList) else [self.controlnet]

    @property
    def text_encoders(self) -> list[tuple[CLIPTokenizer, Any]]:
        """Each tokenizer with the text encoder that reads its tokens."""
        return [(getattr(self, name), getattr(self, encoder)) for name, encoder in self.family.text_encoders.items()]

    @property
    def adaptable(self) -> list[Any]:
        """The networks that low-rank adapters change."""
        return [getattr(self, name) for name in self.family.adapter_prefixes]

    @property
    def upcasts_vae(self) -> bool:
        """Whether the VAE overflows in float16, and computes in float32 instead."""
        return self.family.upcasts_vae and bool(self.vae.config.force_upcast)

    @property
    def num_timesteps(self) -> int:
        """Timesteps of the noise schedule."""
        return len(self.scheduler.alphas_cumprod)

    @property
    def resolution(self) -> int:
        """Side in pixels of the images that the checkpoint was made for."""
        return self.unet.config.sample_size * self.pixels_per_latent

    @property
    def pixels_per_latent(self) -> int:
        """Downsampling factor of the VAE, 8 for Stable Diffusion."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)


def load_components(
    pretrained: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    components: Mapping[str, str] | None = None,
    scratch: Iterable[str] = (),
) -> Components:
    """Load a checkpoint.

    Args:
        pretrained: ``tiny``, a diffusers folder, a hub id, or a ``.safetensors``/``.ckpt`` file of the original layout.
        revision: branch, tag or commit of a hub id.
        variant: which weights of a folder or hub id, such as ``fp16``.
        components: for a part's name, another place to read it from: its own folder, or anything ``pretrained`` takes.
        scratch: parts that keep their architecture and start from random weights.

    Raises:
        SettingsError: if any part cannot be read.
    """
    replaced = {name: path for name, path in (components or {}).items() if path}
    source: Source | SingleFile
    if is_single_file(pretrained):
        source = open_single_file(_existing(pretrained))
    else:
        source = find_source(pretrained, revision, variant)
    family = source.family
    for name in replaced:
        check_choice("components", name, family.parts)
    for name in scratch:
        check_choice("scratch", name, family.parts)
    if isinstance(source, SingleFile):
        check_whole_file(pretrained, scratch, revision, variant)
        parts = load_single_file(source, without=[name for name in replaced if name != "unet"])
    else:
        parts = {name: _load(name, source, name in scratch) for name in family.parts if name not in replaced}
    for name, path in replaced.items():
        parts[name] = load_part(name, path, name in scratch, f"components.{name}", family)
    check_widths(parts, family, pretrained)
    check_latents(parts["vae"], pretrained)
    return Components(
        **parts,
        source=pretrained,
        guidance_scale=default_guidance(pretrained, family),
        family=family,
        zero_empty_prompts=family.zeroes_empty_prompts(source.index),
    )


def family_of(pretrained: str, revision: str | None = None) -> Family:
    """The family of a checkpoint, before any weight is read.

    Raises:
        SettingsError: if it is of none, or cannot be found.
    """
    if is_single_file(pretrained):
        return open_single_file(_existing(pretrained)).family
    return find_source(pretrained, revision).family


def load_part(
    name: str,
    pretrained: str,
    scratch: bool = False,
    key: str = "pretrained",
    family: Family = STABLE_DIFFUSION,
) -> Any:
    """Load one part from its own folder or from a checkpoint.

    Args:
        name: a part of the family.
        pretrained: the folder of the part, or anything `load_components` takes.
        scratch: keep the architecture and start from random weights.
        key: the setting that named the place, for messages.
        family: whose part it is.

    Raises:
        SettingsError: if it cannot be read.
    """
    if is_single_file(pretrained):
        check_whole_file(pretrained, [name] if scratch else (), key=key)
        return load_single_part(_existing(pretrained, key), name, family)
    folder = Path(pretrained).expanduser()
    if folder.is_dir() and not (folder / INDEX).is_file() and not (folder / name).is_dir():
        source = Source(str(folder.parent), f"{key}={pretrained}", family=family)
        return _load(name, source, scratch, subfolder=folder.name)
    return _load(name, replace(find_source(pretrained, whole=False, key=key), family=family), scratch)


def _load(name: str, source: Source, scratch: bool = False, subfolder: str | None = None) -> Any:
    """Load one part of a folder or hub repository; ``subfolder`` is where, if not under its own name."""
    subfolder = subfolder or name
    location = folder_with_part(source, subfolder)
    options: dict[str, Any] = {"subfolder": subfolder, "revision": source.revision}
    folder = Path(location)
    if folder.is_dir() and not (folder / subfolder).is_dir():
        raise SettingsError(
            f"{source.setting}: no folder {folder / subfolder}, so the part {name} is missing; "
            f"add it, or set components.{name}."
        )
    try:
        if name == "scheduler":
            config = folder / subfolder / "scheduler_config.json"
            if not folder.is_dir():
                config = Path(hf_hub_download(location, "scheduler/scheduler_config.json", revision=source.revision))
            return make_scheduler(None, json.loads(config.read_text()))
        if name in source.family.text_encoders:
            return CLIPTokenizer.from_pretrained(location, **options)
        if scratch:
            return _from_scratch(source.family.models[name], location, options)
        other_inputs = source.family.other_inputs.get(name)
        return load_network(source.family.models[name], location, other_inputs, variant=source.variant, **options)
    except SettingsError:
        raise
    except Exception as error:  # a broken file ends in any of them; tokenizers raises Exception itself
        reason = " ".join(str(error).split())[:300]
        raise SettingsError(
            f"{source.setting}: the part {name} cannot be read ({reason}); restore it, or set components.{name}."
        ) from error


def _from_scratch(model: Any, location: str, options: dict[str, Any]) -> Any:
    if issubclass(model, (CLIPTextModel, CLIPTextModelWithProjection)):
        encoder = model(model.config_class.from_pretrained(location, **options))
        _spread_embeddings(encoder)
        return encoder
    return model.from_config(model.load_config(location, **options))


@torch.no_grad()
def _spread_embeddings(encoder: CLIPTextModel) -> None:
    """Initialise the embeddings of a new text encoder further apart than CLIP does.

    CLIP draws them with a standard deviation of 0.02. Trained on images alone, the words of similar images then
    collapse onto each other: after 5,000 steps of the embedded model, the UNet saw "circle" and "square" 1% apart.
    With this initialisation they are 41% apart after 800 steps.
    """
    for module in encoder.modules():
        if isinstance(module, CLIPTextEmbeddings):
            module.token_embedding.weight.normal_(std=0.5)
            module.position_embedding.weight.normal_(std=0.2)


def _existing(path: str, key: str = "pretrained") -> Path:
    file = Path(path).expanduser()
    if not file.is_file():
        raise SettingsError(f"{key}={path}: not found; give the path of a .safetensors or .ckpt file.")
    return file
