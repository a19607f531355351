"""Stable Diffusion as one LightningModule: it trains, validates and samples.

The algorithms are those of Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models": a VAE
encodes images as latents; a UNet, conditioned on the prompt by cross-attention, learns to remove noise from noisy
latents; sampling starts from pure noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Self, Unpack

import torch
from torch import Tensor
from typing_extensions import override

from sdmodule.components.adapters import AdapterSettings
from sdmodule.components.load_model import load_model, place_names
from sdmodule.conditioning.captions import CaptionInputs, caption_inputs, embed_captions
from sdmodule.conditioning.inpaint_crop import check_inpaint_settings
from sdmodule.errors import build_settings, check_choice
from sdmodule.families.conditioning import Conditioning
from sdmodule.io.redact import shorten_home
from sdmodule.sampling.infer import InferOptions, Prompts, infer
from sdmodule.sampling.metadata import describe
from sdmodule.sampling.pipeline import OnStep, sample_requests
from sdmodule.sampling.predicting import awaiting_use, sped_up
from sdmodule.sampling.requests import INPAINT, TASKS, TEXT2IMAGE, SampleRequest, as_requests
from sdmodule.sampling.result import Samples
from sdmodule.sampling.schedule import check_settings
from sdmodule.sampling.settings import SamplingSettings
from sdmodule.speed.apply import apply_training_speed
from sdmodule.speed.compile import compile_unet
from sdmodule.training import loss as denoising
from sdmodule.training.accumulation import batch_size_of
from sdmodule.training.activation_checkpointing import checkpoint_blocks
from sdmodule.training.frozen_weights import FrozenWeights
from sdmodule.training.objective import Objective
from sdmodule.training.optimizers import Optimization, parameter_groups
from sdmodule.training.rng import generator_for, per_example_generators, seeded, validation_generators
from sdmodule.training.settings import TrainingSettings
from sdmodule.training.step_inputs import step_inputs
from sdmodule.training.trainable import TrainableModule, replaced
from sdmodule.training.tuning import check_scratch, check_stage, choose_tuning, export
from sdmodule.training.validation import validation_losses


class StableDiffusionModule(TrainableModule):
    """Fine-tune a Stable Diffusion checkpoint, and sample from it.

    Args:
        pretrained: ``tiny``, a diffusers folder, a hub id, or a ``.safetensors``/``.ckpt`` file of the original layout.
        revision: branch, tag or commit of a hub id.
        variant: which weights of a folder or hub id, such as ``fp16``.
        components: other places of parts; ``controlnet``, ``refiner`` and ``ip_adapter`` name models to sample with.
        task: ``text2image``, ``inpaint`` or ``image2image``.
        sampling: how images are sampled (steps, guidance and the rest); see ``SamplingSettings``.
        tome: token merging in sampling; see ``TokenMerging``.
        speed: what is done to sample faster; see ``SpeedSettings``.
        adapters: what to sample with beside the checkpoint: a path, or ``[{"path": file, "scale": 0.8}, …]``; see
            ``AdapterSettings``.
        tuning: what is trained, by its ``kind``: ``full``, ``lora``, ``textual_inversion`` or ``controlnet``.
        objective: what is predicted and how its error counts; see ``Objective``.
        training: seed, compilation and the rest; see ``TrainingSettings``.
        optimizer: takes the trainable parameters and returns the optimizer; AdamW at the usual rate of the tuning.
        lr_scheduler: takes the optimizer and returns its learning rate schedule, stepped every step.

    Raises:
        SettingsError: when the checkpoint or a setting cannot be used.
    """

    def __init__(
        self,
        pretrained: str | Path = "tiny",
        *,
        revision: str | None = None,
        variant: str | None = None,
        components: Mapping[str, Any] | None = None,
        task: str = TEXT2IMAGE,
        sampling: Mapping[str, Any] | None = None,
        tome: Mapping[str, Any] | None = None,
        speed: Mapping[str, Any] | None = None,
        adapters: Mapping[str, Any] | Sequence[Any] | Path | None = None,
        tuning: Mapping[str, Any] | None = None,
        objective: Mapping[str, Any] | None = None,
        training: Mapping[str, Any] | None = None,
        optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        lr_scheduler: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__()
        check_choice("model", task, TASKS)
        self.task = task
        self.sampling = SamplingSettings.from_groups(sampling, tome, speed, task)
        self.adapters = AdapterSettings.parse(adapters)
        self.tuning = choose_tuning(tuning)
        self.objective = build_settings(Objective, "objective", objective)
        self.training_settings = TrainingSettings.from_mapping(training)
        self.optimization = Optimization(optimizer, lr_scheduler, self.tuning.usual_optimizer)
        check_inpaint_settings(self.sampling.inpaint, task)
        self.inpaint_training = self.training_settings.inpaint_for(task == INPAINT)
        check_scratch(self.tuning, self.training_settings.scratch)

        pretrained, components = shorten_home(str(pretrained)), place_names(components)
        adapters, training = self.adapters.plain(), self.training_settings.lasting()
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        scratch = self.training_settings.scratch
        parts, self.base_model = load_model(pretrained, revision, variant, components, scratch, self.adapters)
        parts.scheduler = self.objective.scheduler(parts.scheduler)
        check_settings(parts, self.sampling, task)
        self.tuning.prepare(parts, self.training_settings.seed)
        self.parts = parts
        self.unet, self.controlnet = parts.unet, parts.controlnet
        self.text_encoder, self.text_encoder_2 = parts.text_encoder, parts.text_encoder_2
        self.vae, self.beside = parts.vae.eval().requires_grad_(False), torch.nn.ModuleDict(parts.beside)
        self.frozen_weights = FrozenWeights.of(parts)
        self._cached_embeddings, self._on_step = None, None
        checkpoint_blocks((self.unet, self.controlnet), self.training_settings.checkpointing)
        compile_unet(self.unet, self.training_settings.compile)

    @classmethod
    def from_pretrained(cls, pretrained: str | Path = "tiny", **settings: Any) -> Self:
        """Load a checkpoint for sampling or training; ``settings`` are those of the constructor."""
        return cls(pretrained, **settings)

    @override
    def setup(self, stage: str) -> None:
        check_stage(self.parts, stage, self.task, self._trainer)
        if stage == "predict":
            self.switched.enter_context(awaiting_use(self.parts, self.sampling))
        elif stage == "fit":
            self.check_fit()
            self.tuning.check_trainer(self._trainer)
            self.base_model.identify()
            if self.inpaint_training is not None:
                self.inpaint_training.prepare(self.unet, self.parts.source, self.tuning)

    @override
    def on_fit_start(self) -> None:
        self.switched.enter_context(apply_training_speed(self.parts, self.device.type, str(self.trainer.precision)))

    @override
    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Algorithm 1 of Ho et al. 2020: add noise to each image at a timestep of its own, predict it, compare."""
        batch = self.read_batch(batch, batch_idx)
        seed, size, parts = self.training_settings.seed, len(batch["caption"]), self.parts
        generators = per_example_generators(seed, size, batch_idx, self._trainer, pairs="prior" in batch)
        step = step_inputs(parts, batch, generators, self.objective, self.inpaint_training, self._cached_embeddings)
        latents = denoising.encode_images(parts, batch, step.latent_noise)
        masks = denoising.mask_channels(parts, batch, step.masks)
        with seeded(generator_for(seed, self.global_step, batch_idx, self.global_rank), self.device):  # for dropout
            text = self.encode_captions(step.text).with_time_ids(step.time_ids)
            conditions = denoising.Conditions(text, masks, denoising.control_guide(self.controlnet, batch))
            errors = denoising.denoising_errors(parts, latents, step.noise, step.timesteps, conditions, self.objective)
        loss = denoising.reduce_errors(errors, batch, masks, self.objective, self.inpaint_training)
        self.log_training("loss", loss)
        return self.weighted(loss, size // 2 if "prior" in batch else size)

    @override
    def forward(self, latents: Tensor, timesteps: Tensor, embeddings: Conditioning | Tensor) -> Tensor:
        """The denoiser's prediction ``[B, 4, h, w]`` for noisy latents at ``timesteps`` ``[B]``, given text."""
        return self.unet(latents, timesteps, **self.parts.family.denoiser_arguments(Conditioning.of(embeddings))).sample

    @override
    def validation_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        batch, size = self.validation_batch(batch, batch_idx, dataloader_idx)
        seed, count = self.training_settings.seed, len(batch["caption"])
        generators = validation_generators(seed, count, batch_idx, self._trainer, dataloader_idx)
        text = denoising.with_image_sizes(self.encode_captions(batch["caption"]), batch, self.parts)
        losses = validation_losses(self.parts, batch, text, generators, inpainting=self.task == INPAINT)
        self.log_validation(losses, main="loss", batch_size=size)

    @override
    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        if not self.tuning.text_encoder_learns(self.global_step):
            for _, encoder in self.parts.text_encoders:
                encoder.zero_grad()

    def encode_captions(self, captions: Sequence[str] | CaptionInputs) -> Conditioning:
        """Text embeddings of captions, cached or computed; see `conditioning.captions.encode_captions`."""
        if not isinstance(captions, CaptionInputs):
            captions = caption_inputs(captions, self.parts, self._cached_embeddings)
        # DDP waits for all gradients, even those that are dropped after text_encoder_stop
        distributed = self._trainer is not None and self._trainer.world_size > 1
        learns = self.tuning.text_encoder_learns(0 if distributed else self.global_step)
        with torch.set_grad_enabled(torch.is_grad_enabled() and learns):
            return embed_captions(captions, self.parts)

    def cached_embeddings(self, embeddings: Any) -> AbstractContextManager[None]:
        """Look up text embeddings inside a ``with`` block; see `data.cache.latents.CachedEmbeddings`."""
        return replaced(self, "_cached_embeddings", embeddings)

    @property
    @override
    def parameter_groups(self) -> list[Any]:
        """The trainable weights, in groups for the optimizer."""
        return parameter_groups(self, [one for _, one in self.parts.text_encoders], self.tuning.text_encoder_lr)

    @property
    def resolution(self) -> int:
        """Side in pixels of the images that the checkpoint was made for."""
        return self.parts.resolution

    def infer(
        self, prompt: Prompts = None, image: Any = None, mask: Any = None, **options: Unpack[InferOptions]
    ) -> dict[str, Any]:
        """Sample images: ``infer("a star", height=512)["samples"][0]``; see `sampling.infer.infer` for all options."""
        with self.frozen_weights.sampling():
            return infer(self.parts, self.sampling, self.task, prompt, image, mask, **options)

    def set_adapters(self, scales: Sequence[float]) -> None:
        """Sample with the ``adapters`` at other scales, in their order; 0 turns one off."""
        self.adapters = self.adapters.rescaled(self.parts, scales)

    @override
    def on_predict_start(self) -> None:
        self.switched.enter_context(sped_up(self.parts, self.sampling, self.trainer, self.device))

    @override
    def predict_step(self, batch: list[SampleRequest], batch_idx: int) -> Samples:
        """Algorithm 2 of Ho et al. 2020, guided and decoded; writing the images is the callbacks' work."""
        requests = as_requests(batch, batch_idx, batch_size_of(self.trainer.predict_dataloaders))
        return sample_requests(self.parts, requests, self.sampling, on_step=self._on_step, as_bytes=True)

    def step_reports(self, on_step: OnStep) -> AbstractContextManager[None]:
        """Call ``on_step`` after each denoising step of ``predict_step`` inside a ``with`` block."""
        return replaced(self, "_on_step", on_step)

    def describe(self) -> dict[str, Any]:
        """The metadata of the images that ``predict_step`` makes, in plain types."""
        return describe(self.parts, self.sampling, self.task)

    def save_pretrained(self, folder: str | Path, dtype: str = "float32", layout: str = "diffusers") -> None:
        """Write what is trained, as ``dtype``: a folder of diffusers, an adapter, or one of ``tuning.layouts``."""
        self.adapters.check_saved()
        with self.frozen_weights.full_precision():
            export(self.tuning, self.parts, folder, dtype, layout)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        self.base_model.save(checkpoint)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.base_model.check(checkpoint)
        self.training_settings.inpaint.restore(self.unet)
        super().on_load_checkpoint(checkpoint)
