"""Fine-tuning by the commands: each kind is trained, exported, and sampled from what it exported."""

from __future__ import annotations

import json
import shutil
import warnings
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file

from sdmodule.callbacks.checkpoint import TrainingCheckpoint
from sdmodule.callbacks.ema import EMA
from sdmodule.cli.main import predict_main, train_main
from sdmodule.components.source import ASSETS
from sdmodule.data.datamodule import ImageFolderDataModule
from sdmodule.data.dreambooth import DreamBoothDataModule
from sdmodule.diffusion.noising import prior_preservation_loss
from sdmodule.errors import SettingsError
from sdmodule.module import StableDiffusionModule
from sdmodule.training.lora import LoraTuning
from tests.fitting import fit

WORD = "<my-cat>"


def fast(groups) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=1e-3)


def images(photos: Path, **settings) -> ImageFolderDataModule:
    return ImageFolderDataModule(str(photos), **{"resolution": 32, "batch_size": 2, "val_fraction": 0, **settings})


def trained(module: StableDiffusionModule) -> dict[str, torch.Tensor]:
    return {name: w.detach().clone() for name, w in module.named_parameters() if w.requires_grad}


TUNINGS = {
    "lora": {"kind": "lora", "dropout": 0.3, "text_encoder": True},
    "dora": {"kind": "lora", "method": "dora"},
    "lokr": {"kind": "lora", "method": "lokr", "dropout": 0.3},
    "textual_inversion": {"kind": "textual_inversion", "placeholder": WORD, "initializer": "star", "vectors": 2},
    "controlnet": {"kind": "controlnet"},
    "full": {"kind": "full", "text_encoder": True, "text_encoder_lr": 1e-4, "text_encoder_stop": 2},
}


@pytest.mark.parametrize("kind", TUNINGS)
def test_what_is_trained_changes_alone_and_a_stopped_training_ends_as_an_unbroken_one(
    checkpoint, photos, tmp_path, kind
):
    conditioning = "canny" if kind == "controlnet" else None

    def build() -> StableDiffusionModule:
        return StableDiffusionModule(str(checkpoint), tuning=TUNINGS[kind], optimizer=fast)

    def data() -> ImageFolderDataModule:
        return images(photos, random_flip=True, conditioning=conditioning, prompt=f"a {WORD}")

    straight, resumed = build(), build()
    before, frozen = trained(straight), dict(straight.named_parameters())
    frozen = {name: value.detach().clone() for name, value in frozen.items() if name not in before}
    saved = TrainingCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fit(straight, data(), 4, saved, EMA(start_step=1))
    torch.manual_seed(99)  # the global random numbers have no say
    fit(resumed, data(), 4, EMA(start_step=1), resume=tmp_path / "step=2.ckpt", accumulate_grad_batches=1)
    after, others = trained(straight), trained(resumed)
    assert all(torch.equal(after[name], others[name]) for name in after)
    assert any(not torch.equal(after[name], before[name]) for name in after)
    left = dict(straight.named_parameters())
    assert all(torch.equal(left[name], value) for name, value in frozen.items())
    content = torch.load(tmp_path / "step=4.ckpt", weights_only=True)
    assert content["state_dict"].keys() == after.keys()


def test_the_text_encoder_has_its_own_rate_and_stops_at_its_step(checkpoint, photos):
    module = StableDiffusionModule(str(checkpoint), tuning=TUNINGS["full"], optimizer=fast)
    assert [group.get("lr") for group in module.configure_optimizers().param_groups] == [1e-3, 1e-4]
    seen = []

    class Watch(EMA):
        def on_train_batch_end(self, trainer, pl_module, *_):
            seen.append({name: value.detach().clone() for name, value in pl_module.text_encoder.named_parameters()})

    fit(module, images(photos), 4, Watch())
    changed = [any(not torch.equal(a[name], b[name]) for name in a) for a, b in pairwise(seen)]
    assert changed == [True, False, False], "the second step is its last"


# ------------------------------------------------------------------------------------------ by the commands


def train(call, checkpoint, photos, out, *settings) -> Path:
    command = [f"pretrained={checkpoint}", f"data.root={photos}", "data.val_fraction=0", "sampler.steps=2"]
    command += ["trainer.max_steps=3", f"output_dir={out}", "model.optimizer.lr=1e-2", "callbacks.ema.start_step=2"]
    status, _, error = call(train_main, *command, *settings)
    assert status == 0, error
    return out / "export"


