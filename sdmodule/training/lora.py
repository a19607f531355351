"""Adapters of low rank beside the weights, which stay as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning import Trainer
from lightning.pytorch.strategies import DDPStrategy
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig, inject_adapter_in_model
from torch import nn

from sdmodule.components.adapter_file import write_diffusers, write_kohya
from sdmodule.components.checkpoint import Components
from sdmodule.components.lora_layers import DORA, LOHA, LOKR, LORA, METHODS, extract_adapter
from sdmodule.errors import SettingsError, choices
from sdmodule.ranges import check_whole
from sdmodule.training.text_encoder import TextEncoderTraining

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
"""What the UNet's attention projects with."""

TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")


@dataclass(frozen=True)
class LoraTuning(TextEncoderTraining):
    """Train adapters of low rank (LoRA, Hu et al. 2021) and leave the model's own weights alone.

    Args:
        method: ``lora``; ``dora``, which learns each output's length apart (Liu et al. 2024); ``loha``, a product of
            two of low rank (Hyeon-Woo et al. 2022); ``lokr``, a Kronecker product (Yeh et al. 2024).
        rank: of the adapter's matrices.
        alpha: the adapter counts ``alpha / rank`` times; the rank if None, which is once.
        dropout: share of an adapter's inputs that are left out at each step; of whole adapters for ``loha`` and
            ``lokr``.
        target_modules: layers of the UNet that get an adapter, by the end of their name.
        text_target_modules: those of the text encoder, where it is trained.

    Raises:
        SettingsError: for a value out of range; in `prepare`, for layers that the model does not have.
    """

    kind: ClassVar[str] = "lora"
    from_scratch: ClassVar[set[str]] = set()

    method: str = LORA
    rank: int = 4
    alpha: float | None = None
    dropout: float = 0.0
    target_modules: Sequence[str] = ATTENTION
    text_target_modules: Sequence[str] = TEXT_ATTENTION

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method not in METHODS:
            raise SettingsError(f"tuning.method={self.method} is not known; give one of {choices(METHODS)}.")
        check_whole("tuning.rank", self.rank)
        alpha = self.rank if self.alpha is None else self.alpha
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < 1e6:
            raise SettingsError(f"tuning.alpha={alpha} is not allowed; give a number over 0.")
        if not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            raise SettingsError(f"tuning.dropout={self.dropout} is not allowed; give a share from 0 to under 1.")
        for name in ("target_modules", "text_target_modules"):
            value = getattr(self, name)
            if isinstance(value, str) or not value or not all(isinstance(module, str) for module in value):
                raise SettingsError(f"tuning.{name}={value} is not allowed; give a list such as [to_q,to_v].")

    def prepare(self, parts: Components, seed: int) -> None:
        """Add the adapters, drawn from ``seed``; they alone are trained.

        Raises:
            SettingsError: for layers that the model does not have, or that cannot be adapted.
        """
        parts.text_encoder.eval().requires_grad_(False)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self._adapt(parts.unet.requires_grad_(False), "target_modules")
            if self.text_encoder:
                self._adapt(parts.text_encoder, "text_target_modules")

    def check_trainer(self, trainer: Trainer | None) -> None:
        """Check that devices that drop different adapters do not wait for each other's gradients.

        Raises:
            SettingsError: if they would.
        """
        strategy = trainer.strategy if trainer is not None else None
        if self.method in (LORA, DORA) or not self.dropout or not isinstance(strategy, DDPStrategy):
            return
        if not strategy._ddp_kwargs.get("find_unused_parameters"):
            raise SettingsError(
                f"tuning.dropout={self.dropout}: drops whole adapters of tuning.method={self.method}, and DDP waits "
                "for their gradients; set trainer.strategy=ddp_find_unused_parameters_true, or tuning.dropout=0."
            )

    def _adapt(self, model: nn.Module, setting: str) -> None:
        targets = list(getattr(self, setting))
        names = [name for name, _ in model.named_modules()]
        for target in targets:
            if not any(name == target or name.endswith(f".{target}") for name in names):
                raise SettingsError(
                    f"tuning.{setting} names {target}, which no layer of this {type(model).__name__} is called; give "
                    f"ends of names such as {ATTENTION[0] if setting == 'target_modules' else TEXT_ATTENTION[0]}."
                )
        try:
            inject_adapter_in_model(self._config(targets), model)
        except ValueError as error:
            raise SettingsError(f"tuning.{setting}={targets}: {' '.join(str(error).split())}") from error

    def _config(self, targets: list[str]) -> PeftConfig:
        alpha = self.rank if self.alpha is None else self.alpha
        if self.method in (LORA, DORA):
            drawn = {"init_lora_weights": "gaussian", "lora_dropout": self.dropout, "use_dora": self.method == DORA}
            return LoraConfig(r=self.rank, lora_alpha=alpha, target_modules=targets, **drawn)  # type: ignore[arg-type]
        config: Any = {LOHA: LoHaConfig, LOKR: LoKrConfig}[self.method]
        return config(r=self.rank, alpha=alpha, target_modules=targets, module_dropout=self.dropout)

    def export(self, parts: Components, folder: str | Path, dtype: str) -> None:
        """Write the adapter: for diffusers, where it reads the method, and in the layout of kohya's scripts."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        adapter = extract_adapter(parts, self.method)
        if self.method in (LORA, DORA):
            write_diffusers(adapter, folder, dtype)
        write_kohya(adapter, folder, dtype)
