"""A training step equals that of plain diffusers and peft: same loss, same gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, ControlNetModel, DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from sdmodule.module import StableDiffusionModule

EXACT = {"rtol": 1e-6, "atol": 1e-8}


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-12))


class Plain:
    """The parts of a checkpoint and the training step as in diffusers' example scripts."""

    def __init__(self, checkpoint: Path) -> None:
        self.unet = UNet2DConditionModel.from_pretrained(checkpoint, subfolder="unet").requires_grad_(False)
        self.vae = AutoencoderKL.from_pretrained(checkpoint, subfolder="vae")
        self.text_encoder = CLIPTextModel.from_pretrained(checkpoint, subfolder="text_encoder").requires_grad_(False)
        self.tokenizer = CLIPTokenizer.from_pretrained(checkpoint, subfolder="tokenizer")
        self.scheduler = DDPMScheduler.from_pretrained(checkpoint, subfolder="scheduler")

    def loss(self, batch: dict[str, Any], draws: dict[str, Tensor], controlnet: Any = None) -> Tensor:
        with torch.no_grad():
            posterior = self.vae.encode(batch["image"]).latent_dist
            latents = (posterior.mean + posterior.std * draws["latents"]) * self.vae.config.scaling_factor
        noisy = self.scheduler.add_noise(latents, draws["noise"], draws["timesteps"])
        ids = self.tokenizer(
            batch["caption"], padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        ).input_ids
        states = self.text_encoder(ids)[0]
        residuals = {}
        if controlnet is not None:
            down, middle = controlnet(
                noisy, draws["timesteps"], states, controlnet_cond=batch["conditioning"], return_dict=False
            )
            residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        predicted = self.unet(noisy, draws["timesteps"], states, **residuals).sample
        return F.mse_loss(predicted, draws["noise"])


def step(module: StableDiffusionModule, batch: dict[str, Any]) -> Tensor:
    loss = module.training_step(batch, 0)
    loss.backward()
    return loss.detach()


def assert_equal_gradients(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    mine = {name: weight.grad for name, weight in ours.named_parameters() if weight.requires_grad}
    others = {name: weight.grad for name, weight in theirs.named_parameters() if weight.requires_grad}
    assert mine.keys() == others.keys() and mine
    largest = max(float(gradient.norm()) for gradient in others.values())
    for name, gradient in others.items():
        if gradient.norm() > 1e-6 * largest:  # a gradient that is only rounding error has no direction
            assert relative(mine[name], gradient) <= 1e-6, name


@pytest.mark.parametrize("text_encoder", [False, True], ids=["unet", "unet and text encoder"])
def test_a_full_training_step_equals_diffusers(checkpoint, batch, draws, text_encoder):
    tuning = {"kind": "full", "text_encoder": text_encoder}
    module = StableDiffusionModule(str(checkpoint), tuning=tuning, objective={"caption_dropout": 0.0})
    plain = Plain(checkpoint)
    plain.unet.requires_grad_(True)
    plain.text_encoder.requires_grad_(text_encoder)
    ours, theirs = step(module, batch), plain.loss(batch, draws)
    theirs.backward()
    torch.testing.assert_close(ours, theirs.detach(), **EXACT)
    assert_equal_gradients(module.unet, plain.unet)
    if text_encoder:
        assert_equal_gradients(module.text_encoder, plain.text_encoder)


def test_a_lora_training_step_equals_peft(checkpoint, batch, draws):
    tuning = {"kind": "lora", "rank": 4, "alpha": 8, "text_encoder": True}
    module = StableDiffusionModule(str(checkpoint), tuning=tuning, objective={"caption_dropout": 0.0})
    plain = Plain(checkpoint)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    plain.unet.add_adapter(LoraConfig(r=4, lora_alpha=8, init_lora_weights="gaussian", target_modules=targets))
    targets = ["q_proj", "k_proj", "v_proj", "out_proj"]
    plain.text_encoder.add_adapter(LoraConfig(r=4, lora_alpha=8, init_lora_weights="gaussian", target_modules=targets))
    generator = torch.Generator().manual_seed(2)
    for ours, theirs in ((module.unet, plain.unet), (module.text_encoder, plain.text_encoder)):
        others = dict(theirs.named_parameters())
        for name, weight in ours.named_parameters():
            if weight.requires_grad:  # as after some steps; at first half of the gradients are zero
                weight.data = 0.1 * torch.randn(weight.shape, generator=generator)
                others[name].data = weight.data.clone()
    ours, theirs = step(module, batch), plain.loss(batch, draws)
    theirs.backward()
    torch.testing.assert_close(ours, theirs.detach(), **EXACT)
    assert_equal_gradients(module.unet, plain.unet)
    assert_equal_gradients(module.text_encoder, plain.text_encoder)


def test_a_controlnet_training_step_equals_diffusers(checkpoint, batch, draws):
    module = StableDiffusionModule(str(checkpoint), tuning={"kind": "controlnet"}, objective={"caption_dropout": 0.0})
    plain = Plain(checkpoint)
    controlnet = ControlNetModel.from_unet(plain.unet, conditioning_embedding_out_channels=(16, 32, 96))
    untouched = controlnet.state_dict()
    for name, value in module.controlnet.state_dict().items():
        copied = "cond_embedding" not in name and "controlnet_" not in name
        assert not copied or torch.equal(value, untouched[name]), f"{name} starts as the UNet's"
    generator = torch.Generator().manual_seed(2)
    for weight in module.controlnet.parameters():
        weight.data += 0.02 * torch.randn(weight.shape, generator=generator)
    controlnet.load_state_dict(module.controlnet.state_dict())
    ours, theirs = step(module, batch), plain.loss(batch, draws, controlnet.requires_grad_(True))
    theirs.backward()
    torch.testing.assert_close(ours, theirs.detach(), **EXACT)
    assert_equal_gradients(module.controlnet, controlnet)
    assert not any(weight.requires_grad for weight in module.unet.parameters())
