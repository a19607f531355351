"""The timings of the parts of a run, as those of one process that has sampled all of them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

SAMPLING = ("text", "encode", "denoise", "decode")
"""Stages that count for the images per second; writing goes on beside them."""


def merge_timings(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The content of a ``timings.json``: times and images are added up, and so are the devices' images per second.

    The median step is that of the parts, weighted by their images; the 95th percentile and the peak memory are the
    largest of any part.

    Args:
        parts: the content of each part's ``timings.json``, one at least.
    """
    warmups = [part["warmup"] for part in parts if part.get("warmup")]
    images, warm = sum(part["images"] for part in parts), sum(warmup["images"] for warmup in warmups)
    seconds = _added([part["seconds"] for part in parts])
    busy = sum(value for stage, value in seconds.items() if stage in SAMPLING)
    devices = dict.fromkeys(str(part["device"]) for part in parts)
    merged: dict[str, Any] = {
        "images": images,
        "seconds": seconds,
        "seconds_total": sum(part["seconds_total"] for part in parts),
        "step_seconds": _steps([part for part in parts if part["step_seconds"]]),
        "images_per_second": (images - warm) / busy if busy else 0.0,
        "warmup": {"images": warm, "seconds": _added([one["seconds"] for one in warmups])} if warmups else None,
        "peak_memory_bytes": max(part["peak_memory_bytes"] for part in parts),
        "device": ", ".join(devices),
        "devices": max(part["devices"] for part in parts),
    }
    if all("mfu" in part for part in parts):
        merged["flops_per_image"] = parts[0]["flops_per_image"]
        merged["mfu"] = sum(part["mfu"] * part["images"] for part in parts) / images
    return merged


def _added(times: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for one in times for name in one)
    return {name: sum(one.get(name, 0.0) for one in times) for name in names}


def _steps(parts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The median, by a weighted median of medians, and the 95th percentile of a step."""
    if not parts:
        return {}
    ordered = sorted((part["step_seconds"]["median"], part["images"]) for part in parts)
    sampled = list(accumulate(images for _, images in ordered))
    middle = bisect_left(sampled, sampled[-1] / 2)
    return {"median": ordered[middle][0], "p95": max(part["step_seconds"]["p95"] for part in parts)}
