"""The shipped configurations and tokenizer are those of the published models."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdmodule.components.shipped_configs import CONFIGS, CONV_IN, load_clip_tokenizer, load_tokenizer, predicts_noise
from sdmodule.components.single_file import SingleFile, _shipped_config
from sdmodule.families.recognize import recognize_weights


@pytest.mark.parametrize(
    ("channels", "width", "prediction_type", "name"),
    [
        (4, 768, None, "sd1"),
        (9, 768, None, "sd1_inpaint"),
        (4, 1024, "epsilon", "sd2"),
        (4, 1024, "v_prediction", "sd2_v"),
        (9, 1024, None, "sd2_inpaint"),
        (4, 2048, None, "sdxl"),
        (9, 2048, None, "sdxl_inpaint"),
    ],
)
def test_the_configuration_follows_from_shapes(
    channels: int, width: int, prediction_type: str | None, name: str
) -> None:
    prefix = "model.diffusion_model."
    weights = {
        f"{prefix}{CONV_IN}": torch.empty(320, channels, 3, 3, device="meta"),
        f"{prefix}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": torch.empty(320, width),
    }
    if width == 2048:
        weights[f"{prefix}label_emb.0.0.weight"] = torch.empty(1)
    file = SingleFile(Path("file"), weights, recognize_weights(weights, "file"), {})
    assert _shipped_config(file, prediction_type) == CONFIGS / name


def test_the_prediction_type_is_measured_at_the_last_timestep() -> None:
    """The best predictors for images of Gaussian pixels are known in closed form."""
    torch.manual_seed(1)
    scheduler = DDIMScheduler.from_config(DDIMScheduler.load_config(CONFIGS / "sd2", subfolder="scheduler"))
    signal = scheduler.alphas_cumprod[999].sqrt()

    def image(latents: Tensor) -> Tensor:
        return 0.3 + 0.8 * signal * latents  # mean 0.3, and hardly visible through the noise

    def noise(latents: Tensor) -> Tensor:
        return (latents - signal * image(latents)) / (1 - signal**2).sqrt()

    def velocity(latents: Tensor) -> Tensor:
        return signal * noise(latents) - (1 - signal**2).sqrt() * image(latents) + 0.3 * torch.randn_like(latents)

    for function, expected in ((noise, True), (velocity, False)):
        unet = lambda x, t, encoder_hidden_states, f=function: SimpleNamespace(sample=f(x))  # noqa: E731
        assert predicts_noise(unet, 4, 1024) is expected


CLIP_L, OPEN_CLIP_H, OPEN_CLIP_G = 123_060_480, 340_387_840, 694_659_840


@pytest.mark.parametrize(
    ("name", "unet_size", "text_sizes"),
    [
        ("sd1", 859_520_964, [CLIP_L]),
        ("sd1_inpaint", 859_535_364, [CLIP_L]),
        ("sd2", 865_910_724, [OPEN_CLIP_H]),
        ("sd2_v", 865_910_724, [OPEN_CLIP_H]),
        ("sd2_inpaint", 865_925_124, [OPEN_CLIP_H]),
        ("sdxl", 2_567_463_684, [CLIP_L, OPEN_CLIP_G]),
        ("sdxl_inpaint", 2_567_478_084, [CLIP_L, OPEN_CLIP_G]),
        ("sdxl_refiner", 2_259_526_660, [OPEN_CLIP_G]),
    ],
)
def test_shipped_configurations_have_the_published_numbers_of_weights(
    name: str, unet_size: int, text_sizes: list[int]
) -> None:
    folder = CONFIGS / name
    with torch.device("meta"):
        networks: list[torch.nn.Module] = [
            UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder, subfolder="unet")),
            AutoencoderKL.from_config(AutoencoderKL.load_config(folder, subfolder="vae")),
        ]
        for kind, part in ((CLIPTextModel, "text_encoder"), (CLIPTextModelWithProjection, "text_encoder_2")):
            if (folder / part).is_dir():
                networks.append(kind(CLIPTextConfig.from_pretrained(folder / part)))
    sizes = [sum(weight.numel() for weight in network.parameters()) for network in networks]
    assert sizes == [unet_size, 83_653_863, *text_sizes]
    scheduler = DDIMScheduler.from_config(DDIMScheduler.load_config(folder, subfolder="scheduler"))
    assert scheduler.config.prediction_type == ("v_prediction" if name == "sd2_v" else "epsilon")
    assert scheduler.alphas_cumprod[-1].item() == pytest.approx(0.00466, abs=1e-5)


def test_the_clip_tokenizer_gives_the_published_ids() -> None:
    tokenizer = load_clip_tokenizer()
    assert len(tokenizer) == 49_408
    assert tokenizer("A photo of a CAT").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    padded = load_clip_tokenizer("!")("a cat", padding="max_length").input_ids
    assert padded == [49406, 320, 2368, 49407] + [0] * 73


def test_the_second_encoder_of_xl_pads_as_openclip_does() -> None:
    pads = [
        load_tokenizer(CONFIGS / "sdxl", tokenizer, encoder).pad_token_id
        for tokenizer, encoder in (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2"))
    ]
    assert pads == [49407, 0]
