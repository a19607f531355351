"""Lightning's strategy of sharded trainings: FSDP2, or copies of the shards on each machine."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import empty as empty_shards
from torch.optim import Optimizer
from typing_extensions import override

from sdmodule.components.checkpoint import Components
from sdmodule.errors import SettingsError
from sdmodule.training.sharded_checkpoint import ShardWriter, read_folder, split
from sdmodule.training.sharding import shard_networks, shard_values, sharded_like

COMPUTE_DTYPES = {"32-true": None, "bf16-mixed": torch.bfloat16}
"""What each precision gathers weights in; None is as they are."""


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

    @override
    def setup_environment(self) -> None:
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def shard(self, parts: Components) -> None:
        """Shard a model's networks, in the precision of the trainer."""
        precision = str(self.precision_plugin.precision)
        shard_networks(parts, self._mesh(), COMPUTE_DTYPES[precision])

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
        """Write a folder, each process its shards.

        Raises:
            SettingsError: if it cannot be written; an earlier checkpoint of that name stays as it was.
        """
        path, number = self.broadcast((str(filepath), uuid.uuid4().hex))
        aside = Path(path).with_name(f".{Path(path).name}.{number}.part")
        rest, tensors = split(checkpoint)
        try:
            dcp.save(tensors, storage_writer=ShardWriter(aside, Path(path), rest))
        except CheckpointException as error:
            reason = next(iter(error.failures.values()))[0]
            raise SettingsError(
                f"the checkpoint {path} cannot be written ({getattr(reason, 'strerror', None) or reason}); make room, "
                "then resume from the last intact one with ckpt_path=last."
            ) from error

    @override
    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint, of a folder only the shards that this process needs."""
        path = Path(self.broadcast(str(checkpoint_path)))
        assert self.lightning_module is not None
        weights = dict(self.lightning_module.named_parameters())
        trained = [weight for optimizer in self.optimizers for weight in _parameters(optimizer)]

        if path.is_dir():

            def empty(place: tuple[Any, ...], tensor: Tensor) -> Tensor:
                weight = trained[place[3]] if place[0] == "optimizer_states" else weights.get(place[-1])
                if not isinstance(weight, DTensor) or weight.shape != tensor.shape:
                    return torch.empty_like(tensor, device="cpu")
                return empty_shards(
                    *tensor.shape, dtype=tensor.dtype, device_mesh=weight.device_mesh, placements=weight.placements
                )

            return read_folder(path, empty)
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        for states in checkpoint.get("optimizer_states", ()):
            for number, state in states["state"].items():
                states["state"][number] = {
                    name: sharded_like(value, trained[number]) if isinstance(value, Tensor) else value
                    for name, value in state.items()
                }
        rest = {name: value for name, value in checkpoint.items() if name != "optimizer_states"}
        return checkpoint | shard_values(rest, weights)


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    """What an optimizer trains, in the order in which it numbers it."""
    return [weight for group in optimizer.param_groups for weight in group["params"]]
