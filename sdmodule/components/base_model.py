"""Which checkpoint a training starts from: its name, and what its weights are."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from sdmodule.components.checkpoint import MODELS, Components
from sdmodule.errors import SettingsError, choices


class BaseModel:
    """The identity of a checkpoint, kept in the checkpoints of its training in the place of its weights.

    A copy elsewhere is the same base model, and another one under the same name is not. Parts that start from random
    weights have no identity: what becomes of them is in the training's own checkpoints.

    Args:
        parts: as they were loaded, before anything is put into them or trained.
        scratch: names of those that are random.
    """

    def __init__(self, parts: Components, scratch: Iterable[str] = ()) -> None:
        self.name = parts.source
        models: dict[str, nn.Module] = {name: getattr(parts, name) for name in MODELS if name not in set(scratch)}
        # the parameters themselves: what training puts round them does not change what they are
        self._weights = {name: dict(model.named_parameters()) for name, model in models.items()}
        self._fingerprints: dict[str, str] = {}

    def identify(self) -> dict[str, str]:
        """A fingerprint of each part's weights, taken when it is first asked for; after that they may change."""
        if self._weights:
            self._fingerprints = {name: weights_fingerprint(weights) for name, weights in self._weights.items()}
            self._weights = {}
        return self._fingerprints

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Write the identity into a checkpoint."""
        checkpoint["base_model"] = {"name": self.name, "fingerprints": self.identify()}

    def check(self, checkpoint: Mapping[str, Any]) -> None:
        """Whether a checkpoint was trained on this base model.

        Raises:
            SettingsError: if not.
        """
        theirs = checkpoint.get("base_model")
        if not isinstance(theirs, dict):
            raise SettingsError("the checkpoint does not say which base model it was trained on; give one that does.")
        others = {name for name, own in self.identify().items() if theirs["fingerprints"].get(name, own) != own}
        if others:
            raise SettingsError(
                f"the checkpoint was trained on pretrained={theirs['name']}, and pretrained={self.name} of this run "
                f"has other weights in {choices(others)}; give the base model that it was trained on."
            )


def weights_fingerprint(weights: Mapping[str, Tensor]) -> str:
    """The fingerprint of weights, in the order of their names; the names are another's when a library changes them."""

    def digest(weight: Tensor) -> bytes:
        content = weight.detach().cpu().contiguous()
        own = hashlib.sha256(f"{content.dtype} {tuple(content.shape)}".encode())
        own.update(content.reshape(-1).view(torch.uint8).numpy().data)
        return own.digest()

    with ThreadPoolExecutor() as pool:
        return hashlib.sha256(b"".join(pool.map(digest, (weights[name] for name in sorted(weights))))).hexdigest()
