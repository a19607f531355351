"""The pack command: a data set, the networks that encode it, the shards."""

from __future__ import annotations

import json
import os
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sdmodule.cli.console import echo
from sdmodule.cli.evaluate import find_device
from sdmodule.cli.instantiate import instantiate
from sdmodule.cli.output_dir import output_dir_locked, prepare_output_dir
from sdmodule.errors import SettingsError, check_choice, check_int, check_seed, count_of
from sdmodule.io.redact import redact

UNPACKED = ("batch_size", "num_workers", "cache_folder", "cache_gb", "skip_bad", "shuffle_window")
"""Settings of data that do not change what is packed."""


def pack(cfg: DictConfig) -> None:
    """Pack a data set. Whatever cannot work is reported before anything is written."""
    from sdmodule.data.streaming import packing
    from sdmodule.data.streaming.encoding import check_encodable

    check_int("samples_per_shard", cfg.samples_per_shard)
    check_seed("seed", cfg.seed)
    check_choice("encode", cfg.encode, ("none", "latents", "all"))
    if cfg.processes is not None:
        check_int("processes", cfg.processes, minimum=0)
    folder = prepare_output_dir(cfg)
    device = find_device(str(cfg.device))
    parts = None if cfg.encode == "none" else load_parts(cfg)
    if cfg.resolution is None:
        if parts is None and cfg.data.get("buckets"):
            raise SettingsError("resolution: missing; buckets are sizes near it, so add resolution=…, such as 512.")
        cfg.resolution = 64 if parts is None else parts.resolution
    data = instantiate(cfg.data)
    data.setup("fit")
    images = check_packable(data)
    if parts is not None:
        check_encodable(images, cfg.encode == "all")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = cores if cfg.processes is None else cfg.processes
    encoder = None if parts is None else build_encoder(cfg, parts, device, processes, images)
    on_gpu = encoder is not None and device.type != "cpu"  # which processes cannot share
    held = {} if not len(data.val_set) else {packing.VALIDATION: data.val_set}
    echo(f"Packing {len(images):,} samples for training, {len(data.val_set):,} for validation; writing to {folder}")
    with output_dir_locked(folder):
        index = packing.pack(
            {packing.TRAINING: images, **held},
            folder,
            samples=cfg.samples_per_shard,
            seed=cfg.seed,
            buckets=bool(getattr(data, "buckets", False)),
            processes=0 if on_gpu else processes,
            resolution=getattr(data, "size", (images.size_of(0))),
            settings=described(cfg),
            encoder=encoder,
        )
    total = int(index.bytes.sum())
    samples, shards = count_of(int(index.samples.sum()), "sample"), count_of(len(index.names), "shard")
    echo(f"Packed {samples} in {shards}, {total:,} bytes")
    echo(f"Train on it with data=streaming data.url={folder}")


def load_parts(cfg: DictConfig) -> Any:
    """The model whose latents are packed."""
    from sdmodule.components.checkpoint import load_components

    places = {name: place for name, place in cfg.components.items() if place is not None}
    return load_components(str(cfg.pretrained), revision=cfg.revision, variant=cfg.variant, components=places)


def build_encoder(cfg: DictConfig, parts: Any, device: Any, processes: int, images: Any) -> Any:
    """What encodes images, and captions with ``encode=all``."""
    import torch

    from sdmodule.data.streaming.encoding import Encoder

    factor = parts.pixels_per_latent
    height, width = images.size_of(0)
    if height % factor or width % factor:
        raise SettingsError(f"resolution={height}x{width} (height x width): must be multiples of {factor}.")
    on_cpu = device.type == "cpu"
    if on_cpu:
        torch.set_num_threads(1)  # as in the processes, so that results do not depend on their number
    return Encoder(parts, device, images.random_flip, cfg.encode == "all", readers=1 if on_cpu else max(1, processes))


def check_packable(data: Any) -> Any:
    """The training set of a data module.

    Raises:
        SettingsError: if it cannot be packed.
    """
    images: Any = getattr(data, "train_set", None)
    if getattr(data, "class_prompt", None) is not None:
        raise SettingsError(
            "data=dreambooth: pairs of images cannot be packed; leave data.class_prompt out, or choose another data."
        )
    if not hasattr(images, "load"):
        raise SettingsError("data: cannot be packed; choose one that trains on images with captions.")
    return images


def described(cfg: DictConfig) -> str:
    """The settings that a set depends on, as a text."""
    data: Any = OmegaConf.to_container(cfg.data, resolve=True)
    kept = {name: value for name, value in data.items() if name not in UNPACKED}
    return json.dumps(redact({"data": kept, "encode": cfg.encode}), sort_keys=True, default=str)
