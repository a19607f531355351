"""Lightning's strategy of sharded trainings: FSDP2, or copies of the shards on each machine."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from lightning.pytorch.trainer.states import TrainerStatus
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import empty as empty_shards
from torch.optim import Optimizer
from typing_extensions import override

from sdmodule.components.checkpoint import Components
from sdmodule.errors import SettingsError, choices
from sdmodule.training.sharded_checkpoint import CheckpointQueue, is_sharded, read_folder
from sdmodule.training.sharding import shard_networks, shard_values

COMPUTE_DTYPES = {"32-true": None, "bf16-mixed": torch.bfloat16}
"""What each precision gathers weights in; None is as they are."""

OPTIMIZERS = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
"""Optimizers that update each number on its own, so that shards are updated as whole weights are."""


class FullyShardedStrategy(ModelParallelStrategy):
    """Shard weights, gradients, optimizer states and averages over all processes (FSDP2).

    A checkpoint is a folder, see `sharded_checkpoint`. Checkpoint files of one process or of DDP can be resumed from
    too, and the folders can be read under any strategy.

    Args:
        hybrid: shard over the processes of a machine, and keep a copy of the shards on each machine (HSDP).
    """

    def __init__(self, hybrid: bool = False) -> None:
        super().__init__()
        self.hybrid = hybrid
        self._queue: CheckpointQueue | None = None

    @override
    def setup_environment(self) -> None:
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def shard(self, parts: Components) -> None:
        """Shard a model's networks, in the precision of the trainer."""
        precision = str(self.precision_plugin.precision)
        shard_networks(parts, self._mesh(), COMPUTE_DTYPES[precision])

    def check(self, parts: Components, optimizer: Optimizer, compiles: str) -> None:
        """Check that a training can be sharded, before anything is written.

        Args:
            parts: the model.
            optimizer: of the training.
            compiles: what of the denoiser is compiled.

        Raises:
            SettingsError: if it cannot.
        """
        precision, kind = str(self.precision_plugin.precision), type(optimizer)
        if precision not in COMPUTE_DTYPES:
            raise SettingsError(
                f"trainer.precision={precision}: trainer=fsdp computes in {choices(COMPUTE_DTYPES)}; choose one of "
                "these."
            )
        encoders = [encoder for _, encoder in parts.text_encoders]
        if parts.family.pools_text and any(weight.requires_grad for one in encoders for weight in one.parameters()):
            raise SettingsError(
                f"tuning.text_encoder=true: trainer=fsdp cannot shard the text encoders of {parts.family.title}; leave "
                "them frozen, or use trainer=ddp."
            )
        if compiles != "none":
            raise SettingsError(
                f"training.compile={compiles}: was never tested with trainer=fsdp; leave it out, or use trainer=ddp."
            )
        if kind not in OPTIMIZERS:
            raise SettingsError(
                f"model.optimizer={kind.__name__}: was never tested with trainer=fsdp; give one of "
                f"{choices(own.__name__ for own in OPTIMIZERS)} of torch.optim, or use trainer=ddp."
            )

    def _mesh(self) -> DeviceMesh:
        shape = (self.num_nodes, self.num_processes) if self.hybrid else (self.world_size,)
        names = ("copies", "shards") if self.hybrid else ("shards",)
        return init_device_mesh(self.root_device.type, shape, mesh_dim_names=names)

    @property
    @override
    def lightning_restore_optimizer(self) -> bool:
        return True

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return {name: weight.detach() for name, weight in self.lightning_module.named_parameters()}

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return Strategy.optimizer_state(self, optimizer)

    @override
    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        Strategy.load_model_state_dict(self, checkpoint, strict)

    @override
    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        Strategy.load_optimizer_state_dict(self, checkpoint)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write a folder, each process its shards; while training in a thread.

        Raises:
            SettingsError: if it, or an earlier one, could not be written; one of the same name stays as it was.
        """
        if self._queue is None:
            self._queue = CheckpointQueue(torch.distributed.new_group(backend="gloo"))
        path, number = self.broadcast((str(filepath), uuid.uuid4().hex))
        self._queue.save(checkpoint, Path(path), number)
        if self.lightning_module is None or self.lightning_module.trainer.state.status != TrainerStatus.RUNNING:
            self._wait_for_checkpoints()

    @override
    def remove_checkpoint(self, filepath: str | Path) -> None:
        if self._queue is None:
            super().remove_checkpoint(filepath)
        elif self.is_global_zero:
            self._queue.remove(Path(filepath))

    @override
    def teardown(self) -> None:
        self._wait_for_checkpoints()
        super().teardown()

    def _wait_for_checkpoints(self) -> None:
        if self._queue is not None:
            self._queue.wait()

    @override
    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint, of a folder only the shards that this process needs."""
        self._wait_for_checkpoints()
        path = Path(self.broadcast(str(checkpoint_path)))
        assert self.lightning_module is not None
        weights = dict(self.lightning_module.named_parameters())
        trained = [weight for optimizer in self.optimizers for weight in _parameters(optimizer)]

        if is_sharded(path):
            return read_folder(path, partial(_empty, weights, trained))
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        for states in checkpoint.get("optimizer_states", ()):
            for number, state in states["state"].items():
                states["state"][number] = shard_values(state, dict.fromkeys(state, trained[number]))
        return shard_values(checkpoint, weights)


def _empty(weights: Mapping[Any, Tensor], trained: list[Tensor], place: tuple[Any, ...], tensor: Tensor) -> Tensor:
    """Memory for a tensor at a place in a checkpoint, sharded as the weight to which it belongs."""
    weight = trained[place[3]] if place[0] == "optimizer_states" else weights.get(place[-1])
    if not isinstance(weight, DTensor) or weight.shape != tensor.shape:
        return torch.empty_like(tensor, device="cpu")
    return empty_shards(*tensor.shape, dtype=tensor.dtype, device_mesh=weight.device_mesh, placements=weight.placements)


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    """What an optimizer trains, in the order in which it numbers it."""
    return [weight for group in optimizer.param_groups for weight in group["params"]]
