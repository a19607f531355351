"""Bad input: one sentence on what is wrong and what to do, exit status 1, and nothing written."""

import shutil

import pytest
import torch

from sdmodule.cli.main import predict_main, train_main
from sdmodule.components.schedulers import SHORT_NAMES
from tests.cli.test_commands import told


@pytest.fixture(scope="session")
def checkpoint(small_checkpoint):
    return small_checkpoint


def missing_part(folder):
    shutil.rmtree(folder / "vae")


def truncated_weights(folder):
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def no_weights(folder):
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()


def no_index(folder):
    (folder / "model_index.json").unlink()


WRONG_PREDICT = {
    "no prompt": (["prompt=null"], ["prompt", "prompts"]),
    "empty list": (["prompt=[]"], ["prompt"]),
    "heavy weight": (["prompt=(a:20)"], ["20", "weight"]),
    "other number of negatives": (['negative_prompt=["a","b","c"]'], ["negative_prompt", "3", "1"]),
    "unknown model": (["pretrained=nothing_like_it"], ["nothing_like_it", "tiny", "hub id"]),
    "no network": (["pretrained=owner/name"], ["owner/name", "pretrained=/"]),
    "sd15 without a network": (["experiment=sd15", "pretrained=someone/sd15"], ["someone/sd15", "pretrained=/"]),
    "height": (["height=30"], ["height=30", "multiple of 4", "28", "32"]),
    "no steps": (["steps=0"], ["steps=0", "at least 1"]),
    "negative steps": (["steps=-1"], ["steps=-1", "at least 1"]),
    "too many steps": (["steps=2000"], ["steps=2000", "1000"]),
    "steps in words": (["steps=abc"], ["steps=abc", "whole number"]),
    "seed beyond torch's": (["seed=18446744073709551615", "num_images_per_prompt=2"], ["18446744073709551616"]),
    "package of a scheduler": (["sampler.scheduler=DPMSolverSDEScheduler"], ["torchsde", "ddim"]),
    "part not there": (["components.vae=nope"], ["components.vae=nope", "not found"]),
    "adapters as a number": (["+x=1", "adapters=[3]"], ["adapters=3", "{path: FILE, scale: 0.8}"]),
    "an adapter that is not there": (["adapters=my_lora"], ["adapters=my_lora", "not found"]),
    "guidance in words": (["guidance_scale=abc"], ["guidance_scale=abc", "number"]),
    "batch in words": (["batch_size=abc"], ["batch_size=abc", "whole number"]),
    "batch row in words": (["data.batch_row=abc"], ["data.batch_row=abc", "whole number"]),
    "scheduler": (["sampler.scheduler=foo"], ["foo", *SHORT_NAMES]),
    "sampler": (["sampler=foo"], ["sampler=foo: unknown", "ddim", "euler"]),
    "unknown key": (["stepz=3"], ["stepz", "did you mean steps"]),
    "unknown nested key": (["sampler.stepz=3"], ["sampler.stepz", "did you mean sampler.steps?", "--help sampler"]),
    "scheduler as a key": (["scheduler=euler"], ["did you mean sampler=euler?"]),
    "sweep without -m": (["steps=2,3"], ["steps=2,3", "multirun"]),
    "grammar": (["prompts=a(b"], ["a(b"]),
    "mask for text": (["mask=[0,0,8,8]"], ["mask", "model=inpaint"]),
    "strength for text": (["strength=0.5"], ["strength=0.5", "model=inpaint"]),
    "no image": (["model=inpaint"], ["model=inpaint", "image="]),
    "image not there": (["model=inpaint", "image=a.png", "mask=[0,0,8,8]"], ["image=a.png", "not found"]),
    "no images to log": (["callbacks.images.most=0"], ["callbacks.images.most=0", "at least 1"]),
    "precision": (["precision=5"], ["trainer", "precision", "5"]),
    "resume is no boolean": (["resume=no"], ["resume=no", "true or false"]),
    "merge_adapters is no boolean": (["merge_adapters=no"], ["merge_adapters=no", "true or false"]),
    "control_edges is no boolean": (["control_edges=no"], ["control_edges=no", "true or false"]),
}


@pytest.mark.parametrize("name", WRONG_PREDICT)
def test_predict_reports_bad_input_in_one_sentence(call, checkpoint, tmp_path, name):
    overrides, words = WRONG_PREDICT[name]
    out = tmp_path / "out"
    told(call(predict_main, "prompt=a", f"pretrained={checkpoint}", f"output_dir={out}", *overrides), *words)
    assert not out.exists()


@pytest.mark.parametrize("damage", [missing_part, truncated_weights, no_weights, no_index])
def test_a_broken_checkpoint_is_named(call, checkpoint, tmp_path, damage):
    folder = shutil.copytree(checkpoint, tmp_path / "broken")
    damage(folder)
    told(call(predict_main, "prompt=a", f"pretrained={folder}", f"output_dir={tmp_path / 'out'}"), str(folder))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", [[], ["-m"]])
