"""What a checkpoint is: five parts, read from a folder, a hub id or a single file, and written as a folder."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.models.clip.modeling_clip import CLIPTextEmbeddings

from sdmodule.components.schedulers import make_scheduler
from sdmodule.conditioning.inpaint import is_inpaint_unet
from sdmodule.errors import SettingsError, choices

ASSETS = Path(__file__).parent / "assets"
EMBEDDED = {"tiny": "tiny", "tiny-inpaint": "tiny"}
"""Checkpoints that the package contains; the parts that one does not have itself are those of the other."""

MODELS = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
PARTS = (*MODELS, "tokenizer", "scheduler")
GUIDANCE_SCALE = 7.5
"""Stable Diffusion's usual guidance."""

SAMPLING = "sampling.json"
"""File of a checkpoint's folder that says how it is sampled best; diffusers does not read it."""

SINGLE_FILE_SUFFIXES = (".safetensors", ".ckpt")


@dataclass
class Components:
    """The five parts of a latent diffusion model (Rombach et al. 2022).

    Attributes:
        source: the name that they came from.
        guidance_scale: how strongly it is guided if nothing else is said; a folder says so in ``sampling.json``.
        controlnet: a ControlNet beside the UNet, if there is one; no part of the checkpoint.
    """

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: Any
    source: str
    guidance_scale: float = GUIDANCE_SCALE
    controlnet: Any = None

    @property
    def pixels_per_latent(self) -> int:
        """Side in pixels of what one latent stands for: 8 for Stable Diffusion."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)


@dataclass(frozen=True)
class Source:
    """Where parts are read from: a local folder, or a repository on the hub."""

    location: str
    revision: str | None = None
    variant: str | None = None

    def options(self, part: str) -> dict[str, Any]:
        """Keyword arguments with which ``from_pretrained`` finds ``part``."""
        return {"subfolder": part, "revision": self.revision}


def load_components(
    pretrained: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    components: Mapping[str, str] | None = None,
    scratch: Iterable[str] = (),
) -> Components:
    """Read a checkpoint.

    Args:
        pretrained: ``tiny``, a diffusers folder, a hub id, or a ``.safetensors``/``.ckpt`` file of the original layout.
        revision: branch, tag or commit of a hub id.
        variant: which weights of a folder or hub id, such as ``fp16``.
        components: for a part's name, another place to read it from: its own folder, or anything ``pretrained`` takes.
        scratch: parts that keep their architecture and start from random weights.

    Raises:
        SettingsError: when anything of it cannot be read; nothing is left half-loaded.
    """
    replaced = {name: path for name, path in (components or {}).items() if path}
    for name in (*replaced, *scratch):
        if name not in PARTS:
            raise SettingsError(f"{name!r} is no part of a checkpoint; the parts are {choices(PARTS)}.")
    if Path(pretrained).suffix in SINGLE_FILE_SUFFIXES:
        parts = _load_file(pretrained)
    else:
        source = _find(pretrained, revision, variant)
        wanted = [name for name in PARTS if name not in replaced]
        parts = {name: _load(name, source, name in scratch) for name in wanted}
    for name, path in replaced.items():
        parts[name] = load_part(name, path, name in scratch, f"components.{name}")
    wanted_width, width = parts["unet"].config.cross_attention_dim, parts["text_encoder"].config.hidden_size
    if wanted_width != width:
        raise SettingsError(
            f"the text encoder's hidden states are {width} wide and the UNet of pretrained={pretrained} attends to "
            f"{wanted_width}; give components.text_encoder and components.unet that belong together."
        )
    return Components(**parts, source=pretrained, guidance_scale=_usual_guidance(pretrained))


def _usual_guidance(pretrained: str) -> float:
    """The guidance scale that a local checkpoint names as its own, or Stable Diffusion's."""
    file = _folder(pretrained) / SAMPLING
    if not file.is_file():
        return GUIDANCE_SCALE
    try:
        return float(json.loads(file.read_text())["guidance_scale"])
    except (ValueError, KeyError, TypeError) as error:
        raise SettingsError(
            f'{file} cannot be read ({error}); write {{"guidance_scale": 7.5}}, or remove it.'
        ) from error


