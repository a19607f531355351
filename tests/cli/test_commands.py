"""The two commands as people use them: what they write, and what they say of a wrong input."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from sdmodule.cli.main import predict_main, preset_alone, train_main
from sdmodule.components.schedulers import SHORT_NAMES

ROOT = Path(__file__).parents[2]
PROMPTS = ["a red circle on a blue background", "a small green star at the top on a white background"]


def records(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


# ---------------------------------------------------------------------------------------------- what is written


def test_predict_repaints_a_photograph_under_its_mask(call, checkpoint, tmp_path):
    photo, mask = tmp_path / "my photo, 1.png", tmp_path / "mask.png"
    before = np.random.default_rng(0).integers(0, 256, (700, 1000, 3), dtype=np.uint8)
    Image.fromarray(before).save(photo)
    white = np.zeros((700, 1000), dtype=np.uint8)
    white[300:420, 500:640] = 255
    Image.fromarray(white).save(mask)
    common = ["model=inpaint", f"pretrained={checkpoint}", f"image={photo}", f"prompt={PROMPTS[0]}", "steps=2"]
    common += ["only_masked=true"]
    result = call(predict_main, *common, f"mask={mask}", f"output_dir={tmp_path / 'out'}")
    assert result[0] == 0, result
    [record] = records(tmp_path / "out")
    assert record["inpaint"] == "known region re-noised at every step" and record["only_masked"] is True
    after = pixels(tmp_path / "out" / record["file"])
    assert after.shape == before.shape
    changed = (after != before).any(axis=2)
    assert changed[white > 0].mean() > 0.9 and not changed[white == 0].any()
    assert call(predict_main, *common, "mask=[500,300,640,420]", f"output_dir={tmp_path / 'box'}")[0] == 0
    assert np.array_equal(pixels(tmp_path / "box" / record["file"]), after)


def test_predict_writes_images_facts_and_times(call, checkpoint, tmp_path):
    common = [
        f"prompt={json.dumps(PROMPTS)}",
        f"pretrained={checkpoint}",
        "num_images_per_prompt=2",
        "seed=3",
        "steps=3",
    ]
    out = tmp_path / "out"
    status, printed, complaint = call(predict_main, *common, f"output_dir={out}")
    assert (status, complaint) == (0, "") and str(out / "grid.png") in printed
    names = ["00000-3.png", "00001-4.png", "00002-5.png", "00003-6.png"]
    assert sorted(os.listdir(out)) == [
        "config.yaml",
        "grid.png",
        "images",
        "index.html",
        "predictions.jsonl",
        "timings.json",
    ]
    assert sorted(os.listdir(out / "images")) == names

    for k, record in enumerate(records(out)):
        assert (record["file"], record["prompt"]) == (f"images/{names[k]}", PROMPTS[k // 2])
        assert record["seed"] == 3 + k and record["seconds"] > 0 and record["steps"] == 3
        assert record["model"] == str(checkpoint) and record["scheduler"] == "DDIMScheduler"
        text = Image.open(out / record["file"]).text
        assert text["prompt"] == record["prompt"]
        metadata = {key: value for key, value in record.items() if key not in ("file", "seconds")}
        assert {key: text[key] for key in metadata} == {
            k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()
        }

    timings = json.loads((out / "timings.json").read_text())
    assert set(timings["seconds"]) == {"text", "denoise", "decode", "save"}
    assert timings["images"] == 4 and timings["images_per_second"] > 0 and timings["peak_memory_bytes"] > 0

    one = tmp_path / "one"
    assert call(predict_main, *common, f"output_dir={one}", "batch_size=1")[0] == 0
    assert all(np.abs(pixels(out / "images" / name) - pixels(one / "images" / name)).max() <= 1 for name in names)
    assert json.loads((one / "timings.json").read_text())["warmup"]["images"] == 1


@pytest.mark.parametrize("captions", ["metadata", "txt"])
def test_train_writes_checkpoints_samples_figures_and_a_pipeline(call, checkpoint, photos, tmp_path, captions):
    if captions == "txt":
        (photos / "metadata.jsonl").unlink()
        for k in range(6):
            (photos / f"{k}.txt").write_text(f"image {k}")
    out = tmp_path / "out"
    settings = [f"data.root={photos}", f"pretrained={checkpoint}", f"output_dir={out}", "steps=2", "resolution=32"]
    status, printed, complaint = call(
        train_main, *[f"+{s}" if s == "steps=2" else s for s in settings], "trainer.max_steps=4"
    )
    assert (status, complaint) == (0, "")
    assert "Training" in printed and str(out) in printed and len(printed.splitlines()) == 2
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["last.ckpt"]
    assert (out / "samples" / "000004.png").is_file()
    figures = list(csv.DictReader((out / "metrics.csv").open()))
    assert any(row["train/loss"] for row in figures) and any(row["val/loss"] for row in figures)

    pipeline = StableDiffusionPipeline.from_pretrained(out / "export", safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a cat", num_inference_steps=2, height=32, width=32).images[0].size == (32, 32)


def test_train_takes_fewer_images_than_a_batch_and_none_to_validate_on(call, checkpoint, photos, tmp_path):
    settings = [f"data.root={photos}", f"pretrained={checkpoint}", f"output_dir={tmp_path / 'out'}", "+steps=2"]
    settings += ["data.batch_size=16", "data.val_fraction=0", "trainer.max_steps=3", "trainer.val_check_interval=2"]
    with pytest.warns(UserWarning, match=r"data\.batch_size=16: there are 6 images to train on, so a batch is of 6\."):
        status, _, complaint = call(train_main, *settings, "resolution=32")
    assert (status, complaint) == (0, "")
    assert (tmp_path / "out" / "samples" / "000003.png").is_file()
    assert (tmp_path / "out" / "export" / "model_index.json").is_file()


def test_an_autoencoder_is_trained_with_the_usual_callbacks(call, checkpoint, photos, tmp_path):
    settings = [f"data.root={photos}", f"pretrained={checkpoint}", f"output_dir={tmp_path / 'out'}", "resolution=32"]
    assert call(train_main, *settings, "model=autoencoder", "trainer.max_steps=2")[0] == 0
    assert (tmp_path / "out" / "export" / "vae").is_dir() and not (tmp_path / "out" / "samples").exists()


def test_a_training_goes_on_from_its_checkpoint(call, checkpoint, photos, tmp_path, recwarn):
    settings = [
        f"data.root={photos}",
        f"pretrained={checkpoint}",
        f"output_dir={tmp_path / 'out'}",
        "callbacks=[checkpoint]",
    ]
    last = tmp_path / "out" / "checkpoints" / "last.ckpt"
    assert call(train_main, *settings, "resolution=32", "trainer.max_steps=2")[0] == 0
    status, _, complaint = call(train_main, *settings, "trainer.max_steps=2", f"ckpt_path={last}")
    assert status == 1 and "nothing to train" in complaint
    status, _, complaint = call(train_main, *settings, "trainer.max_steps=5", f"ckpt_path={last.parent}")
    assert status == 1 and f"ckpt_path={last.parent} is a folder" in complaint and complaint.count("\n") == 1
    told(call(predict_main, f"pretrained={last}", "prompt=a cat"), "is a checkpoint of a training, whose export/ is")
    settings += ["resolution=32", "callbacks.checkpoint.every_n_train_steps=4"]
    status, _, complaint = call(train_main, *settings, "trainer.max_steps=5", f"ckpt_path={last}")
    assert (status, complaint) == (0, "")
    assert [one for one in recwarn if "callbacks used to create the checkpoint" in str(one.message)] == []
    assert max(torch.load(path, weights_only=True)["global_step"] for path in last.parent.iterdir()) == 5
    assert (tmp_path / "out" / "metrics-1.csv").is_file()  # those of the first part


def test_validations_are_counted_in_steps_whatever_the_batches_of_an_epoch(call, checkpoint, photos, tmp_path):
    """An epoch of five batches, the last of which makes a step by itself."""
    out = tmp_path / "out"
    settings = [f"data.root={photos}", f"pretrained={checkpoint}", f"output_dir={out}", "callbacks=[checkpoint]"]
    settings += ["resolution=32", "data.batch_size=1", "trainer.accumulate_grad_batches=2"]
    settings += ["trainer.log_every_n_steps=1"]

    def steps_with(figure: str) -> list[int]:
        return [int(row["step"]) + 1 for row in csv.DictReader((out / "metrics.csv").open()) if row[figure]]

    assert call(train_main, *settings, "trainer.max_steps=5")[0] == 0
    assert steps_with("val/loss") == [5]
    going_on = ["trainer.max_steps=10", "trainer.val_check_interval=4", "ckpt_path=last"]
    assert call(train_main, *settings, *going_on)[0] == 0
    assert steps_with("train/loss") == [6, 7, 8, 9, 10]
    assert steps_with("val/loss") == [5, 8]  # the first again, since the checkpoint was written before it


def test_a_sweep_writes_a_folder_a_job(call, checkpoint, tmp_path):
    settings = ["prompt=a, b ${x}", f"pretrained={checkpoint}", f"output_dir={tmp_path / 'out'}"]
    status, _, complaint = call(predict_main, "-m", "steps=2,3", *settings)
    assert (status, complaint) == (0, "")
    assert [records(tmp_path / "out" / job)[0]["steps"] for job in ("0", "1")] == [2, 3]
    assert not (ROOT / "multirun.yaml").exists()


def test_what_is_not_given_is_a_folder_by_date(call, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SDMODULE_STARTED", "2026-01-02/03-04-05")
    assert call(predict_main, "prompt=a", "steps=1", f"pretrained={checkpoint}")[0] == 0
    assert (tmp_path / "outputs/predict/2026-01-02/03-04-05/grid.png").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]


# ---------------------------------------------------------------------------------------------- what goes wrong


def missing_part(folder):
    shutil.rmtree(folder / "vae")


def truncated_weights(folder):
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def no_weights(folder):
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()


def no_index(folder):
    (folder / "model_index.json").unlink()


def told(result, *words):
    """One sentence on stderr, status 1, and all of the words in it."""
    status, printed, complaint = result
    assert (status, printed) == (1, "")
    assert complaint.startswith("error: ") and complaint.count("\n") == 1 and complaint.endswith("\n")
    assert [word for word in words if word not in complaint] == []


WRONG_PREDICT = {
    "no prompt": (["prompt=null"], ["prompt", "prompts"]),
    "empty list": (["prompt=[]"], ["prompt"]),
    "heavy weight": (["prompt=(a:20)"], ["20", "weight"]),
    "other number of negatives": (["negative_prompt=[a,b,c]"], ["negative_prompt", "3", "1"]),
    "unknown model": (["pretrained=nothing_like_it"], ["nothing_like_it", "tiny", "hub id"]),
    "no network": (["pretrained=owner/name"], ["owner/name", "pretrained=/"]),
    "sd15 without a network": (["experiment=sd15", "pretrained=someone/sd15"], ["someone/sd15", "pretrained=/"]),
    "height": (["height=30"], ["height=30", "multiple of 4", "28", "32"]),
    "no steps": (["steps=0"], ["steps=0", "at least 1"]),
    "negative steps": (["steps=-1"], ["steps=-1", "at least 1"]),
    "too many steps": (["steps=2000"], ["steps=2000", "1000"]),
    "steps in words": (["steps=abc"], ["steps='abc'", "whole number"]),
    "seed beyond torch's": (["seed=18446744073709551615", "num_images_per_prompt=2"], ["18446744073709551616"]),
    "package of a scheduler": (["sampler.scheduler=DPMSolverSDEScheduler"], ["torchsde", "ddim"]),
    "part not there": (["components.vae=nope"], ["components.vae=nope", "not found"]),
    "adapters as a text": (["adapters=my_lora"], ["adapters=my_lora", "[{path: my_lora}]"]),
    "guidance in words": (["guidance_scale=abc"], ["guidance_scale=abc", "number"]),
    "batch in words": (["batch_size=abc"], ["batch_size=abc", "whole number"]),
    "scheduler": (["sampler.scheduler=foo"], ["foo", *SHORT_NAMES]),
    "sampler": (["sampler=foo"], ["sampler/foo", "ddim", "euler"]),
    "unknown key": (["stepz=3"], ["stepz", "did you mean steps"]),
    "unknown nested key": (["sampler.stepz=3"], ["sampler.stepz", "--cfg job"]),
    "scheduler as a key": (["scheduler=euler"], ["did you mean sampler"]),
    "sweep without -m": (["steps=2,3"], ["steps=2,3", "multirun"]),
    "grammar": (["prompts=a(b"], ["a(b"]),
    "mask for text": (["mask=[0,0,8,8]"], ["mask", "model=inpaint"]),
    "strength for text": (["strength=0.5"], ["strength=0.5", "model=inpaint"]),
    "no image": (["model=inpaint"], ["model=inpaint", "image="]),
    "image not there": (["model=inpaint", "image=a.png", "mask=[0,0,8,8]"], ["image=a.png", "not found"]),
    "precision": (["precision=5"], ["trainer", "precision", "5"]),
    "resumed or not": (["resume=no"], ["resume=no", "true or false"]),
    "merged or not": (["merge_adapters=no"], ["merge_adapters=no", "true or false"]),
    "edges or not": (["control_edges=no"], ["control_edges=no", "true or false"]),
}


@pytest.mark.parametrize("name", WRONG_PREDICT)
def test_predict_says_in_one_sentence_what_is_wrong(call, checkpoint, tmp_path, name):
    overrides, words = WRONG_PREDICT[name]
    out = tmp_path / "out"
    told(call(predict_main, "prompt=a", f"pretrained={checkpoint}", f"output_dir={out}", *overrides), *words)
    assert not out.exists()


@pytest.mark.parametrize(
    ("overrides", "alone"),
    [
        (["prompt=a", "speed=turbo", "output_dir=x"], True),
        (["speed=turbo", "pretrained=tiny", "seed=3", "num_images_per_prompt=2"], True),
        (["speed=turbo", "pretrained=other"], False),
        (["speed=turbo", "steps=16"], False),
        (["speed=turbo", "speed.cache_every=3"], False),
        (["speed=turbo", "sampler.eta=1"], False),
        (["speed=turbo", "~tome"], False),
    ],
)
def test_a_presets_figures_are_told_only_where_they_hold(overrides, alone):
    assert preset_alone(overrides) == alone


@pytest.mark.parametrize("damage", [missing_part, truncated_weights, no_weights, no_index])
def test_a_broken_checkpoint_is_named(call, checkpoint, tmp_path, damage):
    folder = shutil.copytree(checkpoint, tmp_path / "broken")
    damage(folder)
    told(call(predict_main, "prompt=a", f"pretrained={folder}", f"output_dir={tmp_path / 'out'}"), str(folder))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", [[], ["-m"]])
def test_an_output_folder_that_cannot_be_written(call, checkpoint, tmp_path, command):
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "out"
    told(
        call(predict_main, *command, "prompt=a", f"pretrained={checkpoint}", f"output_dir={out}"),
        str(tmp_path / "file"),
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(call, checkpoint, tmp_path):
    result = call(predict_main, "prompt=a", f"pretrained={checkpoint}", "trainer=gpu", f"output_dir={tmp_path / 'out'}")
    told(result, "trainer=gpu", "trainer=cpu")


def bad_image(photos):
    (photos / "0.png").write_text("no image")


def absent_image(photos):
    (photos / "0.png").unlink()


def empty(photos):
    shutil.rmtree(photos)
    photos.mkdir()


@pytest.mark.parametrize(("damage", "word"), [(bad_image, "0.png"), (absent_image, "0.png"), (empty, "no images")])
def test_a_bad_folder_of_images_is_told_before_anything_is_written(call, checkpoint, photos, tmp_path, damage, word):
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
    "unknown setting": (["data.root=PHOTOS", "+data.foo=1"], ["data.foo is no setting", "~data.foo"]),
    "a word for data with captions": (
        ["experiment=textual_inversion", "data=huggingface", "data.name=photos"],
        ["data.prompt is no setting", "~data.prompt"],
    ),
    "unknown setting of a callback": (
        ["data.root=PHOTOS", "+callbacks.ema.foo=1"],
        ["callbacks.ema.foo is no setting of EMA", "~callbacks.ema.foo"],
    ),
    "unknown data": (["data=foo"], ["data/foo", "image_folder"]),
    "a seed below 0": (["data.root=PHOTOS", "seed=-1"], ["seed=-1", "4294967295"]),
    "a seed of words": (["data.root=PHOTOS", "seed=abc"], ["seed=abc", "4294967295"]),
    "half a seed": (["data.root=PHOTOS", "training.seed=1.5"], ["training.seed=1.5", "whole number"]),
    "half an image": (["data.root=PHOTOS", "data.batch_size=2.5"], ["data.batch_size=2.5", "at least 1"]),
    "half a process": (["data.root=PHOTOS", "data.num_workers=1.5"], ["data.num_workers=1.5", "at least 0"]),
    "more than all captions": (["data.root=PHOTOS", "objective.caption_dropout=1.5"], ["dropout=1.5", "of at most 1"]),
    "captions of words": (
        ["data.root=PHOTOS", "objective.caption_dropout=abc"],
        ["caption_dropout=abc", "of at most 1"],
    ),
    "a shift of nothing": (["data.root=PHOTOS", "objective.timestep_shift=0"], ["timestep_shift=0", "greater than 0"]),
    "an average of nothing new": (["data.root=PHOTOS", "callbacks.ema.decay=1"], ["ema.decay=1", "less than 1"]),
    "an average of words": (["data.root=PHOTOS", "callbacks.ema.decay=abc"], ["ema.decay=abc", "less than 1"]),
    "half a start": (["data.root=PHOTOS", "callbacks.ema.start_step=1.5"], ["ema.start_step=1.5", "whole number"]),
    "weights in 16 bits": (["data.root=PHOTOS", "trainer.precision=16-true"], ["precision=16-true", "bf16-mixed"]),
    "weights in 64 bits": (["data.root=PHOTOS", "trainer.precision=64-true"], ["precision=64-true", "32-true"]),
    "an autoencoder in 16 bits": (
        ["data.root=PHOTOS", "trainer.precision=16-true", "model=autoencoder", "callbacks=[export]"],
        ["precision=16-true", "bf16-mixed"],
    ),
    "adapters that other devices wait for": (
        ["data.root=PHOTOS", "trainer.strategy=ddp", "tuning=lora", "tuning.method=lokr", "tuning.dropout=0.5"],
        ["tuning.dropout=0.5", "ddp_find_unused_parameters_true"],
    ),
    "an export in bytes": (["data.root=PHOTOS", "callbacks.export.dtype=int8"], ["export.dtype=int8", "float16"]),
    "no images of validation": (
        ["data.root=PHOTOS", "callbacks.samples.num_prompts=0"],
        ["num_prompts=0", "at least 1"],
    ),
    "no seed of validation": (["data.root=PHOTOS", "callbacks.samples.seed=abc"], ["samples.seed=abc"]),
    "no weight in validation": (["data.root=PHOTOS", "callbacks.samples.prompts=['a (cat:30)']"], ["30", "a (cat:30)"]),
    "neither on nor off": (["data.root=PHOTOS", "data.random_flip=no"], ["data.random_flip=no", "true or false"]),
    "compiled or not": (["data.root=PHOTOS", "training.compile=no"], ["training.compile=no", "blocks, none, whole"]),
    "validated first or not": (["data.root=PHOTOS", "validate_first=no"], ["validate_first=no", "true or false"]),
    "no folder at all": (["data.root="], ["data.root=", "names no place"]),
    "a data set of no name": (["data=huggingface", "data.name=null"], ["data.name=None names no place"]),
    "a list in the place of a folder": (
        ["data.root=PHOTOS", "data.val_root=[a,b]"],
        ["data.val_root=['a', 'b']"],
    ),
    "callback not chosen": (
        ["data.root=PHOTOS", "callbacks=[checkpoint]", "+callbacks.samples.num_prompts=2"],
        ["callbacks.samples", "num_prompts", "~callbacks.samples"],
    ),
}


@pytest.mark.parametrize("name", WRONG_TRAIN)
def test_train_says_in_one_sentence_what_is_wrong(call, checkpoint, photos, tmp_path, name):
    overrides, words = WRONG_TRAIN[name]
    overrides = [text.replace("PHOTOS", str(photos)) for text in overrides]
    out = tmp_path / "out"
    told(call(train_main, f"pretrained={checkpoint}", f"output_dir={out}", *overrides), *words)
    assert not out.exists()


def test_a_bad_image_can_be_skipped_with_a_warning(call, checkpoint, photos, tmp_path):
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


def test_the_whole_traceback_is_there_for_who_asks(call, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ValueError, match="steps=0"):
        call(predict_main, "prompt=a", f"pretrained={checkpoint}", "steps=0", f"output_dir={tmp_path / 'out'}")


# ---------------------------------------------------------------------------------------------- real processes


def test_a_prompt_reaches_the_images_letter_for_letter_in_a_real_sweep(checkpoint, tmp_path):
    prompt = "a cat, (fluffy:1.2), 50% off = {fun} ünïcode 'it\\'s' \"q\" \\ ${x} $5 [a] ??? 🦊\n #x: \\"
    command = [sys.executable, ROOT / "predict.py", "-m", f"prompt={prompt}", "negative_prompt=???", "steps=1"]
    command += [f"pretrained={checkpoint}", f"output_dir={tmp_path / 'out'}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    [record] = records(tmp_path / "out" / "0")
    assert (record["prompt"], record["negative_prompt"]) == (prompt, "???")
    assert Image.open(tmp_path / "out" / "0" / record["file"]).text["prompt"] == prompt


def test_an_error_is_all_that_a_process_says(checkpoint, tmp_path):
    command = [sys.executable, ROOT / "predict.py", "prompt=a", "experiment=sd15", f"output_dir={tmp_path / 'out'}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    told((done.returncode, done.stdout, done.stderr), "stable-diffusion-v1-5/stable-diffusion-v1-5", "pretrained=/")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("sent", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_a_checkpoint_and_says_how_to_go_on(call, checkpoint, photos, tmp_path, sent, expected):
    out = tmp_path / "out"
    settings = [f"data.root={photos}", f"pretrained={checkpoint}", "resolution=32", "+steps=1"]
    command = [sys.executable, ROOT / "train.py", *settings, f"output_dir={out}", "trainer.max_steps=100000"]
    process = subprocess.Popen(
        [*command, "trainer.val_check_interval=2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a shell that runs the tests in the background has them ignore Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while not (out / "samples" / "000002.png").is_file() and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(sent)
    _, complaint = process.communicate(timeout=120)
    last = out / "checkpoints" / "last.ckpt"
    assert (process.returncode, complaint.count("\n")) == (expected, 1) and f"ckpt_path={last}" in complaint

    step = torch.load(last, weights_only=True)["global_step"]
    again = [*settings, f"output_dir={tmp_path / 'again'}", f"trainer.max_steps={step + 2}", f"ckpt_path={last}"]
    status, _, complaint = call(train_main, *again)
    assert (status, complaint) == (0, "")
    assert torch.load(tmp_path / "again/checkpoints/last.ckpt", weights_only=True)["global_step"] == step + 2


def test_sigterm_ends_a_prediction_at_once(checkpoint, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, ROOT / "predict.py", "prompt=a", "num_images_per_prompt=100000", "batch_size=1"]
    process = subprocess.Popen(
        [*command, f"pretrained={checkpoint}", "steps=1", f"output_dir={out}"], stderr=subprocess.PIPE, text=True
    )
    while not list(out.glob("images/*.png")) and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, complaint = process.communicate(timeout=120)
    assert (process.returncode, complaint) == (143, f"interrupted: what is done is in {out}\n")
