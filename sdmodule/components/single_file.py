"""Load a checkpoint from a single file in the original layout, without a network.

A single file has weights alone. The configurations ship with the package and are chosen by shapes; a folder of the
same name beside the file, without the suffix, may have others (see `write_single_file`).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from sdmodule.components.folder_kinds import INDEX, read_index
from sdmodule.components.original_layout import build_network, part_of
from sdmodule.components.schedulers import make_scheduler
from sdmodule.components.shipped_configs import (
    CONFIGS,
    CONV_IN,
    check_base,
    check_config,
    choose_config,
    config_of_part,
    has_shapes_of,
    load_tokenizer,
    predicts_noise,
    stated_prediction,
)
from sdmodule.components.single_file_kinds import adapter_kind, kind_of, refuse_adapter
from sdmodule.components.weights_file import Weights, read_header, read_weights
from sdmodule.errors import SettingsError, check_choice
from sdmodule.families.family import Family
from sdmodule.families.recognize import STABLE_DIFFUSION, check_same_family, recognize_weights

PREDICTION_TYPES = ("epsilon", "v_prediction")

# at every cast diffusers 0.42 warns about an empty list of modules kept in float32
logging.getLogger("diffusers.models.modeling_utils").addFilter(
    lambda record: "kept in float32: []" not in record.getMessage()
)


@dataclass(frozen=True)
class SingleFile:
    """A file of weights in the original layout, mapped into memory.

    Attributes:
        path: of the file.
        weights: by the names in the file.
        family: which it is of.
        header: what the file says of itself.
    """

    path: Path
    weights: Weights
    family: Family
    header: Mapping[str, str]

    @cached_property
    def parts(self) -> dict[str, Weights]:
        """Weights of each network without its prefix; empty for one that the file lacks."""
        prefixes = self.family.original_prefixes
        return {name: part_of(name, prefix, self.weights) for name, prefix in prefixes.items()}

    @property
    def config(self) -> Path | None:
        """The folder of configurations beside the file, if there is one."""
        folder = self.path.with_suffix("")
        return folder if (folder / INDEX).is_file() else None

    @property
    def index(self) -> dict[str, Any]:
        """What the index of that folder says."""
        return read_index(self.config / INDEX, str(self.path)) if self.config else {}

    def network(self, name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
        """Build one network, and say which folder it was expected to fit if it does not.

        Raises:
            SettingsError: if it does not fit.
        """
        prefix, config = self.family.original_prefixes[name], folder / name
        if not config.is_dir():  # of this part alone
            config = folder
        try:
            return build_network(self.family.models[name], self.parts[name], config, dtype, prefix)
        except (ValueError, KeyError, RuntimeError, OSError) as error:  # UnfitWeights, or from diffusers
            reason = str(error).partition(". ")[0]
            raise SettingsError(
                f"{self.path}: does not fit {config} ({reason}); download it again, or give the diffusers "
                "folder of its architecture."
            ) from error


def open_single_file(path: Path, otherwise: Family = STABLE_DIFFUSION) -> SingleFile:
    """Open a file of the original layout, and recognise its family; a part alone may be of any, so of ``otherwise``.

    Raises:
        SettingsError: if it cannot be read, or is of no family.
    """
    weights = read_weights(Path(path))
    family = recognize_weights(() if adapter_kind(weights) else weights, str(path), otherwise)
    return SingleFile(Path(path), weights, family, read_header(Path(path)))


def load_single_file(
    path: Path | SingleFile,
    dtype: torch.dtype | None = None,
    *,
    config: Path | None = None,
    prediction_type: str | None = None,
    without: Collection[str] = (),
) -> dict[str, Any]:
    """Load the components of a checkpoint in the original layout.

    The raw weights are loaded; EMA weights beside them, under ``model_ema.``, are ignored.

    Args:
        path: a ``.safetensors`` or ``.ckpt`` file. A ``.ckpt`` is loaded as weights only: nothing in it is executed.
        dtype: type of all weights, by default float32.
        config: local diffusers folder of the file's architecture; by default the one beside the file, or chosen from
            the shapes.
        prediction_type: what the UNet predicts; by default what the file says. One that says nothing predicts the
            noise, but for 2.x, where it is measured (see `predicts_noise`).
        without: networks that come from elsewhere, which the file may then lack.

    Returns:
        The parts of its family by name: networks in evaluation mode but for those of ``without``, tokenizers, and the
        scheduler of its configuration.

    Raises:
        SettingsError: if the file or an argument cannot be used.
    """
    file = path if isinstance(path, SingleFile) else open_single_file(path)
    dtype = dtype or torch.float32
    if prediction_type is not None:
        check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
    _check_parts(file, without)
    own = config or file.config
    folder = check_config(own, file.family) if own else _shipped_config(file, prediction_type)
    try:
        others = {name: load_tokenizer(folder, name, encoder) for name, encoder in file.family.text_encoders.items()}
        others["scheduler"] = _scheduler(file, folder, prediction_type)
    except Exception as error:  # a broken file ends in any of them; tokenizers raises Exception itself
        reason = " ".join(str(error).split())[:300]
        raise SettingsError(f"{file.path}: {folder} cannot be read ({reason}); restore it, or remove it.") from error
    return {name: file.network(name, folder, dtype) for name in file.family.models if name not in without} | others


def load_single_part(path: Path, name: str, family: Family, config: Path | None = None) -> Any:
    """Load one part from a file of the original layout that holds this part alone, or a whole checkpoint.

    Args:
        path: a ``.safetensors`` or ``.ckpt`` file.
        name: a part of the family.
        family: of the checkpoint that it is for.
        config: local diffusers folder of the file's architecture; by default chosen from the shapes.

    Raises:
        SettingsError: if the file cannot be used, or lacks the part.
    """
    file = open_single_file(path, family)
    own = replace(file, family=family)
    if has_shapes_of(family, own.parts["unet"]):  # a refiner has keys of its base model
        file = own
    if name not in family.models and name in file.family.parts:
        return load_single_file(file, config=config, without=list(file.family.models))[name]
    if not (weights := own.parts.get(name)):
        raise SettingsError(f"{path}: is {_kind_of(file)}; give one that holds the part {name} of {family.title}.")
    if name == "unet":
        check_same_family(file.family, family, str(path), name)
    folder = config or file.config or _own_config(path)
    if folder is None and name == "unet" and CONV_IN in weights:
        folder = CONFIGS / choose_config(path, family, weights)
    return own.network(name, folder or config_of_part(file.family, name, weights))


def _own_config(path: Path) -> Path | None:
    """The folder beside the file of a part alone, if it has the configuration of that part."""
    folder = path.with_suffix("")
    return folder if (folder / "config.json").is_file() else None


def _check_parts(file: SingleFile, without: Collection[str]) -> None:
    """Check that a file has the keys of all networks, but for those of ``without``."""
    unet = file.parts["unet"]
    check_base(file.path, file.family, unet)
    missing = [name for name, weights in file.parts.items() if not weights and name not in without]
    if not missing and CONV_IN in unet:
        return
    refuse_adapter(file.path, file.weights)
    raise SettingsError(
        f"{file.path}: is {_kind_of(file)}; give a full checkpoint of Stable Diffusion in the original layout"
        + (f", or set {' and '.join(f'components.{name}' for name in missing)}." if CONV_IN in unet else ".")
    )


def _shipped_config(file: SingleFile, prediction_type: str | None) -> Path:
    """The shipped configuration by the shapes and, where these say too little, by what the UNet predicts."""
    name = choose_config(file.path, file.family, file.parts["unet"])
    if name not in file.family.velocity_configs:
        return CONFIGS / name
    prediction_type = prediction_type or stated_prediction(file.header, file.weights)
    if prediction_type is None:
        unet = file.network("unet", CONFIGS / name)
        predicts = predicts_noise(unet, unet.config.in_channels, unet.config.cross_attention_dim)
        prediction_type = "epsilon" if predicts else "v_prediction"
    return CONFIGS / (name if prediction_type == "epsilon" else file.family.velocity_configs[name])


def _scheduler(file: SingleFile, folder: Path, prediction_type: str | None) -> Any:
    """The scheduler of a configuration, told what the UNet predicts unless the configuration is the file's own."""
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    stated = None if folder == file.config else stated_prediction(file.header, file.weights)
    if prediction_type := prediction_type or stated:
        config["prediction_type"] = prediction_type
    if folder != file.config and "ztsnr" in file.weights:
        config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return make_scheduler(None, config)


def _kind_of(file: SingleFile) -> str:
    there = [name for name, weights in file.parts.items() if weights and (name != "unet" or CONV_IN in weights)]
    return kind_of(file.weights, there, file.family)