def _folder(pretrained: str) -> Path:
    """Where an embedded checkpoint or a local folder is."""
    return ASSETS / pretrained if pretrained in EMBEDDED else Path(pretrained).expanduser()


def load_part(name: str, pretrained: str, scratch: bool = False, key: str = "pretrained") -> Any:
    """Read one part from its own folder or from a checkpoint, as the setting ``key`` says.

    With ``scratch`` only its architecture is kept.
    """
    if Path(pretrained).suffix in SINGLE_FILE_SUFFIXES:
        return _load_file(pretrained, key)[name]
    own = Path(pretrained).expanduser()
    if own.is_dir() and not (own / "model_index.json").is_file() and not (own / name).is_dir():
        return _load(name, Source(str(own.parent)), scratch, subfolder=own.name)
    return _load(name, _find(pretrained, checkpoint=False, key=key), scratch)


def save_components(parts: Components, folder: str | Path, dtype: str = "float32") -> None:
    """Write a folder that diffusers' pipeline of its kind reads; ``dtype`` is that of its weights."""
    folder = Path(folder)
    for name in PARTS:
        save_part(name, getattr(parts, name), folder, dtype)
    pipeline = "StableDiffusionInpaintPipeline" if is_inpaint_unet(parts.unet) else "StableDiffusionPipeline"
    index: dict[str, Any] = {"_class_name": pipeline, "_diffusers_version": diffusers.__version__}
    index["requires_safety_checker"] = False
    index |= {name: _library_and_class(getattr(parts, name)) for name in PARTS}
    index |= {name: [None, None] for name in ("safety_checker", "feature_extractor", "image_encoder")}
    (folder / SAMPLING).write_text(json.dumps({"guidance_scale": parts.guidance_scale}) + "\n")
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def save_part(name: str, part: Any, folder: str | Path, dtype: str = "float32") -> None:
    """Write one part to ``folder/name``."""
    place = Path(folder) / name
    if name not in MODELS:
        part.save_pretrained(place)
        if name == "tokenizer":
            part.backend_tokenizer.model.save(str(place))  # vocab.json and merges.txt, which older readers ask for
        return
    if name == "text_encoder":
        weights = {key: value.to(getattr(torch, dtype)).contiguous() for key, value in part.state_dict().items()}
        part.config.save_pretrained(place)
        # transformers 5 leaves out the prefix that every other reader of these files expects.
        prefixed = {key if key.startswith("text_model.") else f"text_model.{key}": v for key, v in weights.items()}
        save_file(prefixed, place / "model.safetensors", metadata={"format": "pt"})
    else:
        save_model(part, place, dtype)


def save_model(model: Any, place: str | Path, dtype: str = "float32") -> None:
    """Write a model of diffusers' into a folder of its own."""
    config_file = Path(place) / "config.json"
    model.save_config(place)
    config = json.loads(config_file.read_text())
    config.pop("_name_or_path", None)  # where it was read from is nobody else's business
    config_file.write_text(json.dumps(config, indent=2) + "\n")
    weights = {key: value.to(getattr(torch, dtype)).contiguous() for key, value in model.state_dict().items()}
    save_file(weights, Path(place) / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})


def _library_and_class(part: Any) -> list[str]:
    return [type(part).__module__.split(".")[0], type(part).__name__]


def _find(
    pretrained: str,
    revision: str | None = None,
    variant: str | None = None,
    checkpoint: bool = True,
    key: str = "pretrained",
) -> Source:
    """Tell an embedded checkpoint, a folder and a hub id apart, and check that it is a checkpoint."""
    folder = _folder(pretrained)
    if folder.is_dir():
        if checkpoint and not (folder / "model_index.json").is_file():
            raise SettingsError(
                f"{key}={pretrained} is a folder without model_index.json; "
                "give the folder of a whole diffusers checkpoint."
            )
        return Source(str(folder), None, variant)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", pretrained) or pretrained.startswith("."):
        raise SettingsError(
            f"{key}={pretrained} was not found; give {choices(EMBEDDED)}, a diffusers folder, a hub id "
            "such as owner/name, or a .safetensors or .ckpt file."
        )
    if not isinstance(try_to_load_from_cache(pretrained, "model_index.json", revision=revision), str):
        _ask_hub(pretrained, revision, key)
    return Source(pretrained, revision, variant)