def sample(call, checkpoint, out, *settings, prompt="a red star") -> np.ndarray:
    common = [f"pretrained={checkpoint}", "steps=3", f"output_dir={out}"]
    status, _, error = call(predict_main, *common, f"prompt={prompt}", *settings)
    assert status == 0, error
    return np.asarray(Image.open(next((out / "images").iterdir())))


@pytest.mark.slow
def test_lora_from_the_training_to_an_image_and_to_the_same_again(checkpoint, photos, tmp_path, call):
    settings = ["tuning=lora", "tuning.rank=2", "cache=all", f"cache.folder={tmp_path / 'cache'}"]
    export = train(call, checkpoint, photos, tmp_path / "out", *settings)
    metadata = json.loads((export / "training.json").read_text())
    assert metadata["weights"] == "ema" and metadata["steps"] == 3
    assert (tmp_path / "out" / "samples" / "000003.png").is_file()
    adapters = f"adapters=[{{path: {export}, scale: 0.8}}]"
    plain = sample(call, checkpoint, tmp_path / "plain")
    adapted = sample(call, checkpoint, tmp_path / "adapted", adapters)
    assert not np.array_equal(adapted, plain)
    png = tmp_path / "adapted" / "images" / "00000-0.png"
    assert json.loads(Image.open(png).text["adapters"]) == [{"path": str(export), "scale": 0.8}]
    assert call(predict_main, "--from", png, f"output_dir={tmp_path / 'again'}")[0] == 0
    assert np.array_equal(np.asarray(Image.open(tmp_path / "again" / "images" / "00000-0.png")), adapted)


