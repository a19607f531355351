"""Folders and files of no family that is supported are refused by name, before a weight is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from safetensors.torch import save_file

from sdmodule.cli.main import predict_main
from sdmodule.components.checkpoint import load_components, load_part
from sdmodule.errors import SettingsError
from sdmodule.families.recognize import STABLE_DIFFUSION, recognize_family
from tests.cli.test_commands import told

PARTS = {
    "StableDiffusionLDM3DPipeline": ["unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"],
    "StableDiffusion3Pipeline": ["transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"],
    "FluxPipeline": ["transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"],
    "PixArtSigmaPipeline": ["transformer", "vae", "text_encoder", "tokenizer"],
    "KandinskyV22Pipeline": ["unet", "movq"],
    "StableDiffusionUpscalePipeline": ["unet", "vae", "text_encoder", "tokenizer"],
}


@pytest.mark.parametrize("name", PARTS)
def test_a_folder_of_another_pipeline_is_named_before_any_weight_is_read(call, tmp_path, name):
    for part in PARTS[name]:
        (tmp_path / "model" / part).mkdir(parents=True)
        (tmp_path / "model" / part / "config.json").write_text("{}")
        (tmp_path / "model" / part / "diffusion_pytorch_model.safetensors").write_bytes(b"not read")
    index = {"_class_name": name, **{part: ["diffusers", "Part"] for part in PARTS[name]}}
    (tmp_path / "model" / "model_index.json").write_text(json.dumps(index))
    result = call(predict_main, "prompt=a", f"pretrained={tmp_path / 'model'}", f"output_dir={tmp_path / 'out'}")
    told(result, f"is a checkpoint of {name}; only Stable Diffusion 1.x and 2.x ")
    assert not (tmp_path / "out").exists()


def test_a_cached_hub_id_of_another_pipeline_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--owner--xl"
    (repository / "snapshots" / "0").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0")
    (repository / "snapshots" / "0" / "model_index.json").write_text('{"_class_name": "StableDiffusionLDM3DPipeline"}')
    with pytest.raises(SettingsError, match="pretrained=owner/xl: is a checkpoint of StableDiffusionLDM3DPipeline"):
        load_components("owner/xl")


def test_a_folder_whose_widths_happen_to_fit_is_refused_too(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "StableDiffusionLDM3DPipeline"}))
    with pytest.raises(SettingsError, match="StableDiffusionLDM3DPipeline"):
        load_components(str(folder))


@pytest.mark.parametrize(
    "name",
    [
        *("StableDiffusionPipeline", "StableDiffusionInpaintPipeline", "StableDiffusionImg2ImgPipeline"),
        *("StableDiffusionControlNetPipeline", "StableDiffusionControlNetInpaintPipeline", "LatentDiffusion"),
        *("StableDiffusionInpaintPipelineLegacy", "StableDiffusionPanoramaPipeline", "StableDiffusionPAGPipeline"),
        *("LatentConsistencyModelPipeline", None, ["my_pipeline", "MyPipeline"]),
    ],
)
def test_pipelines_with_the_parts_of_stable_diffusion_are_read(name):
    index = {} if name is None else {"_class_name": name}
    assert recognize_family(index, "pretrained=x") is STABLE_DIFFUSION


def test_a_folder_that_names_no_pipeline_is_read(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    (folder / "model_index.json").write_text("{}")
    assert load_components(str(folder)).unet is not None


def test_an_index_that_cannot_be_read_is_named(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    (folder / "model_index.json").write_text("{")
    with pytest.raises(SettingsError, match=r"model_index\.json cannot be read"):
        load_components(str(folder))


def test_a_unet_and_a_controlnet_that_take_more_than_text_are_refused(checkpoint, tmp_path):
    """As those of Stable Diffusion XL, of which a size and a pooled embedding are a part."""
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    (folder / "model_index.json").write_text("{}")
    config = dict(UNet2DConditionModel.load_config(folder, subfolder="unet"))
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    unet = UNet2DConditionModel.from_config(config | added | {"projection_class_embeddings_input_dim": 80})
    unet.save_pretrained(folder / "unet")
    for load in (lambda: load_components(str(folder)), lambda: load_part("unet", str(folder / "unet"))):
        with pytest.raises(SettingsError, match=r"takes more than text.*Stable Diffusion XL"):
            load()
    ControlNetModel.from_unet(unet).save_pretrained(tmp_path / "control")
    from sdmodule.components.controlnet import load_controlnet

    with pytest.raises(SettingsError, match=r"controlnet=.*takes more than text"):
        load_controlnet(str(tmp_path / "control"), load_components(str(checkpoint)))


@pytest.mark.parametrize(
    ("keys", "kind"),
    [
        (["conditioner.embedders.0.transformer.x"], "a checkpoint of another model, .* and Stable Diffusion XL"),
        (["model.diffusion_model.label_emb.0.0.weight"], "a checkpoint of another model, .* and Stable Diffusion XL"),
        (["model.diffusion_model.joint_blocks.0.x"], "a checkpoint of Stable Diffusion 3"),
        (["model.diffusion_model.double_blocks.0.x"], "a checkpoint of Flux"),
        (["double_blocks.0.img_attn.qkv.weight"], "a checkpoint of Flux"),
    ],
)
def test_a_single_file_of_another_model_is_named_even_with_all_parts(tmp_path, keys, kind):
    whole = ["model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.x", "cond_stage_model.transformer.x"]
    file = tmp_path / "model.safetensors"
    save_file({key: torch.zeros(4, 4, 3, 3) for key in [*whole, *keys]}, file)
    with pytest.raises(SettingsError, match=f"is {kind}"):
        load_components(str(file))
    if keys[0].startswith("model."):
        with pytest.raises(SettingsError, match=f"is {kind}"):
            load_part("unet", str(file))


# ---------------------------------------------------------------------------------- folders of a training, and adapters


def run_folder(folder: Path, **files: str) -> Path:
    """The folder of a training with these files in its export."""
    (folder / "checkpoints").mkdir(parents=True)
    for name, text in files.items():
        file = folder / "export" / name.replace("__", "/").replace("_json", ".json").replace("_safe", ".safetensors")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


EXPORTS = {
    "model": ({"model_index_json": "{}"}, "is a whole checkpoint; give pretrained={}/export"),
    "lora": ({"pytorch_lora_weights_safe": ""}, "is an adapter; give adapters={}/export"),
    "word": ({"learned_embeds_safe": ""}, "is a learned word; give adapters={}/export"),
    "control": ({"config_json": '{"_class_name": "ControlNetModel"}'}, "is a ControlNet; give controlnet={}/export"),
    "vae": ({"vae__config_json": "{}"}, "is an autoencoder; give components.vae={}/export"),
}


@pytest.mark.parametrize("name", EXPORTS)
def test_the_folder_of_a_training_names_its_export(call, tmp_path, name):
    files, sentence = EXPORTS[name]
    run = run_folder(tmp_path / "my_run", **files)
    told(call(predict_main, "prompt=a", f"pretrained={run}"), f"pretrained={run}: is the folder of a training; ")
    told(call(predict_main, "prompt=a", f"pretrained={run}"), sentence.format(run))
    told(call(predict_main, "prompt=a", f"pretrained={run}/checkpoints"), sentence.format(run))
    if name != "model":
        told(call(predict_main, "prompt=a", f"pretrained={run}/export"), sentence.format(run))
    if name in ("model", "control", "vae"):
        told(call(predict_main, "prompt=a", f"adapters={run}"), "is the folder of a training", sentence.format(run))


def test_the_folder_of_a_training_without_an_export_says_how_to_resume(call, tmp_path):
    run = run_folder(tmp_path / "my_run")
    told(call(predict_main, "prompt=a", f"pretrained={run}"), "without an export/", "ckpt_path=last")


@pytest.mark.parametrize(
    ("key", "shape", "kind"),
    [
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", (4, 4), "a LoRA"),
        ("unet.x.hada_w1_a", (4, 4), "a LyCORIS adapter"),
        ("<my-cat>", (2, 32), "a learned word"),
    ],
)
def test_an_adapter_given_as_a_checkpoint_is_named(call, tmp_path, key, shape, kind):
    file = tmp_path / "adapter.safetensors"
    save_file({key: torch.zeros(*shape)}, file)
    told(call(predict_main, "prompt=a", f"pretrained={file}"), f"is {kind}", f"give adapters={file}")
