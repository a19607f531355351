"""Training a VAE, the first stage of a latent diffusion model (Rombach et al. 2022, section 3.1)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from typing_extensions import override

from sdmodule.components.checkpoint import load_part
from sdmodule.components.save import save_part
from sdmodule.components.write_single_file import save_single_vae
from sdmodule.diffusion.upload import upload
from sdmodule.errors import SettingsError, check_bool, check_number, check_seed
from sdmodule.io.redact import shorten_home
from sdmodule.training.full import FullTuning
from sdmodule.training.optimizers import Optimization
from sdmodule.training.rng import Generators, per_example_generators
from sdmodule.training.strategies import check_strategy
from sdmodule.training.trainable import TrainableModule
from sdmodule.training.tuning import check_layout, choose_tuning


class AutoencoderModule(TrainableModule):
    """Train an ``AutoencoderKL`` from scratch or from a checkpoint.

    The loss is the squared error, a share of the absolute error and of that of the differences between neighbouring
    pixels, which keep edges sharp, and a slight pull of the latents towards a standard normal distribution (Kingma and
    Welling 2014, equation 3).

    Args:
        pretrained: ``tiny``, a diffusers folder or a hub id; its ``vae`` gives the architecture.
        scratch: names the parts that start from random weights (here: ``["vae"]`` or nothing).
        tuning: only ``full`` is possible.
        l1_weight: weight of the absolute error.
        edge_weight: weight of the absolute error of the differences between neighbouring pixels.
        kl_weight: weight of the divergence from a standard normal distribution, per latent value.
        decoder_only: keep the encoder, and with it the latents, as they are, so that UNets trained on them still fit.
        optimizer: takes the trainable parameters and returns the optimizer.
        lr_scheduler: takes the optimizer and returns its learning rate schedule.
        seed: seed of the noise that latents are drawn with.

    Raises:
        SettingsError: for another tuning, a value out of range, and a decoder that would learn from a random encoder.
    """

    needs_captions = False
    layouts = ("diffusers", "single_file")

    def __init__(
        self,
        pretrained: str = "tiny",
        scratch: Iterable[str] = (),
        tuning: Mapping[str, Any] | None = None,
        l1_weight: float = 0.1,
        edge_weight: float = 0.0,
        kl_weight: float = 1e-6,
        decoder_only: bool = False,
        optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        lr_scheduler: Callable[..., Any] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if choose_tuning(tuning) != FullTuning():
            raise SettingsError(f"tuning={tuning}: is for UNets, and model=autoencoder has none; leave it out.")
        for name, weight in {"l1": l1_weight, "edge": edge_weight, "kl": kl_weight}.items():
            check_number(f"model.{name}_weight", weight, minimum=0)
        check_seed("model.seed", seed)
        check_bool("model.decoder_only", decoder_only)
        if decoder_only and "vae" in scratch:
            raise SettingsError("model.decoder_only=true: keeps the encoder, but scratch=[vae] draws it at random.")
        pretrained = shorten_home(pretrained)
        self.save_hyperparameters("pretrained", "l1_weight", "edge_weight", "kl_weight", "decoder_only", "seed")
        self.vae = load_part("vae", pretrained, scratch="vae" in scratch)
        self.decoder_only = decoder_only
        if decoder_only:
            self.vae.encoder.requires_grad_(False)
            if self.vae.quant_conv is not None:
                self.vae.quant_conv.requires_grad_(False)
        self.optimization = Optimization(optimizer, lr_scheduler, usual={"lr": 1e-4})
        self.seed = seed
        self.latent_variance: float | None = None  # of the last validation

    @property
    def resolution(self) -> int:
        """Side in pixels of the images that the checkpoint was made for."""
        return self.vae.config.sample_size

    def losses(self, image: Tensor, generators: Generators) -> dict[str, Tensor]:
        """Squared, absolute, edges' and KL error of the reconstruction of ``image`` ``[B, 3, H, W]``, each a mean."""
        posterior = self.vae.encode(image).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        noise = upload(randn_tensor(mean.shape, generator=generators), mean.device)
        latents = mean + torch.exp(0.5 * logvar) * noise.to(mean)
        reconstruction = self.vae.decode(latents).sample.float()
        return {
            "mse": F.mse_loss(reconstruction, image),
            "l1": F.l1_loss(reconstruction, image),
            "edge": edge_error(reconstruction - image),
            "kl": 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean(),
        }

    @override
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        batch = self.read_batch(batch, batch_idx)
        generators = per_example_generators(self.seed, len(batch["image"]), batch_idx, self._trainer)
        losses = self.losses(batch["image"], generators)
        parts = (self.hparams[f"{name}_weight"] * losses[name] for name in ("l1", "edge", "kl"))
        loss = sum(parts, losses["mse"])
        self.log_training("loss", loss)
        self.log_training("psnr", _psnr(losses["mse"]))
        return self.weighted(loss, len(batch["image"]))

    @override
    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        batch, size = self.validation_batch(batch, batch_idx, dataloader_idx)
        posterior = self.vae.encode(batch["image"]).latent_dist
        reconstruction = self.vae.decode(posterior.mode()).sample.float().clamp(-1, 1)
        errors = (reconstruction - batch["image"]).square().mean(dim=(1, 2, 3))
        found = {"psnr": _psnr(errors).mean(), "latent_variance": posterior.mode().float().square().mean()}
        self.log_validation(found, main="psnr", batch_size=size)

    @override
    def on_validation_epoch_end(self) -> None:
        variance = self.trainer.callback_metrics.get("val/latent_variance")
        self.latent_variance = None if variance is None else float(variance)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["latent_variance"] = self.latent_variance

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.latent_variance = checkpoint.get("latent_variance")

    @override
    def setup(self, stage: str) -> None:
        check_strategy(self._trainer)
        if stage == "fit":
            self.check_fit()

    def save_pretrained(self, folder: str | Path, dtype: str = "float32", layout: str = "diffusers") -> None:
        """Write ``folder/vae``, its scaling factor set so that the latents seen in validation have unit variance.

        That of an encoder that was kept is kept too.

        With ``layout="single_file"`` the weights are in ``folder/vae.safetensors``, in the original layout.
        """
        check_layout(self, layout)
        if self.latent_variance is not None and not self.decoder_only:
            self.vae.register_to_config(scaling_factor=self.latent_variance**-0.5)
        if layout == "single_file":
            save_single_vae(self.vae, folder, dtype)
        else:
            save_part("vae", self.vae, folder, dtype)


def edge_error(error: Tensor) -> Tensor:
    """Mean absolute difference between neighbouring values of ``error`` ``[B, 3, H, W]``, along both axes."""
    return 0.5 * (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean())


def _psnr(mean_squared_error: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in decibels, for images in [-1, 1]."""
    return 10.0 * torch.log10(4.0 / mean_squared_error.detach())