def test_a_learned_word_is_understood_here_and_in_diffusers(checkpoint, photos, tmp_path, call):
    settings = ["tuning=textual_inversion", f"tuning.placeholder={WORD}", "tuning.initializer=star"]
    settings += ["tuning.vectors=2", f"data.prompt={WORD}", "data.template=['a photo of {}','an image of {}']"]
    export = train(call, checkpoint, photos, tmp_path / "out", *settings)
    assert load_file(export / "learned_embeds.safetensors")[WORD].shape == (2, 32)
    adapters = [{"path": str(export)}]
    ours = StableDiffusionModule.from_pretrained(str(checkpoint), adapters=adapters)
    prompt = f"a photo of {WORD} on a (red:1.0) background"
    made = ours.infer(prompt, num_inference_steps=3, return_type="numpy", guidance_scale=7.5)["samples"]
    pipeline = StableDiffusionPipeline.from_pretrained(checkpoint)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_textual_inversion(export)
    theirs = pipeline(
        f"a photo of {WORD} on a red background",
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images
    np.testing.assert_array_equal(made, theirs)
    by_command = sample(call, checkpoint, tmp_path / "made", f"adapters=[{{path: {export}}}]", prompt=prompt)
    np.testing.assert_allclose(by_command, made[0] * 255, atol=1)


def test_a_controlnet_from_the_training_to_an_image(checkpoint, photos, tmp_path, call):
    export = train(call, checkpoint, photos, tmp_path / "out", "tuning=controlnet", "data.batch_size=2")
    assert ControlNetModel.from_pretrained(export).config.block_out_channels == [32, 64]
    assert (tmp_path / "out" / "samples" / "000003.png").is_file()
    sample(call, checkpoint, tmp_path / "made", f"controlnet={export}", f"control={photos / '1.png'}")


@pytest.mark.parametrize("settings", [["tuning=controlnet"], ["model=inpaint", "training.inpaint.convert=true"]])
def test_images_of_several_sizes_are_sampled_at_the_end(checkpoint, photos, tmp_path, call, settings):
    Image.new("RGB", (64, 32)).save(photos / "5.png")
    settings = [*settings, "data.buckets=true", "data.batch_size=1", "callbacks.samples.num_prompts=6"]
    export = train(call, checkpoint, photos, tmp_path / "out", *settings, "resolution=32")
    assert export.is_dir() and (tmp_path / "out" / "samples" / "000003.png").is_file()


@pytest.mark.slow
def test_sheets_come_where_nothing_is_validated_too_and_change_no_training(checkpoint, photos, tmp_path, call):
    settings = ["tuning=controlnet", "data.random_flip=true", "data.template=['a {}','the {}']", "data.batch_size=2"]
    settings += ["data.num_workers=1", "trainer.val_check_interval=1"]
    sheets = [*settings, "callbacks.samples.num_prompts=2", "+callbacks.checkpoint.save_top_k=-1"]
    sheets += ["callbacks.checkpoint.every_n_train_steps=1"]

    def left(name: str, *given: str) -> tuple[dict[str, bytes], dict[str, torch.Tensor]]:
        export = train(call, checkpoint, photos, tmp_path / name, *given)
        made = {file.name: file.read_bytes() for file in (tmp_path / name).glob("samples/*.png")}
        return made, load_file(export / "diffusion_pytorch_model.safetensors")

    shown, straight = left("out", *sheets)
    assert sorted(shown) == [f"{step:06d}.png" for step in (1, 2, 3)] and len({*shown.values()}) == 3
    again, resumed = left("again", *sheets, f"ckpt_path={tmp_path / 'out' / 'checkpoints' / 'step=1.ckpt'}")
    assert again == {name: shown[name] for name in ("000002.png", "000003.png")}
    _, bare = left("bare", *settings, "callbacks=[ema,export]")
    assert all(torch.equal(straight[key], resumed[key]) and torch.equal(straight[key], bare[key]) for key in straight)


@pytest.mark.slow
def test_dreambooth_makes_the_images_of_the_kind_first(checkpoint, photos, tmp_path, call):
    settings = ["experiment=dreambooth", "data.class_images=3", f"data.made_in={tmp_path / 'prior'}"]
    settings += [f"cache.folder={tmp_path / 'cache'}"]
    settings += ["data.prompt=a photo of sks cat", "data.class_prompt=a white star"]
    train(call, checkpoint, photos, tmp_path / "out", *settings)
    [folder] = (tmp_path / "prior").iterdir()
    made = sorted(folder.iterdir())
    assert [file.name for file in made] == [f"prior-{k:05}.png" for k in range(3)]
    sd = StableDiffusionModule.from_pretrained(str(checkpoint), sampling={"steps": 2})
    seeded = sd.infer("a white star", seed=1, return_type="image")["samples"][0]
    np.testing.assert_allclose(np.asarray(Image.open(made[1]), int), np.asarray(seeded, int), atol=1)
    times = [file.stat().st_mtime_ns for file in made]
    made[0].unlink()
    train(call, checkpoint, photos, tmp_path / "again", *settings)
    assert [file.stat().st_mtime_ns for file in made[1:]] == times[1:] and made[0].is_file(), "what is there is kept"
    train(call, checkpoint, photos, tmp_path / "other", *settings, "sampler.steps=3")
    assert len(list((tmp_path / "prior").iterdir())) == 2, "another model, or another way to sample, makes others"


def test_a_batch_of_dreambooth_is_half_of_the_thing_and_half_of_its_kind(photos, tmp_path):
    for k in range(4):
        Image.new("RGB", (40, 40), "white").save(tmp_path / f"{k}.png")
    data = DreamBoothDataModule(
        str(photos), "a sks", "a kind", class_images=3, class_root=str(tmp_path), resolution=32, batch_size=2
    )
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (4, 3, 32, 32) and batch["caption"] == ["a sks"] * 2 + ["a kind"] * 2
    assert batch["prior"].tolist() == [False, False, True, True]
    losses = torch.tensor([1.0, 3.0, 10.0, 20.0])
    assert prior_preservation_loss(losses, batch["prior"], 0.5) == 2 + 0.5 * 15


def test_of_pairs_where_the_thing_has_a_mask_all_of_the_kind_counts(photos, tmp_path):
    Image.new("L", (40, 48)).save(photos / "mask.png")
    row = {"file_name": "0.png", "mask_file_name": "mask.png"}
    (photos / "metadata.jsonl").write_text(json.dumps(row))
    Image.new("RGB", (40, 40), "white").save(tmp_path / "kind.png")
    kind = {"class_prompt": "a kind", "class_images": 1, "class_root": str(tmp_path)}
    data = DreamBoothDataModule(str(photos), "a sks", **kind, resolution=32, batch_size=1, val_fraction=0)
    with pytest.warns(UserWarning, match=r"left out images that .* does not list: 1\.png, 2\.png, 3\.png and 2 more"):
        data.setup("fit")
    [batch] = data.train_dataloader()
    assert batch["mask"].shape == (2, 1, 32, 32) and batch["mask"].mean(dim=(1, 2, 3)).tolist() == [0, 1]


def test_images_of_the_kind_are_made_where_there_is_no_good_one(photos, tmp_path):
    kind = tmp_path / "kind"
    kind.mkdir()
    (kind / "readme.txt").write_text("no image")

    def files(**settings) -> list[str]:
        data = DreamBoothDataModule(
            str(photos), "a sks", "a kind", class_images=3, class_root=str(kind), resolution=32, **settings
        )
        data.setup("fit")
        return [file.name for file in data.priors]

    assert files() == ["prior-00000.png", "prior-00001.png", "prior-00002.png"]
    shutil.copy(photos / "1.png", kind)
    for name in ("2.png", "prior-00000.png"):
        (kind / name).write_text("broken")
    with pytest.raises(SettingsError, match=r"data\.class_root=.* unreadable images: 2\.png"):
        files()
    with pytest.warns(UserWarning, match=r"data\.class_root: skipped unreadable images: 2\.png, prior-00000\.png"):
        assert files(skip_bad=True) == ["1.png", "prior-00001.png", "prior-00002.png"]


def test_images_of_the_kind_beyond_their_number_are_told_of(photos, tmp_path):
    kind = {"class_prompt": "a dog", "class_images": 4, "class_root": str(photos)}
    data = DreamBoothDataModule(str(photos), "a sks dog", **kind, resolution=32, batch_size=2, val_fraction=0)
    with pytest.warns(UserWarning, match=r"class_images=4: 2 of the 6 .* not used; set data\.class_images=6 to use"):
        data.setup()
    assert len(data.priors) == 4


@pytest.mark.parametrize("model", ["text2image", "autoencoder"])
def test_a_size_of_no_whole_latents_is_told_of_before_anything_is_written(checkpoint, photos, tmp_path, call, model):
    out = tmp_path / "out"
    given = [f"pretrained={checkpoint}", f"data.root={photos}", "resolution=[32,38]", f"output_dir={out}"]
    status, _, error = call(train_main, f"model={model}", "callbacks=[]", *given)
    assert status == 1 and error.count("\n") == 1 and not out.exists()
    assert "resolution=32x38 (height x width): must be multiples of 4, such as 36 or 40" in error


def test_dreambooth_without_who_makes_the_images_of_the_kind(checkpoint, photos, tmp_path, call):
    command = [f"pretrained={checkpoint}", f"data.root={photos}", "data=dreambooth", "data.prompt=a sks star"]
    command += ["data.class_prompt=a star", f"data.made_in={tmp_path / 'prior'}", f"output_dir={tmp_path / 'out'}"]
    status, _, complaint = call(train_main, *command)
    assert status == 1 and "add prior to callbacks" in complaint and len(complaint.splitlines()) == 1
    inpaint = ["model=inpaint", "training.inpaint.convert=true"]
    status, _, complaint = call(train_main, *command, *inpaint, "callbacks=[prior]")
    assert status == 1 and "model=text2image alone" in complaint and len(complaint.splitlines()) == 1
    assert not (tmp_path / "out").exists() and not (tmp_path / "prior").exists()


# ------------------------------------------------------------------------------------------ words


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"placeholder": "red", "initializer": "star"}, "placeholder=red: already in the vocabulary"),
        ({"placeholder": "my cat", "initializer": "star"}, "placeholder=my cat: cannot be one word of a prompt"),
        ({"placeholder": WORD, "initializer": "star circle square"}, "give a text of 1 to 1 tokens"),
        ({"placeholder": WORD, "initializer": "star", "vectors": 0}, "vectors=0"),
        ({"placeholder": WORD}, "needs tuning.initializer"),
    ],
)
def test_a_word_that_cannot_be_learned_is_told_of(checkpoint, settings, message):
    with pytest.raises(SettingsError, match=message):
        StableDiffusionModule(str(checkpoint), tuning={"kind": "textual_inversion", **settings})


