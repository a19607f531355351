"""End all processes of a run soon after one of them is gone."""

from __future__ import annotations

from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ParallelStrategy
from typing_extensions import override

from sdmodule.callbacks.checkpoint import StoppedBySignal
from sdmodule.training import rank_watch
from sdmodule.training.rank_watch import RankWatch


class EndWithLostRank(Callback):
    """Ends a process within a minute after another one was killed, even if it waits for that in a collective operation.

    `RankWatch` says how. A process that fails is missed like one that was killed.
    """

    def __init__(self) -> None:
        self._watch: RankWatch | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        strategy: Any = trainer.strategy
        if trainer.world_size == 1 or not isinstance(strategy, ParallelStrategy) or self._watch is not None:
            return
        server = rank_watch.listen() if trainer.is_global_zero else None
        port = strategy.broadcast(server.getsockname()[1] if server else 0)
        address = (strategy.cluster_environment.main_address, port)  # type: ignore[union-attr]
        self._watch = RankWatch(trainer.global_rank, server, address, trainer.world_size - 1)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._watch is None:
            return
        if isinstance(exception, (KeyboardInterrupt, StoppedBySignal)):  # all processes end
            self._leave()
        else:
            self._watch.ending()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._leave()

    def _leave(self) -> None:
        if self._watch is not None:
            self._watch.leave()
            self._watch = None