def _ask_hub(pretrained: str, revision: str | None, key: str) -> None:
    """Ask once whether the hub has a checkpoint: a download would ask for half a minute where there is no network."""
    try:
        get_hf_file_metadata(hf_hub_url(pretrained, "model_index.json", revision=revision))
    except Exception as error:  # the hub's, the system's or those of the HTTP client that the hub's package has today
        raise SettingsError(
            f"{key}={pretrained} is neither a local folder nor to be had from the hub ({type(error).__name__}); "
            f"with the weights already on disk give their folder: {key}=/path/to/folder."
        ) from error


def _load(name: str, source: Source, scratch: bool = False, subfolder: str | None = None) -> Any:
    """Read one part of a folder or hub id, with one clear sentence when it is missing or broken."""
    source = _owner(source, subfolder or name)
    options: dict[str, Any] = {"subfolder": subfolder or name, "revision": source.revision}
    place = f"{source.location}/{options['subfolder']}"
    folder = Path(source.location)
    if folder.is_dir() and not Path(place).is_dir():
        raise SettingsError(f"the part {name} is missing: no folder {place}; add it, or set components.{name}.")
    try:
        if name == "scheduler":
            config = folder / options["subfolder"] / "scheduler_config.json"
            if not folder.is_dir():
                config = Path(
                    hf_hub_download(source.location, "scheduler/scheduler_config.json", revision=source.revision)
                )
            return make_scheduler(None, json.loads(config.read_text()))
        if name == "tokenizer":
            return CLIPTokenizer.from_pretrained(source.location, **options)
        model = MODELS[name]
        if scratch:
            return _from_scratch(name, source, options)
        return model.from_pretrained(
            source.location, variant=source.variant, use_safetensors=True, torch_dtype=torch.float32, **options
        )
    except SettingsError:
        raise
    except Exception as error:  # a broken file ends in any of them; tokenizers raises Exception itself
        reason = " ".join(str(error).split())[:200]
        raise SettingsError(f"the part {name} of {source.location} cannot be read: {reason}") from error


def _owner(source: Source, part: str) -> Source:
    """Where a part is: an embedded checkpoint has some of its parts from another."""
    folder = Path(source.location)
    if folder.parent != ASSETS or (folder / part).is_dir():
        return source
    return Source(str(ASSETS / EMBEDDED[folder.name]))


def _from_scratch(name: str, source: Source, options: dict[str, Any]) -> Any:
    model = MODELS[name]
    if name == "text_encoder":
        encoder = model(model.config_class.from_pretrained(source.location, **options))
        _part_words(encoder)
        return encoder
    return model.from_config(model.load_config(source.location, **options))


@torch.no_grad()
def _part_words(encoder: CLIPTextModel) -> None:
    """Start the words of a new text encoder far apart.

    CLIP starts them within 0.02 of each other. Trained on images alone, words of similar images then soon move as
    one: after 5,000 steps of the embedded model, "circle" and "square" were 1% apart for the UNet. Started like this
    they are 41% apart after 800.
    """
    for module in encoder.modules():
        if isinstance(module, CLIPTextEmbeddings):
            module.token_embedding.weight.normal_(std=0.5)
            module.position_embedding.weight.normal_(std=0.2)


def _load_file(path: str, key: str = "pretrained") -> dict[str, Any]:
    file = Path(path).expanduser()
    if not file.is_file():
        raise SettingsError(f"{key}={path} was not found; give the path of a .safetensors or .ckpt file.")
    from sdmodule.components.single_file import load_single_file

    return load_single_file(file)
