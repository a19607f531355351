"""The checkpoint that a training run starts from, identified by fingerprints of its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from sdmodule.components.checkpoint import Components
from sdmodule.errors import SettingsError, choices

THREADS_FROM = 2**25
"""Bytes from which on threads hash weights faster than they are started."""


class BaseModel:
    """The identity of a base model, stored in training checkpoints instead of its frozen weights.

    A copy in another place is the same base model; other weights under the same name are not. Parts that start from
    random weights have no fingerprint: the training's own checkpoints hold them in full.

    Args:
        parts: as loaded, before anything is added or trained.
        scratch: names of the parts that start from random weights.
    """

    def __init__(self, parts: Components, scratch: Iterable[str] = ()) -> None:
        self.name = parts.source
        models = {name: model for name, model in parts.networks.items() if name not in set(scratch)}
        # the parameters themselves: modules that training wraps around them do not change them
        self._weights = {name: dict(model.named_parameters()) for name, model in models.items()}
        self._fingerprints: dict[str, str] = {}

    def identify(self) -> dict[str, str]:
        """Fingerprint of each part's weights, computed at the first call; the weights may change afterwards."""
        if self._weights:
            self._fingerprints = {name: weights_fingerprint(weights) for name, weights in self._weights.items()}
            self._weights = {}
        return self._fingerprints

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Write the identity into a checkpoint."""
        checkpoint["base_model"] = {"name": self.name, "fingerprints": self.identify()}

    def check(self, checkpoint: Mapping[str, Any]) -> None:
        """Check that a checkpoint was trained on this base model.

        Raises:
            SettingsError: if it was trained on another one, or does not say.
        """
        saved = checkpoint.get("base_model")
        if not isinstance(saved, dict):
            raise SettingsError("the checkpoint does not say which base model it was trained on; give one that does.")
        fingerprints = saved["fingerprints"]
        different = {name for name, own in self.identify().items() if fingerprints.get(name, own) != own}
        if different:
            raise SettingsError(
                f"pretrained={self.name}: the weights of {choices(different)} differ from those of "
                f"pretrained={saved['name']}, which the checkpoint was trained on; give that base model."
            )


def weights_fingerprint(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of weights in the order of their names; the names are left out, since libraries rename them."""

    def digest(weight: Tensor) -> bytes:
        content = weight.detach().cpu().contiguous()
        hashed = hashlib.sha256(f"{content.dtype} {tuple(content.shape)}".encode())
        hashed.update(content.reshape(-1).view(torch.uint8).numpy().data)
        return hashed.digest()

    ordered = [weights[name] for name in sorted(weights)]
    if sum(weight.nbytes for weight in ordered) < THREADS_FROM:
        return hashlib.sha256(b"".join(map(digest, ordered))).hexdigest()
    with ThreadPoolExecutor() as pool:
        return hashlib.sha256(b"".join(pool.map(digest, ordered))).hexdigest()
