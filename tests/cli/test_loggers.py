"""What a run logs, read back from the files of the loggers."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sdmodule.cli.csv_logger import AtomicCSVLogger
from sdmodule.cli.main import predict_main, train_main
from tests.cli.test_commands import records, told
from tests.wandb_file import read_run

pytestmark = pytest.mark.slow  # each test runs a command with its loggers


@pytest.fixture(scope="session")
def checkpoint(small_checkpoint):
    return small_checkpoint


COLUMNS = ["prompt", "negative_prompt", "seed", "steps", "guidance_scale", "scheduler", "model", "family"]
COLUMNS += ["tome_ratio", "tome_engine", "seconds", "image"]


def pixels(path):
    return np.asarray(Image.open(path))


def scalars(folder):
    [file] = folder.glob("**/events.*")
    events = EventAccumulator(str(file), size_guidance={"images": 0, "scalars": 0}).Reload()
    return events


def test_predict_logs_images_table_timings_and_configuration(call, checkpoint, tmp_path):
    photo = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 40, 3), dtype=np.uint8)).save(photo)
    out = tmp_path / "out"
    settings = ['prompt=["a red circle","a star"]', "batch_size=1", "steps=2", "seed=7", "tome.ratio=0.5"]
    settings += ["model=inpaint", f"image={photo}", "mask=[0,0,9,9]", "logger=[csv,tensorboard,wandb]"]
    status, printed, complaint = call(predict_main, *settings, f"pretrained={checkpoint}", f"output_dir={out}")
    assert (status, complaint) == (0, "") and "W&B is offline; upload the run with: wandb sync " in printed

    run, captions = read_run(out), ["a red circle · seed 7", "a star · seed 8"]
    assert [value["captions"] for value in run.logged("predict/samples")] == [[caption] for caption in captions]
    assert run.logged("predict/images")[:2] == [1, 2] and run.axes["predict/*"] == "predict/images"
    names = [record["file"] for record in records(out)]
    for [shown], name in zip(run.images("predict/samples"), names, strict=True):
        assert np.array_equal(pixels(shown), pixels(out / name))
    assert len(run.logged("predictions")) == 1
    [artifact] = [a for a in run.artifacts if a.type == "run_table"]
    held = {entry.path: Path(entry.local_path) for entry in artifact.manifest.contents}
    table = json.loads(held["predictions.table.json"].read_text())
    assert table["columns"] == [*COLUMNS, "input_image", "mask"]
    assert [row[:6] for row in table["data"]] == [
        ["a red circle", "", 7, 2, 7.5, "DDIMScheduler"],
        ["a star", "", 8, 2, 7.5, "DDIMScheduler"],
    ]
    assert [row[6:10] for row in table["data"]] == [[str(checkpoint), "Stable Diffusion 1.x and 2.x", 0.5, "exact"]] * 2
    assert all(row[10] > 0 for row in table["data"])
    shown = [pixels(held[row[11]["path"]]) for row in table["data"]]
    assert all(np.array_equal(array, pixels(out / name)) for array, name in zip(shown, names, strict=True))
    assert np.array_equal(pixels(held[table["data"][0][12]["path"]]), pixels(photo))
    assert np.array_equal(np.argwhere(pixels(held[table["data"][0][13]["path"]]))[-1], [8, 8])
    for name in ("seconds_text", "seconds_denoise", "seconds_decode", "seconds_save", "step_seconds_median"):
        assert run.logged(f"predict/{name}")[0] > 0
    assert run.logged("predict/images_per_second")[0] > 0
    assert (run.config["seed"], run.config["pretrained"]) == (7, str(checkpoint))
    assert run.config["tome"]["ratio"] == 0.5

    events = scalars(out / "tensorboard")
    assert [image.step for image in events.Images("predict/samples")] == [1, 2]
    assert events.Scalars("predict/step_seconds_p95")[0].value > 0
    assert "predict/images_per_second" in (out / "metrics.csv").read_text()


def test_train_logs_images_metrics_timings_and_configuration(call, checkpoint, photos, tmp_path):
    out = tmp_path / "out"
    settings = [f"data.root={photos}", f"pretrained={checkpoint}", "resolution=32", "+steps=1", "trainer.max_steps=6"]
    settings += ["trainer.val_check_interval=2", "trainer.log_every_n_steps=1", "callbacks.samples.num_prompts=1"]
    settings += ["logger=[csv,wandb,tensorboard]", "logger.wandb.log_model=true", f"output_dir={out}"]
    settings += ["callbacks.timing.peak_flops=1e12", "callbacks.timing.warmup_steps=2"]
    status, _, complaint = call(train_main, *settings)
    assert (status, complaint) == (0, "")

    run, events = read_run(out), scalars(out / "tensorboard")
    shown = [row for row in run.history if "val/samples" in row]
    assert [row["trainer/global_step"] for row in shown] == [2, 4, 6] and run.axes["*"] == "trainer/global_step"
    assert len({json.dumps(row["val/samples"]["captions"]) for row in shown}) == 1  # the same prompt and seed each time
    assert all(path.is_file() for [path] in run.images("val/samples"))
    assert [image.step for image in events.Images("val/samples")] == [2, 4, 6]
    names = ["samples_per_second", "step_seconds_median", "step_seconds_p95", "data_wait", "peak_memory_gib", "mfu"]
    for key in ("train/loss", *(f"train/{name}" for name in names)):
        assert run.logged(key)[-1] > 0 and events.Scalars(key)[-1].value > 0
    assert run.logged("train/data_wait")[-1] < 1
    assert run.config["pretrained"] == str(checkpoint) and run.config["trainer"]["max_steps"] == 6
    assert {artifact.type for artifact in run.artifacts} == {"model"} and len(run.artifacts) == 2
    timings = json.loads((out / "timings.json").read_text())
    assert timings["steps"] == 6 and timings["warmup"]["steps"] == 2 and timings["step_seconds"]["median"] > 0


def test_the_runs_of_a_sweep_share_a_group(call, checkpoint, tmp_path):
    settings = ["prompt=a", f"pretrained={checkpoint}", "logger=wandb", f"output_dir={tmp_path / 'sweep'}"]
    assert call(predict_main, "-m", "steps=1,2", *settings)[0] == 0
    runs = [read_run(tmp_path / "sweep" / job) for job in "01"]
    assert runs[0].run.run_id != runs[1].run.run_id
    assert runs[0].run.run_group == runs[1].run.run_group == f"{tmp_path.name}/sweep"
    assert [run.config["sampler"]["steps"] for run in runs] == [1, 2]
    assert all(len(run.logged("predictions")) == 1 for run in runs)


@pytest.mark.parametrize("mode", ["disabled", "offline"])
def test_wandb_mode_is_respected(call, checkpoint, tmp_path, monkeypatch, mode):
    monkeypatch.setenv("WANDB_MODE", mode)
    settings = ["prompt=a", "steps=1", f"pretrained={checkpoint}", "logger=wandb", f"output_dir={tmp_path / 'out'}"]
    status, _, complaint = call(predict_main, *settings)
    assert (status, complaint) == (0, "")
    assert bool(list(tmp_path.glob("out/wandb/*/*.wandb"))) == (mode == "offline")
    assert os.environ["WANDB_MODE"] == mode and "WANDB_DATA_DIR" not in os.environ


def test_a_logger_that_is_not_installed_is_reported(call, checkpoint, tmp_path):
    try:
        import mlflow  # noqa: F401
    except ImportError:
        result = call(predict_main, "prompt=a", f"pretrained={checkpoint}", "logger=mlflow", f"output_dir={tmp_path}/o")
        told(result, "logger=mlflow", "sdmodule[mlflow]")
        assert not (tmp_path / "o").exists()


def test_metrics_survive_a_kill_while_a_column_is_added(tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    logger, file = AtomicCSVLogger(tmp_path, name="", version=""), tmp_path / "metrics.csv"
    for step, metrics in enumerate([{"a": 1.0}, {"a": 2.0, "b": 3.0}]):
        logger.log_metrics(metrics, step)
        logger.save()
    with file.open() as lines:
        before = list(csv.DictReader(lines))
    assert [(row["a"], row["b"], row["step"]) for row in before] == [("1.0", "", "0"), ("2.0", "3.0", "1")]
    monkeypatch.setattr(csv.DictWriter, "writerows", killed)
    logger.log_metrics({"c": 4.0}, 2)
    with pytest.raises(KeyboardInterrupt):
        logger.save()
    with file.open() as lines:
        assert list(csv.DictReader(lines)) == before


# ---------------------------------------------------------------------------------------------- what stays private

SECRET = "hf_THISISSECRET"


@pytest.mark.parametrize("name", ["predict", "sweep", "train"])
def test_no_file_of_a_run_holds_a_key_or_the_home_folder(call, checkpoint, photos, tmp_path, monkeypatch, name):
    home = tmp_path / "home" / "ann"
    home.mkdir(parents=True)
    (home / "weights").symlink_to(checkpoint)
    (home / "photos").symlink_to(photos)
    common = [f"pretrained={home}/weights", f"+api_key={SECRET}", f"+service.accessToken={SECRET}"]
    common += [f"+tracking.uri=https://ann:{SECRET}@example.org", f"components.vae={home}/weights/vae"]
    common += [f"+logger.wandb.notes=see {home}/notes.txt", "logger=[csv,tensorboard,wandb]"]
    common += ["logger.wandb.log_model=true", f"output_dir={home}/run"]
    predicting = ["prompt=a", "steps=1"]
    commands = {
        "predict": (predict_main, predicting),
        "sweep": (predict_main, ["-m", "seed=0,1", *predicting]),
        "train": (train_main, [f"data.root={home}/photos", "resolution=32", "trainer.max_steps=2", "+steps=1"]),
    }
    for variable, value in {"HOME": str(home), "WANDB_API_KEY": "", "HF_TOKEN": SECRET}.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.chdir(home)
    main, settings = commands[name]
    status, printed, complaint = call(main, *settings, *common)
    assert (status, complaint) == (0, "") and "W&B is offline (no key was found" in printed
    files = [path for path in (home / "run").rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files) and any(path.name == "config.yaml" for path in files)
    for path in files:
        content = path.read_bytes()
        found = [word for word in (SECRET, str(home)) if word.encode() in content]
        assert not found, f"{path} holds {found}"
    if name == "predict":  # and the image can still be made again
        [image] = (home / "run").glob("images/*.png")
        assert call(predict_main, f"from={image}", f"output_dir={home}/again")[0] == 0
        assert np.array_equal(pixels(home / "again" / "images" / image.name), pixels(image))
