"""Which of Lightning's strategies train and sample rightly."""

from __future__ import annotations

from typing import Any

from lightning import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from sdmodule.errors import SettingsError

SHARDED = ("deepspeed", "fsdp", "model_parallel")
"""How the names of strategies that shard the model begin."""


def check_strategy(strategy: Any) -> None:
    """Check that a strategy leaves the whole model on each device.

    Args:
        strategy: its name, or a trainer whose strategy it is; None and anything else pass.

    Raises:
        SettingsError: if it shards the model, whose exports and averages would then be those of one shard.
    """
    if isinstance(strategy, Trainer):
        strategy = strategy.strategy
    name = strategy if isinstance(strategy, str) else type(strategy).__name__
    sharded = isinstance(strategy, (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy))
    if sharded or name.startswith(SHARDED):
        raise SettingsError(
            f"trainer.strategy={name}: shards the model, which is not supported yet, since its exports would be "
            "corrupt; use trainer=ddp."
        )
