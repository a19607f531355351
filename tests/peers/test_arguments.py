"""Arguments of diffusers' pipelines have the same effect here, to the bit; `docs/sampling.md` has their table."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLAdapterPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    T2IAdapter,
)
from diffusers.models.embeddings import IPAdapterPlusImageProjection
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from sdmodule.components.controlnet import controlnet_from_unet
from sdmodule.components.save import save_components, save_model
from sdmodule.components.schedulers import make_scheduler
from sdmodule.components.write_single_file import save_single_file
from sdmodule.errors import SettingsError
from sdmodule.module import StableDiffusionModule
from tests.pipelines import diffusers_pipeline
from tests.reported.drawing import ramp
from tests.xl_parts import tiny_refiner_parts, xl_pipeline

pytestmark = pytest.mark.slow

PROMPT, OTHER = "a red circle on a blue background", "a small green star"
FREEU = {"s1": 0.9, "s2": 0.2, "b1": 1.2, "b2": 1.4}


def ours(module: StableDiffusionModule, prompt: Any = PROMPT, **options: Any) -> Any:
    common = {"num_inference_steps": 3, "return_type": "numpy", "show_progress": False, "scheduler": "euler"}
    return module.infer(prompt, generator=torch.Generator().manual_seed(1), **common | options)["samples"]


def theirs(pipeline: Any, prompt: Any = PROMPT, scheduler: str = "euler", **options: Any) -> Any:
    pipeline.scheduler = make_scheduler(scheduler, pipeline.scheduler.config)
    common = {"num_inference_steps": 3, "output_type": "np"}
    return pipeline(prompt, generator=torch.Generator().manual_seed(1), **common | options).images


@pytest.fixture(scope="module")
def sd(checkpoint):
    module = StableDiffusionModule.from_pretrained(checkpoint)
    return module, diffusers_pipeline(module.parts)


@pytest.fixture(scope="module")
def xl(xl_checkpoint):
    return StableDiffusionModule.from_pretrained(xl_checkpoint), xl_pipeline(xl_checkpoint)


@pytest.fixture(params=["1.x", "XL"])
def either(request, sd, xl):
    return sd if request.param == "1.x" else xl


# ------------------------------------------------------------------------------------------------------------- text


def test_clip_skip(either):
    module, pipeline = either
    clip_skip, encoder = 1, pipeline.text_encoder
    if not hasattr(encoder, "text_model"):  # diffusers 0.42 looks there for the LayerNorm, transformers 5 has no more
        object.__setattr__(encoder, "text_model", encoder)
    made = ours(module, clip_skip=clip_skip, negative_prompt=OTHER)
    assert np.array_equal(made, theirs(pipeline, clip_skip=clip_skip, negative_prompt=OTHER))
    assert not np.array_equal(made, ours(module, negative_prompt=OTHER))
    with pytest.raises(SettingsError, match=r"clip_skip=99: the text encoder has \d+ layers"):
        ours(module, clip_skip=99)


def test_prompt_embeds(either):
    module, pipeline = either
    names = ["prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
    encoded = pipeline.encode_prompt(
        PROMPT, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True, negative_prompt=OTHER
    )
    given = dict(zip(names, encoded, strict=False))
    assert np.array_equal(ours(module, None, **given), theirs(pipeline, None, **given))
    assert np.array_equal(ours(module, None, **given), ours(module, negative_prompt=OTHER))
    positive = {name: value for name, value in given.items() if not name.startswith("negative")}
    assert np.array_equal(ours(module, None, **positive), theirs(pipeline, None, **positive))
    twice = ours(module, None, num_images_per_prompt=2, **given)
    assert np.array_equal(twice, theirs(pipeline, None, num_images_per_prompt=2, **given))


def test_prompt_embeds_that_do_not_fit(sd, xl):
    wide, narrow = torch.zeros(1, 77, 80), torch.zeros(1, 77, 7)
    for module, options, words in (
        (xl[0], {"prompt_embeds": wide}, "needs pooled_prompt_embeds beside it"),
        (xl[0], {"prompt_embeds": narrow}, r"have shape \(1, 77, 7\); give \[images, tokens, 80\]"),
        (xl[0], {"negative_prompt_embeds": wide}, "needs prompt_embeds beside it"),
        (sd[0], {"prompt_embeds": narrow}, r"have shape \(1, 77, 7\)"),
    ):
        with pytest.raises(SettingsError, match=words):
            ours(module, None, **options)
    with pytest.raises(SettingsError, match="prompt, prompt_embeds: exclude each other"):
        ours(xl[0], prompt_embeds=wide, pooled_prompt_embeds=torch.zeros(1, 24))


def test_prompt_2(xl, sd):
    module, pipeline = xl
    given = {"prompt_2": OTHER, "negative_prompt": "blue", "negative_prompt_2": "red"}
    made = ours(module, **given)
    assert np.array_equal(made, theirs(pipeline, **given))
    assert not np.array_equal(made, ours(module, negative_prompt="blue"))
    with pytest.raises(SettingsError, match=r"prompt_2: is for a second text encoder, and Stable Diffusion 1.x"):
        ours(sd[0], prompt_2=OTHER)


def test_micro_conditions(xl, sd):
    module, pipeline = xl
    sizes = {"original_size": (64, 48), "target_size": (32, 40)}
    negative = {"negative_original_size": (16, 16), "negative_target_size": (24, 24)}
    crop, negative_crop = (3, 5), (7, 9)
    made = ours(module, **sizes, **negative, crop_top_left=crop, negative_crop_top_left=negative_crop)
    crops = {"crops_coords_top_left": crop, "negative_crops_coords_top_left": negative_crop}
    assert np.array_equal(made, theirs(pipeline, **sizes, **negative, **crops))
    assert not np.array_equal(made, ours(module))
    for bad in ((0, 32), (32,), (32, 2.5), "32", (32, 10**6)):
        with pytest.raises(SettingsError, match=r"original_size=.*: must be height and width in pixels"):
            ours(module, original_size=bad)
    with pytest.raises(SettingsError, match=r"original_size: no effect with Stable Diffusion 1.x and 2.x"):
        ours(sd[0], original_size=(32, 32))


# --------------------------------------------------------------------------------------------------------- schedule


def test_timesteps_and_sigmas(either):
    module, pipeline = either
    timesteps = {"timesteps": [900, 500, 20]}
    assert np.array_equal(ours(module, scheduler="ddpm", **timesteps), theirs(pipeline, scheduler="ddpm", **timesteps))
    sigmas = {"sigmas": [12.0, 3.0, 0.5]}
    assert np.array_equal(ours(module, **sigmas), theirs(pipeline, **sigmas))
    for options, words in (
        ({"timesteps": [20, 500]}, "must decrease"),
        ({"timesteps": []}, "must be whole numbers"),
        ({"sigmas": [1.0], "timesteps": [1]}, "exclude each other"),
        ({"sigmas": [1.0], "scheduler": "ddim"}, "DDIMScheduler does not take them"),
        ({"timesteps": [5000], "scheduler": "ddpm"}, "DDPMScheduler says"),
    ):
        with pytest.raises(SettingsError, match=words):
            ours(module, **options)


@pytest.mark.parametrize("scheduler", ["euler", "ddim", "heun", "dpmpp_2m"])
def test_a_model_goes_on_where_another_stopped(xl_checkpoint, xl, scheduler):
    module, pipeline = xl
    latents = ours(module, denoising_end=0.6, return_type="latent", scheduler=scheduler, num_inference_steps=5)
    made = theirs(pipeline, denoising_end=0.6, output_type="latent", scheduler=scheduler, num_inference_steps=5)
    assert torch.equal(latents, made)
    second = StableDiffusionModule.from_pretrained(xl_checkpoint, task="image2image")
    common = {"denoising_start": 0.6, "num_inference_steps": 5, "scheduler": scheduler, "image": latents}
    with pytest.raises(SettingsError, match=r"denoising_start=0.6: needs the latents"):
        ours(module, denoising_start=0.6)
    with pytest.raises(SettingsError, match=r"denoising_start=0.6, denoising_end=0.5: the start must be before"):
        ours(module, denoising_start=0.6, denoising_end=0.5)
    again = xl_pipeline(xl_checkpoint, kind=StableDiffusionXLImg2ImgPipeline)
    assert np.array_equal(ours(second, **common), theirs(again, **common))


@pytest.fixture(scope="module")
def refiner(xl, tmp_path_factory):
    folder = tmp_path_factory.mktemp("refiner")
    torch.manual_seed(0)
    save_components(tiny_refiner_parts(xl[0].parts), folder)
    return folder


@pytest.mark.parametrize("scheduler", ["euler", "unipc"])
def test_the_refiner(xl_checkpoint, xl, refiner, scheduler):
    base = xl[1]
    module = StableDiffusionModule.from_pretrained(
        xl_checkpoint, components={"refiner": refiner}, sampling={"refiner_start": 0.6}
    )
    common = {"scheduler": scheduler, "num_inference_steps": 6, "negative_prompt": OTHER}
    generator = torch.Generator().manual_seed(1)
    made = module.infer(PROMPT, generator=generator, return_type="numpy", show_progress=False, **common)["samples"]
    latents = theirs(base, denoising_end=0.6, output_type="latent", **common)
    second = xl_pipeline(refiner, kind=StableDiffusionXLImg2ImgPipeline)
    expected = theirs(second, denoising_start=0.6, image=latents, **common)
    assert np.array_equal(made, expected)


def test_a_refiner_goes_on_after_a_controlnet_and_takes_no_embeddings(xl_checkpoint, xl, refiner, tmp_path):
    save_model(controlnet_from_unet(xl[0].parts), tmp_path / "net")
    places = {"refiner": refiner, "controlnet": tmp_path / "net"}
    module = StableDiffusionModule.from_pretrained(xl_checkpoint, components=places)
    plain = StableDiffusionModule.from_pretrained(xl_checkpoint, components={"refiner": refiner})
    guided = ours(module, control=ramp(1, (32, 32)), num_inference_steps=5)  # by a ControlNet that adds nothing yet
    assert np.array_equal(guided, ours(plain, num_inference_steps=5))
    given = {"prompt_embeds": torch.zeros(1, 77, 80), "pooled_prompt_embeds": torch.zeros(1, 24)}
    with pytest.raises(SettingsError, match="prompt_embeds: are not those that the refiner attends to"):
        ours(plain, None, **given)


def test_a_refiner_from_a_single_file(xl_checkpoint, refiner, monkeypatch, tmp_path):
    """Its layout is that of the base model with one text encoder, whose configuration ships with the package."""
    samples = {}
    base = StableDiffusionModule.from_pretrained(xl_checkpoint, components={"refiner": refiner})
    parts = replace(base.parts.refiner, scheduler=base.parts.scheduler)
    save_single_file(parts, tmp_path)
    monkeypatch.setattr(type(parts.family), "original_configs", {(4, 48): "."})
    monkeypatch.setattr("sdmodule.components.shipped_configs.CONFIGS", refiner)
    for name, place in (("folder", refiner), ("file", tmp_path / "model.safetensors")):
        module = StableDiffusionModule.from_pretrained(xl_checkpoint, components={"refiner": place})
        samples[name] = ours(module, num_inference_steps=5)
    assert np.array_equal(samples["folder"], samples["file"])


def test_a_refiner_is_no_base_and_has_one(checkpoint, xl_checkpoint, refiner):
    for pretrained, components, words in (
        (refiner, {}, "is a refiner, which samples only after another model; give refiner="),
        (checkpoint, {"refiner": refiner}, "is the refiner of Stable Diffusion XL, and pretrained="),
        (xl_checkpoint, {"refiner": xl_checkpoint}, "is a checkpoint of Stable Diffusion XL; give one of a refiner"),
    ):
        with pytest.raises(SettingsError, match=words):
            StableDiffusionModule.from_pretrained(pretrained, components=components)


# ---------------------------------------------------------------------------------------------- the rest of a step


def test_freeu(either):
    module, pipeline = either
    plain = ours(module)
    made = ours(module, freeu=FREEU)
    pipeline.enable_freeu(**FREEU)
    expected = theirs(pipeline)
    pipeline.disable_freeu()
    assert np.array_equal(made, expected) and not np.array_equal(made, plain)
    assert np.array_equal(plain, ours(module))
    for freeu, words in (({"s3": 1}, "freeu.s3: unknown"), (FREEU | {"b1": -1}, "freeu.b1=-1")):
        with pytest.raises(SettingsError, match=words):
            ours(module, freeu=freeu)
    with pytest.raises(SettingsError, match=r"freeu: works on layers that speed.cache_every leaves out"):
        ours(module, freeu=FREEU, speed={"cache_every": 2})


def test_callback_on_step_end(either):
    module, pipeline = either
    seen = []

    def dimmed(step, latents):
        seen.append(step)
        return latents * 0.9 if step == 2 else None

    def dimmed_there(pipeline, step, timestep, tensors):
        return {"latents": tensors["latents"] * 0.9} if step == 1 else tensors

    made = ours(module, callback_on_step_end=dimmed)
    assert seen == [1, 2, 3]
    assert np.array_equal(made, theirs(pipeline, callback_on_step_end=dimmed_there))


@pytest.mark.parametrize("output", ["latent", "tensor"])
def test_output_type(either, output):
    module, pipeline = either
    expected = theirs(pipeline, output_type={"tensor": "pt"}.get(output, output))
    assert torch.equal(ours(module, return_type=output), expected)


# ------------------------------------------------------------------------------------------------------- ControlNets


@pytest.fixture(scope="module", params=["1.x", "XL"])
def controlled(request, checkpoint, xl_checkpoint, tmp_path_factory):
    """A module with two ControlNets, its pipeline, and the folders of the ControlNets."""
    pretrained = checkpoint if request.param == "1.x" else xl_checkpoint
    parts = StableDiffusionModule.from_pretrained(pretrained).parts
    folders = []
    for seed in (0, 1):
        net = controlnet_from_unet(parts)
        generator = torch.Generator().manual_seed(seed)
        for weight in net.parameters():
            weight.data += 0.05 * torch.randn(weight.shape, generator=generator)
        folders.append(tmp_path_factory.mktemp("net"))
        save_model(net, folders[-1])
    module = StableDiffusionModule.from_pretrained(pretrained, components={"controlnet": folders})
    nets = list(module.parts.controlnets)
    if request.param == "XL":
        pipeline = xl_pipeline(pretrained, kind=StableDiffusionXLControlNetPipeline, controlnet=nets)
    else:
        pipeline = diffusers_pipeline(module.parts, StableDiffusionControlNetPipeline, controlnet=nets)
    return module, pipeline, folders


@pytest.mark.parametrize("guess_mode", [False, True])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_several_controlnets(controlled, guess_mode, guidance):
    module, pipeline, _ = controlled
    controls = [ramp(1, (32, 32)), ramp(2, (32, 32))]
    common = {"control_guidance_start": [0.0, 0.3], "control_guidance_end": [0.7, 1.0], "guess_mode": guess_mode}
    common |= {"num_inference_steps": 4, "guidance_scale": guidance, "height": 32, "width": 32}
    made = ours(module, control=controls, control_scale=[0.8, 0.5], **common)
    expected = theirs(pipeline, image=controls, controlnet_conditioning_scale=[0.8, 0.5], **common)
    assert np.array_equal(made, expected)


def test_control_settings_that_do_not_fit(controlled, checkpoint):
    module, _, folders = controlled
    controls = [ramp(1, (32, 32)), ramp(2, (32, 32))]
    for options, words in (
        ({"control": controls[0]}, "control: one image for 2 ControlNets"),
        ({"control": controls, "control_scale": [1, 1, 1]}, "control_scale: 3 numbers for 2 ControlNets"),
        ({"control": controls, "control_guidance_start": 0.5, "control_guidance_end": 0.5}, "must be before the end"),
        ({"control": controls, "control_guidance_start": 2}, "control_guidance_start=2: must be a number"),
        ({}, "controlnet: needs a control image"),
    ):
        with pytest.raises(SettingsError, match=words):
            ours(module, **options)
    if module.parts.family.takes_sizes:
        with pytest.raises(SettingsError, match=r"takes more than text|give one for Stable Diffusion 1.x"):
            StableDiffusionModule.from_pretrained(checkpoint, components={"controlnet": folders[0]})


@pytest.mark.parametrize("family", ["1.x", "XL"])
def test_a_t2i_adapter(checkpoint, xl_checkpoint, tmp_path, family):
    xl = family == "XL"
    pretrained = xl_checkpoint if xl else checkpoint
    widths = StableDiffusionModule.from_pretrained(pretrained).parts.unet.config.block_out_channels
    torch.manual_seed(0)
    kind = "full_adapter_xl" if xl else "full_adapter"
    channels = [*widths, widths[-1], widths[-1]][:4]
    adapter = T2IAdapter(3, channels, num_res_blocks=1, downscale_factor=8 if xl else 4, adapter_type=kind)
    save_model(adapter, tmp_path / "adapter")
    module = StableDiffusionModule.from_pretrained(pretrained, components={"controlnet": tmp_path / "adapter"})
    control = ramp(2, (32, 32))
    common = {"height": 32, "width": 32, "num_inference_steps": 4}
    settings = {"control": control, "control_scale": 0.7, "control_guidance_end": 0.5 if xl else 1.0}
    made = ours(module, return_type="latent", **settings, **common)  # that pipeline of 1.x rounds otherwise to decode
    given = {"image": control, "adapter_conditioning_scale": 0.7} | ({"adapter_conditioning_factor": 0.5} if xl else {})
    if xl:
        pipeline = xl_pipeline(pretrained, kind=StableDiffusionXLAdapterPipeline, adapter=adapter)
    else:
        pipeline = diffusers_pipeline(module.parts, StableDiffusionAdapterPipeline, adapter=adapter)
    assert torch.equal(made, theirs(pipeline, output_type="latent", **given, **common))
    other = checkpoint if xl else xl_checkpoint
    with pytest.raises(SettingsError, match=r"controlnet=.*: block_out_channels is"):
        StableDiffusionModule.from_pretrained(other, components={"controlnet": tmp_path / "adapter"})


# ------------------------------------------------------------------------------------------------------- IP-Adapter


def ip_adapter(parts: Any, folder: Path, plus: bool) -> Path:
    """An IP-Adapter with random weights and its image encoder, in the layout of the released ones."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, projection_dim=20
    )
    vision.image_size, vision.patch_size = 32, 8
    CLIPVisionModelWithProjection(vision).save_pretrained(folder / "image_encoder")
    width = parts.unet.config.cross_attention_dim
    if plus:
        layer = IPAdapterPlusImageProjection(embed_dims=24, output_dims=width, hidden_dims=64, heads=1, num_queries=4)
        projection = {name.replace("to_out.0", "to_out"): value for name, value in layer.state_dict().items()}
    else:
        shapes = {
            "proj.weight": (4 * width, 20),
            "proj.bias": (4 * width,),
            "norm.weight": (width,),
            "norm.bias": (width,),
        }
        projection = {name: torch.randn(shape) for name, shape in shapes.items()}
    weights = {f"image_proj.{name}": value for name, value in projection.items()}
    names = [name for name in parts.unet.attn_processors if "attn2" in name]
    for k, name in enumerate(names):
        layer = parts.unet.get_submodule(name.removesuffix(".processor"))
        for part in ("k", "v"):
            weights[f"ip_adapter.{2 * k + 1}.to_{part}_ip.weight"] = 0.5 * torch.randn(layer.to_k.out_features, width)
    save_file(weights, folder / "ip-adapter.safetensors")
    return folder / "ip-adapter.safetensors"


