"""Stable Diffusion as one LightningModule: it trains, it validates, it samples.

The algorithms are those of Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models":
an autoencoder turns an image into latents; a UNet, told the prompt by cross-attention, learns to take noise out of
noisy latents; sampling starts from noise alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, Self

import torch
from diffusers.utils.torch_utils import randn_tensor
from lightning import LightningModule
from torch import Tensor
from typing_extensions import override

from sdmodule.components.adapters import parse_adapters, use_adapters
from sdmodule.components.base_model import BaseModel
from sdmodule.components.checkpoint import load_components
from sdmodule.components.schedulers import make_scheduler
from sdmodule.conditioning.control import ControlGuide, load_controlnet
from sdmodule.conditioning.inpaint import InpaintTraining, convert_to_inpaint, is_inpaint_unet
from sdmodule.conditioning.inpaint_crop import InpaintSettings, check_inpaint_settings
from sdmodule.conditioning.text import encode_prompts, escape_prompt
from sdmodule.data.cache.latents import CachedEmbeddings
from sdmodule.diffusion.noising import (
    add_noise,
    check_prior_weight,
    draw_timesteps,
    per_example_loss,
    prior_preservation_loss,
    target,
)
from sdmodule.errors import SettingsError, choices
from sdmodule.io.redact import shorten_home
from sdmodule.module_files import load_state_dict, on_load_checkpoint, on_save_checkpoint, save_pretrained
from sdmodule.ranges import check_flag, check_whole, is_number
from sdmodule.sampling.infer import infer
from sdmodule.sampling.pipeline import check_settings, describe, sample_all
from sdmodule.sampling.requests import INPAINT, TASKS, TEXT2IMAGE, SampleRequest
from sdmodule.sampling.result import Samples
from sdmodule.sampling.settings import SamplingSettings
from sdmodule.speed.attention import plain_attention
from sdmodule.speed.compile import check_compile, compile_unet
from sdmodule.speed.memory import retain_freed_memory
from sdmodule.speed.prepare import speed_applied
from sdmodule.speed.settings import choose_speed
from sdmodule.tome.settings import choose_merging
from sdmodule.training.activation_checkpointing import checkpoint_blocks
from sdmodule.training.conditions import control, mask_channels, spatial_loss_weights
from sdmodule.training.lora import LoraTuning
from sdmodule.training.objective import SQUARED_ERROR, Objective
from sdmodule.training.optimizers import build_optimizer, check_optimizer, parameter_groups
from sdmodule.training.precision import check_training_precision
from sdmodule.training.rng import Generators, generator_for, per_example_generators, seeded
from sdmodule.training.tuning import check_scratch, choose_tuning
from sdmodule.training.validation import validation_losses


class StableDiffusionModule(LightningModule):
    """Fine-tune a Stable Diffusion checkpoint, and sample from it.

    Args:
        pretrained: ``tiny``, a diffusers folder, a hub id, or a ``.safetensors``/``.ckpt`` file of the original layout.
        revision: branch, tag or commit of a hub id.
        variant: which weights of a folder or hub id, such as ``fp16``.
        components: another place for a part, by its name.
        scratch: parts that start from random weights.
        tuning: what is trained, by its ``kind``: ``full``, ``lora`` and the others of ``tuning.settings``.
        caption_dropout: share of captions replaced by an empty one, which teaches the unconditional prediction that
            classifier-free guidance needs.
        timestep_shift: prefers noisy timesteps where greater than 1; see ``draw_timesteps``.
        objective: what is predicted and how its error counts; see ``Objective``.
        task: ``text2image`` or ``inpaint``.
        convert: for ``inpaint``, widen an ordinary UNet to the mask's channels when training starts.
        whole_masks: for ``inpaint``, share of training images that are masked whole.
        prior_weight: for DreamBooth, how much images of the kind count beside those of the thing.
        hole_weight: for ``inpaint``, how many times the loss in the hole counts that of the same area around it.
        sampling: how images are sampled (steps, guidance and the rest); see ``SamplingSettings``.
        tome: token merging in sampling; see ``TokenMerging``.
        tomesd_cfg: another name for ``tome``.
        speed: means of sampling faster; see ``SpeedSettings``.
        inpaint: how masked images are repainted; see ``InpaintSettings``.
        adapters: what to sample with beside the checkpoint, ``[{"path": file, "scale": 0.8}]``; see ``ChosenAdapter``.
        controlnet: a ControlNet to sample with: a folder or a hub id.
        control_scale: how much it counts.
        merge_adapters: add adapters to the weights instead of beside them: faster, and equal but for rounding.
        optimizer: takes the trainable parameters and returns the optimizer.
        lr_scheduler: takes the optimizer and returns the schedule of its learning rate, stepped every step.
        compile: what ``torch.compile`` compiles of the UNet: ``none``, ``blocks`` (each by itself) or ``whole``.
        checkpointing: what of the UNet's activations is computed again in the backward pass instead of being kept:
            ``none``, ``outer`` (the blocks of full resolution) or ``all``.
        seed: seed of timesteps, noise and caption dropout.

    Raises:
        SettingsError: when the checkpoint or a setting cannot be used.
    """

    def __init__(
        self,
        pretrained: str = "tiny",
        *,
        revision: str | None = None,
        variant: str | None = None,
        components: Mapping[str, str] | None = None,
        scratch: Iterable[str] = (),
        tuning: Mapping[str, Any] | None = None,
        caption_dropout: float = 0.1,
        timestep_shift: float = 1.0,
        objective: Mapping[str, Any] | None = None,
        task: str = TEXT2IMAGE,
        convert: bool = False,
        whole_masks: float = 0.25,
        hole_weight: float = 1.0,
        prior_weight: float = 1.0,
        sampling: Mapping[str, Any] | None = None,
        tome: Mapping[str, Any] | None = None,
        tomesd_cfg: Mapping[str, Any] | None = None,
        speed: Mapping[str, Any] | None = None,
        inpaint: Mapping[str, Any] | None = None,
        adapters: Sequence[Mapping[str, Any]] | None = None,
        merge_adapters: bool = False,
        controlnet: str | None = None,
        control_scale: float = 1.0,
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
        lr_scheduler: Callable[..., Any] | None = None,
        compile: str = "none",
        checkpointing: str = "none",
        seed: int = 0,
    ) -> None:
        super().__init__()
        pretrained = shorten_home(pretrained)
        controlnet = shorten_home(controlnet) if controlnet else None
        components = {name: shorten_home(place) for name, place in (components or {}).items() if place}
        self.adapters = parse_adapters(adapters)
        adapters = [{"path": shorten_home(one.path), "scale": one.scale} for one in self.adapters]
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler", "scratch", "compile", "checkpointing"])
        if task not in TASKS:
            raise SettingsError(f"model={task} is not known; give one of {choices(TASKS)}.")
        self.task = task
        self.holes = InpaintTraining(convert, whole_masks, hole_weight)
        if task != INPAINT and self.holes != InpaintTraining():
            raise SettingsError(
                f"{self.holes} was given and model={task} has no holes; use model=inpaint, or leave it out."
            )
        check_prior_weight(prior_weight)
        check_whole("model.seed", seed, least=0)
        check_compile(compile)
        check_flag("merge_adapters", merge_adapters)
        if not is_number(caption_dropout) or not 0 <= caption_dropout <= 1:
            raise SettingsError(f"model.caption_dropout={caption_dropout} is not allowed; give a share from 0 to 1.")
        if not is_number(timestep_shift) or timestep_shift <= 0:
            raise SettingsError(f"model.timestep_shift={timestep_shift} is not allowed; give a number over 0.")
        self.sampling = SamplingSettings(
            **(sampling or {}),
            merging=choose_merging(tome, tomesd_cfg),
            inpaint=InpaintSettings(**(inpaint or {})),
            control_scale=control_scale,
            speed=choose_speed(speed),
        )
        check_inpaint_settings(self.sampling.inpaint, task)
        self.objective = Objective(**(objective or {}))
        self.tuning = choose_tuning(tuning)
        check_scratch(self.tuning, scratch)
        parts = load_components(pretrained, revision=revision, variant=variant, components=components, scratch=scratch)
        self.base_model = BaseModel(parts, scratch)
        if changes := self.objective.schedule(parts.scheduler.config):
            parts.scheduler = make_scheduler({"name": "ddim", **changes}, parts.scheduler.config)
        check_settings(parts, self.sampling)
        if is_inpaint_unet(parts.unet) and task != INPAINT:
            raise SettingsError(f"pretrained={pretrained} inpaints: its UNet takes a mask; use model=inpaint.")
        use_adapters(parts, self.adapters, merge_adapters)
        if controlnet:
            parts.controlnet = load_controlnet(controlnet, parts)
        self.tuning.prepare(parts, seed)
        self.parts = parts
        self.unet: Any = parts.unet
        self.vae: Any = parts.vae.eval().requires_grad_(False)
        self.text_encoder: Any = parts.text_encoder
        self.controlnet: Any = parts.controlnet
        self.prior_weight = prior_weight
        self.caption_dropout = caption_dropout
        self.timestep_shift = timestep_shift
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.seed = seed
        self.on_step: Callable[[int, Tensor], None] | None = None  # told of every denoising step of ``predict_step``
        self._prepared = ExitStack()  # what is switched for a whole run of the trainer
        self.full_precision_weights: Callable[[], AbstractContextManager[None]] = (
            nullcontext  # set while some are in 16 bits
        )
        self.cached_embeddings: CachedEmbeddings | None = None  # set by the cache while a training goes on
        self.val_log_suffix = ""  # end of the names under which validation is logged; set where it is of other weights
        self.strict_loading = False  # checkpoints hold the trained weights alone
        checkpoint_blocks(self.unet, checkpointing)
        compile_unet(self.unet, compile)

    @classmethod
    def from_pretrained(cls, pretrained: str = "tiny", **settings: Any) -> Self:
        """Load a checkpoint for sampling or training; ``settings`` are those of the constructor."""
        return cls(pretrained, **settings)  # modes are set by what it is used for

    # ---------------------------------------------------------------------------------------------- training

    @override
    def setup(self, stage: str) -> None:
        if stage != "fit":
            return
        if self.adapters or self.hparams["controlnet"]:
            raise SettingsError("adapters and controlnet are for sampling; train on the checkpoint alone.")
        check_training_precision(self._trainer)
        if self._trainer is not None and isinstance(self.tuning, LoraTuning):
            self.tuning.check_strategy(self._trainer.strategy)
        steps = self._trainer.max_steps if self._trainer is not None else None
        check_optimizer(self.optimizer, self.lr_scheduler, self.parameter_groups, steps)
        self.base_model.identify()
        if self.task == INPAINT and not is_inpaint_unet(self.unet):
            trained = "unet" in self.tuning.from_scratch
            self.holes.check(self.unet, self.parts.source, trained, self.tuning.kind)
            convert_to_inpaint(self.unet)

    @override
    def on_fit_start(self) -> None:
        if self.device.type == "cpu":
            self._prepared.enter_context(retain_freed_memory())
        if self.device.type == "cpu" and "bf16" in str(self.trainer.precision):
            self._prepared.enter_context(plain_attention(self.text_encoder, self.unet, self.controlnet))

    @override
    def on_fit_end(self) -> None:
        self._prepared.close()

    @override
    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        prior = batch.get("prior")  # of DreamBooth's pairs
        generators = per_example_generators(
            self.seed, len(batch["caption"]), batch_idx, self._trainer, pairs=prior is not None
        )
        latents = self.encode_images(batch, generators)
        total = len(self.alphas_cumprod)
        timesteps = torch.cat([draw_timesteps(1, total, each, self.timestep_shift) for each in generators])
        captions = [
            "" if torch.rand((), generator=each) < self.caption_dropout else text
            for each, text in zip(generators, batch["caption"], strict=True)
        ]
        channels = self.mask_channels(batch, generators, self.holes.whole_masks) if self.task == INPAINT else None
        noise = self.objective.draw_noise(latents, generators)
        dropout = generator_for(self.seed, self.global_step, batch_idx, self.global_rank)
        with seeded(dropout, self.device):
            errors = self.denoising_errors(
                latents, noise, timesteps.to(self.device), captions, channels, self.objective, self.control(batch)
            )
        losses = per_example_loss(errors, self.spatial_loss_weights(batch, errors, channels))
        loss = losses.mean() if prior is None else prior_preservation_loss(losses, prior, self.prior_weight)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(latents))
        return loss

    def denoising_errors(
        self,
        latents: Tensor,
        noise: tuple[Tensor, Tensor],
        timesteps: Tensor,
        captions: Sequence[str],
        channels: Tensor | None = None,
        objective: Objective = SQUARED_ERROR,
        control: ControlGuide | None = None,
    ) -> Tensor:
        """Error of the UNet's prediction at each place (algorithm 1 of Ho et al. 2020), ``[B, 1, h, w]``.

        Args:
            latents: of the images, ``[B, 4, h, w]``.
            noise: what is to be predicted and what is seen; see ``Objective.draw_noise``.
            timesteps: how noisy each is made, ``[B]``.
            captions: B texts; parentheses weigh nothing in them.
            channels: what a UNet that inpaints sees beside the noisy latents, ``[B, 5, h, w]``.
            objective: how the error counts.
            control: the ControlNet with its images.
        """
        predictable, visible = noise
        kind = self.parts.scheduler.config.prediction_type
        noisy = add_noise(latents, visible, self.alphas_cumprod, timesteps)
        wanted = target(kind, latents, predictable, self.alphas_cumprod, timesteps)
        seen = noisy if channels is None else torch.cat([noisy, channels], dim=1)
        embeddings = self.encode_prompts([escape_prompt(caption) for caption in captions])
        residuals = {} if control is None else control.residuals(seen, timesteps, embeddings)
        predicted = self.unet(seen, timesteps, encoder_hidden_states=embeddings, **residuals).sample
        return objective.errors(predicted, wanted, kind, self.alphas_cumprod, timesteps)

    control = control  # functions of their own file, like `infer`
    spatial_loss_weights = spatial_loss_weights
    mask_channels = mask_channels

    @torch.no_grad()
    def encode_moments(self, image: Tensor) -> Tensor:
        """Mean and standard deviation of the latents of images ``[B, 3, H, W]`` in [-1, 1]: ``[B, 8, h, w]``."""
        posterior = self.vae.encode(image.to(self.vae.dtype)).latent_dist
        return torch.cat([posterior.mean, posterior.std], dim=1).float()

    def encode_images(self, batch: Mapping[str, Any], generator: Generators) -> Tensor:
        """Latents of a batch, ``[B, 4, h, w]``, drawn anew each time from its moments, cached or computed."""
        moments = batch["moments"].float() if "moments" in batch else self.encode_moments(batch["image"])
        mean, deviation = moments.chunk(2, dim=1)
        noise = randn_tensor(mean.shape, generator=generator).to(mean)
        return (mean + deviation * noise) * self.vae.config.scaling_factor

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """What the UNet is told of prompts: ``[B, chunks * 77, D]``, cached or computed."""
        if self.cached_embeddings is not None and all(prompt in self.cached_embeddings for prompt in prompts):
            return self.cached_embeddings(prompts).to(self.device)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.text_encoder_learns):
            return encode_prompts(prompts, self.parts.tokenizer, self.text_encoder)

    @override
    def on_validation_start(self) -> None:
        # Compiled for training alone: to compile for validation's shapes too takes longer than validation does.
        torch.compiler.set_stance("force_eager")

    @override
    def on_validation_end(self) -> None:
        torch.compiler.set_stance("default")

    @override
    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        losses = validation_losses(self, batch, batch_idx)
        named = {f"val/{name}{self.val_log_suffix}": loss for name, loss in losses.items()}
        whole = f"val/loss{self.val_log_suffix}"
        size = len(batch["caption"])
        self.log(whole, named.pop(whole), prog_bar=not self.val_log_suffix, sync_dist=True, batch_size=size)
        self.log_dict(named, sync_dist=True, batch_size=size)

    @property
    def text_encoder_learns(self) -> bool:
        """Whether gradients reach the text encoder at this step."""
        # Among several devices they must, even if they are thrown away: all of them wait for all gradients.
        return self.tuning.text_encoder_learns(self.global_step) or (
            self._trainer is not None and self._trainer.world_size > 1 and self.tuning.text_encoder_learns(0)
        )

    @override
    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if not self.tuning.text_encoder_learns(self.global_step):
            for weight in self.text_encoder.parameters():
                weight.grad = None

    @property
    def parameter_groups(self) -> list[Any]:
        """What is trained, for the optimizer."""
        return parameter_groups(self, self.text_encoder, self.tuning.text_encoder_lr)

    @override
    def configure_optimizers(self) -> Any:
        precision = str(self._trainer.precision) if self._trainer is not None else ""
        optimizer = build_optimizer(self.optimizer, self.parameter_groups, precision)
        if self.lr_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.lr_scheduler(optimizer), "interval": "step"}}

    @property
    def resolution(self) -> int:
        """Side in pixels of the images that the checkpoint was made for."""
        return self.unet.config.sample_size * self.parts.pixels_per_latent

    @property
    def alphas_cumprod(self) -> Tensor:
        """The signal's share of the variance at each timestep of the training schedule, ``[T]``."""
        return self.parts.scheduler.alphas_cumprod

    # ---------------------------------------------------------------------------------------------- sampling

    infer = infer  # a function of its own file, with its arguments and what they mean

    @override
    def on_predict_start(self) -> None:
        self._prepared.enter_context(speed_applied(self.parts, self.sampling.speed))

    @override
    def on_predict_end(self) -> None:
        self._prepared.close()

    @override
    def predict_step(self, batch: list[SampleRequest], batch_idx: int) -> Samples:
        """Sample the images of a batch of requests; writing them is the callbacks' work."""
        samples = sample_all(self.parts, batch, self.sampling, on_step=self.on_step)
        samples.metadata |= self.origin
        return samples

    def describe(self) -> dict[str, Any]:
        """The settings of the images that ``predict_step`` makes, in plain types."""
        return describe(self.parts, self.sampling, self.task == INPAINT) | self.origin

    @property
    def origin(self) -> dict[str, Any]:
        """What was said of the checkpoint beside its name."""
        names = ("revision", "variant", "components", "adapters", "merge_adapters", "controlnet")
        return {name: self.hparams[name] for name in names if self.hparams[name]}

    # ---------------------------------------------------------------------------------------------- files

    save_pretrained = save_pretrained
    on_save_checkpoint = on_save_checkpoint
    on_load_checkpoint = on_load_checkpoint
    load_state_dict = load_state_dict
