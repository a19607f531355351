"""A training step of Stable Diffusion XL equals that of diffusers' scripts: same loss, same gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, ControlNetModel, DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from sdmodule.module import StableDiffusionModule
from sdmodule.training.rng import per_example_generators
from tests.training.conftest import drawn
from tests.training.test_parity import EXACT, relative, step

PRIOR_WEIGHT = 0.7
UNET_LAYERS, TEXT_LAYERS = ["to_q", "to_k", "to_v", "to_out.0"], ["q_proj", "k_proj", "v_proj", "out_proj"]
ENCODERS = {
    "none": ({}, ()),
    "both": ({"text_encoder": True}, ("text_encoder", "text_encoder_2")),
    "first": ({"text_encoder": True, "text_encoder_2": False}, ("text_encoder",)),
    "second": ({"text_encoder_2": True}, ("text_encoder_2",)),
}


class PlainXL:
    """The parts of a checkpoint and the training step of diffusers' SDXL scripts."""

    def __init__(self, checkpoint: Path) -> None:
        self.unet = UNet2DConditionModel.from_pretrained(checkpoint, subfolder="unet").requires_grad_(False)
        self.vae = AutoencoderKL.from_pretrained(checkpoint, subfolder="vae").requires_grad_(False)
        self.text_encoder = CLIPTextModel.from_pretrained(checkpoint, subfolder="text_encoder").requires_grad_(False)
        self.text_encoder_2 = CLIPTextModelWithProjection.from_pretrained(
            checkpoint, subfolder="text_encoder_2"
        ).requires_grad_(False)
        self.tokenizers = [CLIPTokenizer.from_pretrained(checkpoint / name) for name in ("tokenizer", "tokenizer_2")]
        self.scheduler = DDPMScheduler.from_pretrained(checkpoint, subfolder="scheduler")

    def text(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        states = []
        for tokenizer, encoder in zip(self.tokenizers, (self.text_encoder, self.text_encoder_2), strict=True):
            ids = tokenizer(captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
            output = encoder(ids.input_ids, output_hidden_states=True)
            states.append(output.hidden_states[-2])
        return torch.cat(states, dim=-1), output[0]

    def loss(self, batch: dict[str, Any], draws: dict[str, Tensor], controlnet: Any = None) -> Tensor:
        with torch.no_grad():
            posterior = self.vae.encode(batch["image"]).latent_dist
            latents = (posterior.mean + posterior.std * draws["latents"]) * self.vae.config.scaling_factor
        noisy = self.scheduler.add_noise(latents, draws["noise"], draws["timesteps"])
        states, pooled = self.text(batch["caption"])
        target = torch.tensor(batch["image"].shape[-2:]).expand(len(latents), 2)
        time_ids = torch.cat([batch["original_size"], batch["crop_top_left"], target], dim=1)
        told = {"encoder_hidden_states": states, "added_cond_kwargs": {"text_embeds": pooled, "time_ids": time_ids}}
        residuals = {}
        if controlnet is not None:
            down, middle = controlnet(
                noisy, draws["timesteps"], controlnet_cond=batch["conditioning"], return_dict=False, **told
            )
            residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        predicted = self.unet(noisy, draws["timesteps"], **told, **residuals).sample
        if "prior" not in batch:
            return F.mse_loss(predicted, draws["noise"])
        (ours, prior), (noise, prior_noise) = predicted.chunk(2), draws["noise"].chunk(2)
        return F.mse_loss(ours, noise) + PRIOR_WEIGHT * F.mse_loss(prior, prior_noise)


@pytest.fixture
def batch(batch: dict[str, Any]) -> dict[str, Any]:
    sizes = {"original_size": torch.tensor([[90, 70], [32, 48]]), "crop_top_left": torch.tensor([[5, 0], [0, 8]])}
    return {**batch, **sizes}


def assert_equal_steps(
    module: StableDiffusionModule, batch: dict[str, Any], theirs: Tensor, *networks: tuple[nn.Module, nn.Module]
) -> None:
    ours = step(module, batch)
    theirs.backward()
    torch.testing.assert_close(ours, theirs.detach(), **EXACT)
    for our_network, their_network in networks:
        mine, others = (dict(network.named_parameters()) for network in (our_network, their_network))
        learning = {name: weight.grad for name, weight in others.items() if weight.grad is not None}
        assert {name for name, weight in mine.items() if weight.requires_grad} == learning.keys() != set()
        largest = max(float(gradient.norm()) for gradient in learning.values())
        for name, gradient in learning.items():
            if gradient.norm() > 1e-6 * largest:  # a gradient that is only rounding error has no direction
                assert relative(mine[name].grad, gradient) <= 1e-6, name


@pytest.mark.parametrize("which", ENCODERS)
def test_a_full_training_step_equals_diffusers(xl_checkpoint, batch, draws, which):
    settings, trained = ENCODERS[which]
    objective = {"caption_dropout": 0.0}
    module = StableDiffusionModule(str(xl_checkpoint), tuning={"kind": "full", **settings}, objective=objective)
    plain = PlainXL(xl_checkpoint)
    networks = [(getattr(module, name), getattr(plain, name).requires_grad_(True)) for name in ("unet", *trained)]
    assert_equal_steps(module, batch, plain.loss(batch, draws), *networks)


@pytest.mark.parametrize("prior", [False, True], ids=["captions", "dreambooth"])
def test_a_lora_training_step_equals_peft(xl_checkpoint, batch, prior):
    tuning = {"kind": "lora", "rank": 4, "alpha": 8, "text_encoder": True}
    objective = {"caption_dropout": 0.0, "prior_weight": PRIOR_WEIGHT}
    module = StableDiffusionModule(str(xl_checkpoint), tuning=tuning, objective=objective)
    draws = drawn(per_example_generators(0, 2, 0, None, pairs=prior))
    if prior:
        batch = {**batch, "prior": torch.tensor([False, True])}
    plain = PlainXL(xl_checkpoint)
    generator = torch.Generator().manual_seed(2)
    networks = [(getattr(module, name), getattr(plain, name)) for name in ("unet", "text_encoder", "text_encoder_2")]
    for ours, theirs in networks:
        layers = UNET_LAYERS if theirs is plain.unet else TEXT_LAYERS
        theirs.add_adapter(LoraConfig(r=4, lora_alpha=8, init_lora_weights="gaussian", target_modules=layers))
        others = dict(theirs.named_parameters())
        for name, weight in ours.named_parameters():
            if "lora_" in name:  # as after some steps; at first half of the gradients are zero
                weight.data = 0.1 * torch.randn(weight.shape, generator=generator)
                others[name].data = weight.data.clone()
    assert_equal_steps(module, batch, plain.loss(batch, draws), *networks)


def test_a_controlnet_training_step_equals_diffusers(xl_checkpoint, batch, draws):
    tuning = {"kind": "controlnet"}
    module = StableDiffusionModule(str(xl_checkpoint), tuning=tuning, objective={"caption_dropout": 0.0})
    plain = PlainXL(xl_checkpoint)
    controlnet = ControlNetModel.from_unet(plain.unet, conditioning_embedding_out_channels=(16, 32, 96))
    generator = torch.Generator().manual_seed(2)
    for weight in module.controlnet.parameters():
        weight.data += 0.02 * torch.randn(weight.shape, generator=generator)
    controlnet.load_state_dict(module.controlnet.state_dict())
    theirs = plain.loss(batch, draws, controlnet.requires_grad_(True))
    assert_equal_steps(module, batch, theirs, (module.controlnet, controlnet))


@pytest.mark.parametrize("zeroed", [True, False])
def test_a_dropped_caption_is_what_the_checkpoint_says_of_empty_prompts(xl_checkpoint, zeroed):
    module = StableDiffusionModule(str(xl_checkpoint))
    module.parts.zero_empty_prompts = zeroed
    states, pooled = PlainXL(xl_checkpoint).text(["", "a star"])
    with torch.no_grad():
        ours = module.encode_captions(["", "a star"])
    for mine, theirs in ((ours.hidden_states, states), (ours.pooled, pooled)):
        torch.testing.assert_close(mine[1], theirs[1])
        torch.testing.assert_close(mine[0], torch.zeros_like(mine[0]) if zeroed else theirs[0])