def test_a_word_that_no_caption_names_is_told_of_before_anything_is_written(checkpoint, photos, tmp_path, call):
    out, batch = tmp_path / "out", ["callbacks=[]", "data.val_fraction=0", "trainer.max_steps=1", "resolution=32"]
    command = [f"pretrained={checkpoint}", f"data.root={photos}", f"output_dir={out}", "tuning=textual_inversion"]
    command += [f"tuning.placeholder={WORD}", "tuning.initializer=star", *batch]
    status, _, complaint = call(train_main, *command)
    assert status == 1 and f'set data.prompt="a photo of {WORD}"' in complaint and len(complaint.splitlines()) == 1
    assert not out.exists()
    metadata = photos / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace("image 3", f"a red {WORD}."))
    with pytest.warns(UserWarning, match=f"{WORD} is not in 5 of 6 captions, such as 'image 0'"):
        assert call(train_main, *command)[0] == 0
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*is not in .* captions")
        for template in (f"'{WORD}, {{}}'", f"['{{}}', '{WORD}, {{}}']"):  # of several one is drawn each time
            assert call(train_main, *command, f"data.template={template}")[0] == 0


def test_a_new_word_starts_as_its_initializer_and_leaves_other_prompts_alone(checkpoint):
    tuning = {"kind": "textual_inversion", "placeholder": WORD, "initializer": "star"}
    module, plain = StableDiffusionModule(str(checkpoint), tuning=tuning), StableDiffusionModule(str(checkpoint))
    with torch.no_grad():
        assert torch.equal(module.encode_captions([f"a red {WORD}"]), plain.encode_captions(["a red star"]))
        assert torch.equal(module.encode_captions(["a blue circle"]), plain.encode_captions(["a blue circle"]))


