"""Which of Lightning's strategies train and sample rightly."""

from __future__ import annotations

from typing import Any

from lightning import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from sdmodule.errors import SettingsError
from sdmodule.training.sharded_strategy import FullyShardedStrategy

FSDP, HSDP = "fsdp", "hsdp"
"""Our names for a model sharded over all processes, and over those of each machine."""

REFUSED = ("deepspeed", "fsdp", "model_parallel")
"""How the names of Lightning's other strategies that shard the model begin."""


def make_strategy(strategy: Any) -> Any:
    """The strategy that a trainer is given for its name, if it is one of ours.

    Args:
        strategy: a name, or a strategy.

    Raises:
        SettingsError: if it shards the model in another way.
    """
    if strategy in (FSDP, HSDP):
        return FullyShardedStrategy(hybrid=strategy == HSDP)
    check_strategy(strategy)
    return strategy


def check_strategy(strategy: Any, shards: bool = False) -> None:
    """Check that what a strategy trains and writes is whole.

    Args:
        strategy: its name, or a trainer whose strategy it is; None and anything else pass.
        shards: whether `FullyShardedStrategy` may be used.

    Raises:
        SettingsError: if it shards the model in a way that was not tested.
    """
    if isinstance(strategy, Trainer):
        strategy = strategy.strategy
    if isinstance(strategy, FullyShardedStrategy):
        if shards:
            return
        raise SettingsError("trainer=fsdp: is for training a Stable Diffusion model alone; use trainer=ddp.")
    name = strategy if isinstance(strategy, str) else type(strategy).__name__
    sharded = isinstance(strategy, (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy))
    if sharded or name.startswith(REFUSED):
        raise SettingsError(
            f"trainer.strategy={name}: shards the model in a way that was never tested; use trainer=fsdp, which is "
            "sdmodule.training.sharded_strategy.FullyShardedStrategy in Python, or trainer=ddp."
        )
