"""Checkpoints that do not tell where the home folder is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint
from typing_extensions import override

from sdmodule.privacy import redacted


class PrivateCheckpoint(ModelCheckpoint):
    """Lightning's `ModelCheckpoint`; the paths in its state, which every checkpoint holds, begin with ``~``."""

    @override
    def state_dict(self) -> dict[str, Any]:
        return _with_paths(super().state_dict(), redacted)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(_with_paths(state_dict, lambda path: str(Path(path).expanduser()) if path else path))


def _with_paths(state: dict[str, Any], change: Any) -> dict[str, Any]:
    changed = {name: change(value) if isinstance(value, str) else value for name, value in state.items()}
    return changed | {"best_k_models": {change(path): score for path, score in state["best_k_models"].items()}}