def test_a_word_of_the_web_ui_is_called_as_its_file(checkpoint, tmp_path):
    save_file({"emb_params": torch.randn(3, 32)}, tmp_path / "mycat.safetensors")
    sd = StableDiffusionModule.from_pretrained(
        str(checkpoint), adapters=[{"path": str(tmp_path / "mycat.safetensors")}]
    )
    assert len(sd.parts.tokenizer("a mycat", add_special_tokens=False).input_ids) == 2
    assert not torch.equal(sd.encode_captions(["a mycat"]), sd.encode_captions(["a star"]))
    for wrong, message in ((torch.randn(3, 31), "takes 1 to 75 vectors of 32"), (torch.randn(1, 2, 3), "neither")):
        save_file({"emb_params": wrong}, tmp_path / "wrong.safetensors")
        with pytest.raises(SettingsError, match=message):
            StableDiffusionModule(str(checkpoint), adapters=[{"path": str(tmp_path / "wrong.safetensors")}])


# ------------------------------------------------------------------------------------------ sizes


def test_a_checkpoint_of_lora_on_an_sd15_sized_model_is_small(checkpoint, tmp_path):
    """All that a checkpoint holds, with the average and the optimizer's state: 4 times the adapter's weights."""
    config = json.loads((ASSETS / "configs" / "sd1" / "unet" / "config.json").read_text())
    rank = 16
    module = StableDiffusionModule(str(checkpoint))
    with torch.device("meta"):  # without memory for what is frozen
        module.parts.unet = module.unet = UNet2DConditionModel.from_config(config)
    module.tuning = LoraTuning(rank=rank)
    module.tuning.prepare(module.parts, 0)
    for layer in module.unet.modules():
        for name, weight in list(layer._parameters.items()):
            if weight is not None and weight.requires_grad:
                layer._parameters[name] = torch.nn.Parameter(torch.zeros(weight.shape))
    weights = trained(module)
    assert sum(w.numel() for w in weights.values()) == 797_184 * rank // 4
    optimizer = torch.optim.AdamW([w for w in module.parameters() if w.requires_grad])
    for weight in module.parameters():
        weight.grad = torch.zeros(weight.shape) if weight.requires_grad else None
    optimizer.step()
    ema = EMA()
    ema.average = weights
    content = {"state_dict": weights, "optimizer_states": [optimizer.state_dict()], "callbacks": ema.state_dict()}
    torch.save(content, tmp_path / "lora.ckpt")
    assert (tmp_path / "lora.ckpt").stat().st_size < 60e6