@pytest.mark.parametrize("plus", [False, True])
def test_an_ip_adapter(either, tmp_path, plus):
    pretrained = either[0].parts.source
    file = ip_adapter(either[0].parts, tmp_path, plus)
    module = StableDiffusionModule.from_pretrained(pretrained, components={"ip_adapter": file})
    plain = ours(either[0], negative_prompt=OTHER)
    images = [ramp(1, (40, 40)), ramp(2, (50, 30))]
    made = {
        count: ours(module, ip_adapter_image=images[:count], ip_adapter_scale=0.7, negative_prompt=OTHER)
        for count in (1, 2)
    }
    xl = module.parts.family.takes_sizes
    second = StableDiffusionModule.from_pretrained(pretrained)
    pipeline = xl_pipeline(pretrained) if xl else diffusers_pipeline(second.parts, image_encoder=None)
    pipeline.load_ip_adapter(str(tmp_path), subfolder="", weight_name=file.name, image_encoder_folder="image_encoder")
    pipeline.set_ip_adapter_scale(0.7)
    for count in (1, 2):
        given = {"ip_adapter_image": [images[:count]], "negative_prompt": OTHER}
        assert np.array_equal(made[count], theirs(pipeline, **given)) and not np.array_equal(made[count], plain)
    both = module.infer([PROMPT, OTHER], ip_adapter_image=images[0], seed=4, num_inference_steps=2, show_progress=False)
    alone = module.infer(OTHER, ip_adapter_image=images[0], seed=5, num_inference_steps=2, show_progress=False)
    difference = np.asarray(both["samples"][1]).astype(int) - np.asarray(alone["samples"][0]).astype(int)
    assert np.abs(difference).max() <= 1


