"""Stable Diffusion as one LightningModule: it trains, it validates, it samples.

The algorithms are those of Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models":
an autoencoder turns a picture into latents; a UNet, told the prompt by cross-attention, learns to take noise out of
noisy latents; sampling starts from noise alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, Self

import torch
from diffusers.models.attention_processor import AttnProcessor
from diffusers.utils.torch_utils import randn_tensor
from lightning import LightningModule
from torch import Tensor
from typing_extensions import override

from sdmodule.checkpoint_files import check_weights
from sdmodule.compiling import compile_blocks
from sdmodule.components import load_components, save_components
from sdmodule.conditioning.canvas import InpaintSettings
from sdmodule.conditioning.inpaint import HoleTraining, convert_to_inpaint, inpaints, mask_channels, masked
from sdmodule.conditioning.random_masks import draw_masks
from sdmodule.conditioning.text import encode_prompts
from sdmodule.data.cached import CachedEmbeddings
from sdmodule.diffusion.objective import add_noise, draw_timesteps, target, weighted_mean
from sdmodule.draws import Draws, generator_at, generators_of_examples
from sdmodule.errors import SettingsError, choices
from sdmodule.modes import evaluating
from sdmodule.objective import SQUARED_ERROR, Objective
from sdmodule.privacy import shortened
from sdmodule.progress import steps_bar
from sdmodule.requests import INPAINT, TASKS, TEXT2IMAGE, SampleRequest, build_requests
from sdmodule.samples import Samples
from sdmodule.sampling import check_settings, describe, sample_all
from sdmodule.schedulers import make_scheduler
from sdmodule.settings import SamplingSettings
from sdmodule.tome.settings import choose_merging

UNCHANGED = InpaintSettings()

VALIDATION_RANGES = 4
"""Equal ranges of timesteps, in the middle of each of which every validation picture is tried."""


class StableDiffusionModule(LightningModule):
    """Fine-tune a Stable Diffusion checkpoint, and sample from it.

    Args:
        pretrained: ``tiny``, a diffusers folder, a hub id, or a ``.safetensors``/``.ckpt`` file of the original layout.
        revision: branch, tag or commit of a hub id.
        variant: which weights of a folder or hub id, such as ``fp16``.
        components: another place for a part, by its name.
        scratch: parts that start from random weights.
        train_text_encoder: train the text encoder together with the UNet.
        caption_dropout: share of captions replaced by an empty one, which teaches the unconditional prediction that
            classifier-free guidance needs.
        timestep_shift: prefers noisy timesteps where greater than 1; see ``draw_timesteps``.
        objective: what is predicted and how its error counts; see ``Objective``.
        task: ``text2image`` or ``inpaint``.
        convert: for ``inpaint``, widen an ordinary UNet to the mask's channels when training starts.
        whole_masks: for ``inpaint``, share of training pictures that are masked whole.
        hole_weight: for ``inpaint``, how many times the loss in the hole counts that of the same area around it.
        sampling: how pictures are sampled (steps, guidance and the rest); see ``SamplingSettings``.
        tome: token merging in sampling; see ``TokenMerging``.
        tomesd_cfg: another name for ``tome``.
        inpaint: how masked pictures are repainted; see ``InpaintSettings``.
        optimizer: takes the trainable parameters and returns the optimizer.
        lr_scheduler: takes the optimizer and returns the schedule of its learning rate, stepped every step.
        compile: compile the UNet's blocks with ``torch.compile``.
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
        train_text_encoder: bool = False,
        caption_dropout: float = 0.1,
        timestep_shift: float = 1.0,
        objective: Mapping[str, Any] | None = None,
        task: str = TEXT2IMAGE,
        convert: bool = False,
        whole_masks: float = 0.25,
        hole_weight: float = 1.0,
        sampling: Mapping[str, Any] | None = None,
        tome: Mapping[str, Any] | None = None,
        tomesd_cfg: Mapping[str, Any] | None = None,
        inpaint: Mapping[str, Any] | None = None,
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
        lr_scheduler: Callable[..., Any] | None = None,
        compile: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        pretrained = shortened(pretrained)
        components = {name: shortened(place) for name, place in (components or {}).items() if place}
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler", "scratch", "compile"])
        if task not in TASKS:
            raise SettingsError(f"model={task} is not known; give one of {choices(TASKS)}.")
        self.task = task
        self.holes = HoleTraining(convert, whole_masks, hole_weight)
        if task != INPAINT and self.holes != HoleTraining():
            raise SettingsError(
                f"{self.holes} was given and model={task} has no holes; use model=inpaint, or leave it out."
            )
        self.sampling = SamplingSettings(
            **(sampling or {}), merging=choose_merging(tome, tomesd_cfg), inpaint=InpaintSettings(**(inpaint or {}))
        )
        self._check_inpaint(self.sampling.inpaint)
        self.objective = Objective(**(objective or {}))
        trained = {"unet", "text_encoder"} if train_text_encoder else {"unet"}
        if untrained := set(scratch) - trained:
            raise SettingsError(
                f"scratch={choices(untrained)} would stay random: only {choices(trained)} is trained; "
                "leave it out, or set model.train_text_encoder=true for the text encoder."
            )
        parts = load_components(pretrained, revision=revision, variant=variant, components=components, scratch=scratch)
        if changes := self.objective.schedule(parts.scheduler.config):
            parts.scheduler = make_scheduler({"name": "ddim", **changes}, parts.scheduler.config)
        check_settings(parts, self.sampling)
        if inpaints(parts.unet) and task != INPAINT:
            raise SettingsError(f"pretrained={pretrained} inpaints: its UNet takes a mask; use model=inpaint.")
        self.parts = parts
        self.unet: Any = parts.unet
        self.vae: Any = parts.vae.eval().requires_grad_(False)
        self.text_encoder: Any = parts.text_encoder.train(train_text_encoder).requires_grad_(train_text_encoder)
        self.train_text_encoder = train_text_encoder
        self.caption_dropout = caption_dropout
        self.timestep_shift = timestep_shift
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.seed = seed
        self.on_step: Callable[[int, Tensor], None] | None = None  # told of every denoising step of ``predict_step``
        self.cached_embeddings: CachedEmbeddings | None = None  # set by the cache while a training goes on
        self.strict_loading = False  # checkpoints hold the trained weights alone
        if compile:
            compile_blocks(self.unet)

    @classmethod
    def from_pretrained(cls, pretrained: str = "tiny", **settings: Any) -> Self:
        """Load a checkpoint for sampling or training; ``settings`` are those of the constructor."""
        return cls(pretrained, **settings).eval()

    # ---------------------------------------------------------------------------------------------- training

    @override
    def setup(self, stage: str) -> None:
        if stage != "fit" or self.task != INPAINT or inpaints(self.unet):
            return
        if not self.holes.convert:
            raise SettingsError(
                f"the UNet of pretrained={self.parts.source} takes {self.unet.config.in_channels} channels and not the "
                "mask's, which training to inpaint needs; set model.convert=true to widen it, or give an inpainting "
                "checkpoint."
            )
        convert_to_inpaint(self.unet)

    @override
    def on_fit_start(self) -> None:
        if self.device.type == "cpu":
            # The backward pass of torch's fused attention takes four times as long on CPU as plain products do.
            self.unet.set_attn_processor(AttnProcessor())
            self.text_encoder.set_attn_implementation("eager")

    @override
    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        generators = generators_of_examples(self.seed, len(batch["caption"]), batch_idx, self._trainer)
        latents = self.encode_images(batch, generators)
        total = len(self.alphas_cumprod)
        timesteps = torch.cat([draw_timesteps(1, total, each, self.timestep_shift) for each in generators])
        captions = [
            "" if torch.rand((), generator=each) < self.caption_dropout else text
            for each, text in zip(generators, batch["caption"], strict=True)
        ]
        channels = self.mask_channels(batch, generators, self.holes.whole_masks) if self.task == INPAINT else None
        noise = self.objective.draw_noise(latents, generators)
        errors = self.denoising_errors(latents, noise, timesteps.to(self.device), captions, channels, self.objective)
        loss = weighted_mean(errors, self.weights_of_places(batch, errors, channels))
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
    ) -> Tensor:
        """Error of the UNet's prediction at each place (algorithm 1 of Ho et al. 2020), ``[B, 1, h, w]``.

        Args:
            latents: of the pictures, ``[B, 4, h, w]``.
            noise: what is to be predicted and what is seen; see ``Objective.draw_noise``.
            timesteps: how noisy each is made, ``[B]``.
            captions: B texts.
            channels: what a UNet that inpaints sees beside the noisy latents, ``[B, 5, h, w]``.
            objective: how the error counts.
        """
        predictable, visible = noise
        kind = self.parts.scheduler.config.prediction_type
        noisy = add_noise(latents, visible, self.alphas_cumprod, timesteps)
        wanted = target(kind, latents, predictable, self.alphas_cumprod, timesteps)
        seen = noisy if channels is None else torch.cat([noisy, channels], dim=1)
        predicted = self.unet(seen, timesteps, encoder_hidden_states=self.encode_prompts(captions)).sample
        return objective.errors(predicted, wanted, kind, self.alphas_cumprod, timesteps)

    def weights_of_places(self, batch: Mapping[str, Any], errors: Tensor, channels: Tensor | None) -> Tensor:
        """How much the error of each place counts, ``[B, 1, h, w]``: that of a hole, that outside a mask."""
        weights = torch.ones_like(errors)
        if channels is not None:
            weights = weights + (self.holes.hole_weight - 1.0) * channels[:, :1]
        return self.objective.masking(weights, batch.get("mask"))

    def mask_channels(self, batch: Mapping[str, Any], generator: Draws, whole: float) -> Tensor:
        """The mask of each picture and the latents of what it leaves, ``[B, 5, h, w]``.

        Masks are the batch's own, ``mask`` ``[B, 1, H, W]``, or else drawn, a share ``whole`` of them of everything.
        """
        images = batch["image"]
        masks = batch.get("mask")
        if masks is None:
            masks = draw_masks(len(images), images.shape[-2:], whole, generator)
        masks = masks.to(images)
        return mask_channels(masks, self.encode_images({"image": masked(images, masks)}, generator))

    @torch.no_grad()
    def encode_moments(self, image: Tensor) -> Tensor:
        """Mean and standard deviation of the latents of pictures ``[B, 3, H, W]`` in [-1, 1]: ``[B, 8, h, w]``."""
        posterior = self.vae.encode(image.to(self.vae.dtype)).latent_dist
        return torch.cat([posterior.mean, posterior.std], dim=1).float()

    def encode_images(self, batch: Mapping[str, Any], generator: Draws) -> Tensor:
        """Latents of a batch, ``[B, 4, h, w]``, drawn anew each time from its moments, cached or computed."""
        moments = batch["moments"].float() if "moments" in batch else self.encode_moments(batch["image"])
        mean, deviation = moments.chunk(2, dim=1)
        noise = randn_tensor(mean.shape, generator=generator).to(mean)
        return (mean + deviation * noise) * self.vae.config.scaling_factor

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """What the UNet is told of prompts: ``[B, chunks * 77, D]``, cached or computed."""
        if self.cached_embeddings is not None and all(prompt in self.cached_embeddings for prompt in prompts):
            return self.cached_embeddings(prompts).to(self.device)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.train_text_encoder):
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
        generator = generator_at(self.seed, 0, batch_idx, self.global_rank)
        latents = self.encode_images(batch, generator)
        channels = self.mask_channels(batch, generator, whole=0.0) if self.task == INPAINT else None
        width = len(self.alphas_cumprod) // VALIDATION_RANGES
        levels, losses = [], {}
        for start in range(0, width * VALIDATION_RANGES, width):
            timesteps = torch.full((len(latents),), start + width // 2, device=self.device)
            noise = SQUARED_ERROR.draw_noise(latents, generator)
            levels.append(self.denoising_errors(latents, noise, timesteps, batch["caption"], channels))
            losses[f"val/loss_{start}_{start + width - 1}"] = levels[-1].mean()
        errors = torch.stack(levels).mean(dim=0)
        self.log("val/loss", errors.mean(), prog_bar=True, sync_dist=True, batch_size=len(latents))
        if channels is not None:
            hole = channels[:, :1]
            losses["val/loss_hole"] = (errors * hole).sum() / hole.sum().clamp(min=1)
            losses["val/loss_kept"] = (errors * (1 - hole)).sum() / (1 - hole).sum().clamp(min=1)
        self.log_dict(losses, sync_dist=True, batch_size=len(latents))

    @override
    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer([p for p in self.parameters() if p.requires_grad])
        if self.lr_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.lr_scheduler(optimizer), "interval": "step"}}

    @property
    def alphas_cumprod(self) -> Tensor:
        """The signal's share of the variance at each timestep of the training schedule, ``[T]``."""
        return self.parts.scheduler.alphas_cumprod

    # ---------------------------------------------------------------------------------------------- sampling

    def infer(
        self,
        prompt: str | Sequence[str],
        image: Any = None,
        mask: Any = None,
        *,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        seed: int = 0,
        scheduler: str | Mapping[str, Any] | None = None,
        inpaint: Mapping[str, Any] | None = None,
        tome: Mapping[str, Any] | None = None,
        return_type: Literal["image", "numpy", "tensor"] = "image",
        show_progress: bool = True,
    ) -> dict[str, Any]:
        """Sample pictures.

        Settings left out are those of the module's ``sampling``; if nothing was said, 50 steps and the checkpoint's
        own guidance: 2 for the embedded model, 7.5 for any that names none.

        Args:
            prompt: one prompt or several; of any length, with ``(words:1.3)`` to weigh words.
            image: for ``task="inpaint"``, the picture to repaint: a path, a PIL image, an array or a tensor, or a list.
            mask: where: white in a picture of the same size, a box ``[x0, y0, x1, y1]``, ``"alpha"``, or a list.
            height: pixels, a multiple of the autoencoder's factor.
            width: pixels, likewise.
            num_inference_steps: denoising steps.
            guidance_scale: strength of classifier-free guidance; 1 or less is none.
            guidance_rescale: share of the correction of guidance's overexposure.
            negative_prompt: what to keep away from: one for all prompts, or one for each.
            num_images_per_prompt: pictures of each prompt.
            eta: share of DDPM noise in DDIM, 0 to 1.
            generator: source of all noise instead of ``seed``: one for all pictures, or one for each.
            latents: initial noise instead of the seed's, ``[pictures, 4, height / factor, width / factor]``.
            seed: picture k is drawn from ``seed + k``.
            scheduler: name or settings of a scheduler.
            inpaint: strength, mask_blur, only_masked and padding; see ``InpaintSettings``.
            tome: token merging, ``{"ratio": 0}`` for none; see ``TokenMerging``.
            return_type: ``image`` for PIL, ``numpy`` for ``[B, H, W, 3]``, ``tensor`` for ``[B, 3, H, W]``; in [0, 1].
            show_progress: show a bar of the steps, in a terminal.

        Returns:
            ``samples``, all pictures of the first prompt first; ``seeds`` and ``prompts`` beside them; ``seconds`` of
            the stages text, denoise and decode; and ``facts``, the settings in plain types.

        Raises:
            SettingsError: for an input that cannot be used.
        """
        settings = self.sampling.updated(
            height=height,
            width=width,
            steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            eta=eta,
            scheduler=scheduler,
            inpaint=replace(self.sampling.inpaint, **(inpaint or {})),
            merging=None if tome is None else choose_merging(tome),
        )
        self._check_inpaint(settings.inpaint)
        requests = build_requests(
            prompt, None, negative_prompt, num_images_per_prompt, seed, image=image, mask=mask, task=self.task
        )
        with evaluating(self), steps_bar(settings.steps_taken, show_progress) as on_step:
            samples = sample_all(self.parts, requests, settings, noise=latents, generator=generator, on_step=on_step)
        return {
            "samples": samples.converted(return_type),
            "prompts": [r.prompt for r in requests],
            "seeds": [r.seed for r in requests],
            "seconds": samples.seconds,
            "facts": samples.facts,
        }

    def _check_inpaint(self, settings: InpaintSettings) -> None:
        """Settings of inpainting mean nothing to a model that makes pictures from text: refuse them."""
        changed = [f"{name}={value}" for name, value in asdict(settings).items() if value != getattr(UNCHANGED, name)]
        if changed and self.task == TEXT2IMAGE:
            raise SettingsError(
                f"{', '.join(changed)} was given and model=text2image repaints nothing; use model=inpaint, or leave "
                "it out."
            )

    @override
    def predict_step(self, batch: list[SampleRequest], batch_idx: int) -> Samples:
        """Sample the pictures of a batch of requests; writing them is the callbacks' work."""
        samples = sample_all(self.parts, batch, self.sampling, on_step=self.on_step)
        samples.facts |= self.origin
        return samples

    def describe(self) -> dict[str, Any]:
        """The settings of the pictures that ``predict_step`` makes, in plain types."""
        return describe(self.parts, self.sampling, self.task == INPAINT) | self.origin

    @property
    def origin(self) -> dict[str, Any]:
        """What was said of the checkpoint beside its name."""
        return {name: self.hparams[name] for name in ("revision", "variant", "components") if self.hparams[name]}

    # ---------------------------------------------------------------------------------------------- files

    def save_pretrained(self, folder: str | Path, dtype: str = "float32") -> None:
        """Write a folder that ``StableDiffusionPipeline.from_pretrained`` loads, its weights as ``dtype``."""
        save_components(self.parts, folder, dtype)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what is trained; the frozen parts are in the base model, whose name is kept instead."""
        kept = {name for name, value in self.named_parameters() if value.requires_grad}
        checkpoint["state_dict"] = {name: v for name, v in checkpoint["state_dict"].items() if name in kept}
        checkpoint["base_model"] = self.parts.source

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trained_on = checkpoint.get("base_model")
        if shortened(str(trained_on)) != self.parts.source:
            raise SettingsError(
                f"the checkpoint was trained on pretrained={trained_on} and this run has "
                f"pretrained={self.parts.source}; give pretrained={trained_on}."
            )
        if self.holes.convert and not inpaints(self.unet):  # loaded without a trainer, which would have set it up
            convert_to_inpaint(self.unet)
        check_weights(checkpoint["state_dict"], self)
