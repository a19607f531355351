"""Train low-rank adapters; the model's own weights stay frozen."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
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
from sdmodule.components.peft_layout import write_peft
from sdmodule.errors import SettingsError, check_choice, check_int, check_number
from sdmodule.training.text_encoder import TextEncoderTraining, freeze_text_encoders, freeze_unused

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
"""Projections of the UNet's attention."""

TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
"""Projections of the text encoder's attention."""

MAX_RANK = 2**16
"""More than the width of any layer."""


@dataclass(frozen=True)
class LoraTuning(TextEncoderTraining):
    """Train low-rank adapters (LoRA, Hu et al. 2021) and leave the model's own weights as they are.

    Args:
        method: ``lora``; ``dora``, which learns the magnitude of each output separately (Liu et al. 2024); ``loha``, a
            Hadamard product of two low-rank matrices (Hyeon-Woo et al. 2022); ``lokr``, a Kronecker product (Yeh et
            al. 2024).
        rank: rank of the adapter's matrices.
        alpha: the adapter's output is scaled by ``alpha / rank``; the rank if None, so that the scale is 1.
        rank_pattern: other ranks by the end of a layer's name, such as ``{"attn2.to_k": 16}``.
        alpha_pattern: other alphas, likewise.
        dropout: probability of dropping an input of an adapter; for ``loha`` and ``lokr``, of dropping a whole adapter.
        target_modules: layers of the UNet that get an adapter, by the end of their name.
        text_target_modules: layers of the text encoders that get one if they are trained.

    Raises:
        SettingsError: for a value out of range; in `prepare`, for layers that the model does not have.
    """

    kind: ClassVar[str] = "lora"
    layouts: ClassVar[tuple[str, ...]] = ("diffusers", "kohya", "peft")
    usual_optimizer: ClassVar[dict[str, float]] = {
        "lr": 1e-4
    }  # ten times that of a whole model, because an adapter starts at zero
    from_scratch: ClassVar[set[str]] = set()

    method: str = LORA
    rank: int = 4
    alpha: float | None = None
    rank_pattern: Mapping[str, int] | None = None
    alpha_pattern: Mapping[str, float] | None = None
    dropout: float = 0.0
    target_modules: Sequence[str] = ATTENTION
    text_target_modules: Sequence[str] = TEXT_ATTENTION

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("tuning.method", self.method, METHODS)
        check_int("tuning.rank", self.rank, maximum=MAX_RANK)
        if self.alpha is not None:
            check_number("tuning.alpha", self.alpha, above=0, below=1e6)
        for layer, rank in (self.rank_pattern or {}).items():
            check_int(f"tuning.rank_pattern.{layer}", rank, maximum=MAX_RANK)
        for layer, alpha in (self.alpha_pattern or {}).items():
            check_number(f"tuning.alpha_pattern.{layer}", alpha, above=0, below=1e6)
        check_number("tuning.dropout", self.dropout, minimum=0, below=1)
        for name in ("target_modules", "text_target_modules"):
            value = getattr(self, name)
            if isinstance(value, str) or not value or not all(isinstance(module, str) for module in value):
                raise SettingsError(f"tuning.{name}={value}: must be a list of layer names such as [to_q,to_v].")

    def prepare(self, parts: Components, seed: int) -> None:
        """Add the adapters, initialized from ``seed``, and freeze everything else.

        Raises:
            SettingsError: for layers that the model does not have, or that cannot take an adapter.
        """
        trained = self.choose_text_encoders(parts)
        freeze_text_encoders(parts)
        with torch.random.fork_rng(devices=[]):  # layers are made on the CPU; GPUs are none of its business
            torch.default_generator.manual_seed(seed)
            self._adapt(parts.unet.requires_grad_(False), "target_modules")
            for name in sorted(trained):
                self._adapt(getattr(parts, name), "text_target_modules")
        freeze_unused(parts)

    def check_trainer(self, trainer: Trainer | None) -> None:
        """Check that DDP does not wait for the gradients of dropped adapters.

        Raises:
            SettingsError: if it would.
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
                    f"tuning.{setting}={target}: no layer of this {type(model).__name__} has a name that ends so; give "
                    f"endings such as {ATTENTION[0] if setting == 'target_modules' else TEXT_ATTENTION[0]}."
                )
        try:
            inject_adapter_in_model(self._config(targets), model)
        except ValueError as error:
            raise SettingsError(f"tuning.{setting}={targets}: {' '.join(str(error).split())}") from error

    def _config(self, targets: list[str]) -> PeftConfig:
        alpha = self.rank if self.alpha is None else self.alpha
        patterns: dict[str, Any] = {
            "rank_pattern": {re.escape(layer): rank for layer, rank in (self.rank_pattern or {}).items()},
            "alpha_pattern": {re.escape(layer): alpha for layer, alpha in self._alphas().items()},
        }
        if self.method in (LORA, DORA):
            options = {"init_lora_weights": "gaussian", "lora_dropout": self.dropout, "use_dora": self.method == DORA}
            return LoraConfig(r=self.rank, lora_alpha=alpha, target_modules=targets, **patterns, **options)  # type: ignore[arg-type]
        config: Any = {LOHA: LoHaConfig, LOKR: LoKrConfig}[self.method]
        return config(r=self.rank, alpha=alpha, target_modules=targets, module_dropout=self.dropout, **patterns)

    def _alphas(self) -> dict[str, float]:
        """Alphas by layer; a layer of another rank keeps the scale 1 if no alpha is given."""
        own = self.rank_pattern or {} if self.alpha is None else {}
        return {**own, **(self.alpha_pattern or {})}

    def export(self, parts: Components, folder: str | Path, dtype: str, layout: str) -> None:
        """Write the adapter in a layout: that of diffusers, if it reads the method, with that of kohya's scripts."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        adapter = extract_adapter(parts, self.method)
        if layout == "peft":
            write_peft(adapter, folder, dtype)
            return
        if layout == "diffusers" and self.method in (LORA, DORA):
            write_diffusers(adapter, folder, dtype)
        write_kohya(adapter, folder, dtype, parts)