def test_an_ip_adapter_that_does_not_fit(sd, xl, checkpoint, tmp_path):
    file = ip_adapter(sd[0].parts, tmp_path, plus=False)
    module = StableDiffusionModule.from_pretrained(checkpoint, components={"ip_adapter": file})
    with pytest.raises(SettingsError, match="ip_adapter: needs an image; add ip_adapter_image="):
        ours(module)
    with pytest.raises(SettingsError, match="ip_adapter_image: needs an IP-Adapter; add ip_adapter="):
        ours(sd[0], ip_adapter_image=ramp(1))
    for options, words in (({"cache_every": 2}, "cache_every"), ({"attention": "math"}, "attention=math")):
        with pytest.raises(SettingsError, match=f"speed.{words}"):
            ours(module, ip_adapter_image=ramp(1), speed=options)
    with pytest.raises(SettingsError, match=r"does not fit the UNet of .* give one for Stable Diffusion XL"):
        StableDiffusionModule.from_pretrained(xl[0].parts.source, components={"ip_adapter": file})
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(SettingsError, match=r"has no image_proj, ip_adapter, so it is no IP-Adapter"):
        StableDiffusionModule.from_pretrained(checkpoint, components={"ip_adapter": tmp_path / "other.safetensors"})
    with pytest.raises(SettingsError, match=r"nothing.bin: not found"):
        StableDiffusionModule.from_pretrained(checkpoint, components={"ip_adapter": tmp_path / "nothing.bin"})
    shutil.rmtree(tmp_path / "image_encoder")
    with pytest.raises(SettingsError, match=r"its image encoder cannot be read .* components.image_encoder=FOLDER"):
        StableDiffusionModule.from_pretrained(checkpoint, components={"ip_adapter": file})