def test_an_unwritable_output_folder_is_reported(call, checkpoint, tmp_path, command):
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "out"
    told(
        call(predict_main, *command, "prompt=a", f"pretrained={checkpoint}", f"output_dir={out}"),
        str(tmp_path / "file"),
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_reported(call, checkpoint, tmp_path):
    result = call(predict_main, "prompt=a", f"pretrained={checkpoint}", "trainer=gpu", f"output_dir={tmp_path / 'out'}")
    told(result, "trainer=gpu", "trainer=cpu")


def bad_image(photos):
    (photos / "0.png").write_text("no image")


def missing_image(photos):
    (photos / "0.png").unlink()


def no_images(photos):
    shutil.rmtree(photos)
    photos.mkdir()


@pytest.mark.parametrize(("damage", "word"), [(bad_image, "0.png"), (missing_image, "0.png"), (no_images, "no images")])
def test_a_bad_folder_of_images_is_reported_before_anything_is_written(
    call, checkpoint, photos, tmp_path, damage, word
):
    damage(photos)
    out = tmp_path / "out"
    told(call(train_main, f"data.root={photos}", f"pretrained={checkpoint}", f"output_dir={out}"), "data.root", word)
    assert not out.exists()


WRONG_TRAIN = {
    "no data": ([], ["data.root"]),
    "absent data": (["data.root=nothing_like_it"], ["data.root=nothing_like_it"]),
    "no steps": (["data.root=PHOTOS", "trainer.max_steps=0"], ["trainer.max_steps=0", "at least 1"]),
    "no checkpoint": (["data.root=PHOTOS", "ckpt_path=nothing.ckpt"], ["ckpt_path=nothing.ckpt"]),
    "broken checkpoint": (["data.root=PHOTOS", "ckpt_path=PHOTOS/0.png"], ["ckpt_path=", "0.png"]),
    "a size of drawn scenes": (["data=shapes", "resolution=32"], ["resolution=32", "nothing in this run", "leave it"]),
    "an objective of autoencoders": (
        ["data.root=PHOTOS", "model=autoencoder", "callbacks=[export]", "objective.noise_offset=0.1"],
        ["objective.noise_offset=0.1", "AutoencoderModule"],
    ),
    "a revision of autoencoders": (
        ["data.root=PHOTOS", "model=autoencoder", "callbacks=[export]", "revision=main"],
        ["revision=main", "leave it out"],
    ),
    "a compiled autoencoder": (
        ["data.root=PHOTOS", "model=autoencoder", "callbacks=[export]", "training.compile=blocks"],
        ["training.compile=blocks", "leave it out"],
    ),
    "unknown setting": (["data.root=PHOTOS", "+data.foo=1"], ["data.foo: ", "has no such setting", "~data.foo"]),
    "a word for data with captions": (
        ["experiment=textual_inversion", "data=huggingface", "data.name=photos"],
        ["data.prompt: ", "has no such setting", "~data.prompt"],
    ),
    "no drawn scenes": (["data=shapes", "data.train_length=0"], ["data.train_length=0", "at least 1"]),
    "half a warm-up": (["data.root=PHOTOS", "callbacks.timing.warmup_steps=0.5"], ["timing.warmup_steps=0.5", "whole"]),
    "no FLOPS": (["data.root=PHOTOS", "callbacks.timing.peak_flops=0"], ["timing.peak_flops=0", "greater than 0"]),
    "no batch of class images": (
        ["data.root=PHOTOS", "callbacks=[prior]", "callbacks.prior.batch_size=0"],
        ["prior.batch_size=0", "at least 1"],
    ),
    "unknown setting of a callback": (
        ["data.root=PHOTOS", "+callbacks.ema.foo=1"],
        ["callbacks.ema.foo: EMA has no such setting", "~callbacks.ema.foo"],
    ),
    "unknown data": (["data=foo"], ["data=foo: unknown", "image_folder"]),
    "a seed below 0": (["data.root=PHOTOS", "seed=-1"], ["seed=-1", "18446744073709551615"]),
    "a seed in words": (["data.root=PHOTOS", "seed=abc"], ["seed=abc", "18446744073709551615"]),
    "half a seed": (["data.root=PHOTOS", "training.seed=1.5"], ["training.seed=1.5", "whole number"]),
    "half an image": (["data.root=PHOTOS", "data.batch_size=2.5"], ["data.batch_size=2.5", "at least 1"]),
    "half a process": (["data.root=PHOTOS", "data.num_workers=1.5"], ["data.num_workers=1.5", "at least 0"]),
    "more than all captions": (["data.root=PHOTOS", "objective.caption_dropout=1.5"], ["dropout=1.5", "at most 1"]),
    "a dropout in words": (["data.root=PHOTOS", "objective.caption_dropout=abc"], ["dropout=abc", "at most 1"]),
    "no timestep shift": (["data.root=PHOTOS", "objective.timestep_shift=0"], ["shift=0", "greater than 0"]),
    "an average that never changes": (["data.root=PHOTOS", "callbacks.ema.decay=1"], ["ema.decay=1", "less than 1"]),
    "a decay in words": (["data.root=PHOTOS", "callbacks.ema.decay=abc"], ["ema.decay=abc", "less than 1"]),
    "half a start": (["data.root=PHOTOS", "callbacks.ema.start_step=1.5"], ["ema.start_step=1.5", "whole number"]),
    "weights in 16 bits": (["data.root=PHOTOS", "trainer.precision=16-true"], ["precision=16-true", "bf16-mixed"]),
    "weights in 64 bits": (["data.root=PHOTOS", "trainer.precision=64-true"], ["precision=64-true", "32-true"]),
    "an autoencoder in 16 bits": (
        ["data.root=PHOTOS", "trainer.precision=16-true", "model=autoencoder", "callbacks=[export]"],
        ["precision=16-true", "bf16-mixed"],
    ),
    "dropout of lokr on several devices": (
        ["data.root=PHOTOS", "trainer.strategy=ddp", "tuning=lora", "tuning.method=lokr", "tuning.dropout=0.5"],
        ["tuning.dropout=0.5", "ddp_find_unused_parameters_true"],
    ),
    "a lora as a whole model": (
        ["data.root=PHOTOS", "experiment=lora", "callbacks.export.layout=single_file"],
        ["callbacks.export.layout=single_file: tuning=lora", "diffusers"],
    ),
    "an export in bytes": (["data.root=PHOTOS", "callbacks.export.dtype=int8"], ["export.dtype=int8", "float16"]),
    "no images of validation": (
        ["data.root=PHOTOS", "callbacks.samples.num_prompts=0"],
        ["num_prompts=0", "at least 1"],
    ),
    "no seed of validation": (["data.root=PHOTOS", "callbacks.samples.seed=abc"], ["samples.seed=abc"]),
    "a heavy weight in validation": (
        ["data.root=PHOTOS", "callbacks.samples.prompts=['a (cat:30)']"],
        ["30", "a (cat:30)"],
    ),
    "a flip that is no boolean": (
        ["data.root=PHOTOS", "data.random_flip=no"],
        ["data.random_flip=no", "true or false"],
    ),
    "compile is no boolean": (
        ["data.root=PHOTOS", "training.compile=no"],
        ["training.compile=no", "blocks, none, whole"],
    ),
    "validate_first is no boolean": (["data.root=PHOTOS", "validate_first=no"], ["validate_first=no", "true or false"]),
    "an empty folder name": (["data.root="], ["data.root=", "must be a non-empty path"]),
    "a data set without a name": (["data=huggingface", "data.name=null"], ["data.name=None: must be a non-empty path"]),
    "a list of folders": (
        ["data.root=PHOTOS", "data.val_root=[a,b]"],
        ["data.val_root=['a', 'b']"],
    ),
    "callback not chosen": (
        ["data.root=PHOTOS", "callbacks=[checkpoint]", "+callbacks.samples.num_prompts=2"],
        ["callbacks.samples", "num_prompts", "~callbacks.samples"],
    ),
}


@pytest.mark.parametrize("name", WRONG_TRAIN)
def test_train_reports_bad_input_in_one_sentence(call, checkpoint, photos, tmp_path, name):
    overrides, words = WRONG_TRAIN[name]
    overrides = [text.replace("PHOTOS", str(photos)) for text in overrides]
    out = tmp_path / "out"
    told(call(train_main, f"pretrained={checkpoint}", f"output_dir={out}", *overrides), *words)
    assert not out.exists()


def test_an_unreadable_image_can_be_skipped_with_a_warning(call, checkpoint, photos, tmp_path):
    bad_image(photos)
    settings = [
        f"data.root={photos}",
        f"pretrained={checkpoint}",
        f"output_dir={tmp_path / 'out'}",
        "callbacks=[progress]",
    ]
    status, _, complaint = call(train_main, *settings, "data.skip_bad=true", "trainer.max_steps=1", "resolution=32")
    assert status == 0
    if complaint:  # pytest may keep warnings for itself
        assert complaint.startswith("warning: ") and "0.png" in complaint


def test_hydra_full_error_shows_the_traceback(call, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ValueError, match="steps=0"):
        call(predict_main, "prompt=a", f"pretrained={checkpoint}", "steps=0", f"output_dir={tmp_path / 'out'}")
