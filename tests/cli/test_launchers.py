"""Sweeps whose jobs run side by side in processes of their own, by Hydra's launchers."""

from __future__ import annotations

import csv
import json
import os
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from benchmarks.forked import FORKED, Command
from sdmodule.cli import job_devices
from sdmodule.cli.main import predict_main
from tests.wandb_file import read_run

pytestmark = pytest.mark.slow  # starts processes that import everything


def summary(folder: Path) -> list[dict[str, str]]:
    assert (folder / "index.html").is_file()
    return list(csv.DictReader((folder / "summary.csv").open()))


def pixels(run: Path) -> list[bytes]:
    return [Image.open(file).tobytes() for file in sorted(run.glob("images/*.png"))]


def test_joblib_runs_the_jobs_of_a_sweep(call, tmp_path):
    """In one worker process, one after the other, since that imports everything only once."""
    common = ["prompt=a red circle, (or:1.1) not", "progress=false"]
    sweep = ["-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=1", "steps=1,2,3", "logger=wandb"]
    out = tmp_path / "out"
    status, output = Command("predict", *sweep, *common, f"output_dir={out}", log=tmp_path / "log").wait()
    assert status == 0, output
    assert output.splitlines()[0] == "Starting 3 jobs with hydra/launcher=joblib"
    assert output.splitlines()[-1] == f"Wrote {out}/index.html"
    assert [row["steps"] for row in summary(out)] == ["1", "2", "3"]
    runs = [read_run(out / job).run for job in "012"]
    assert len({run.run_id for run in runs}) == 3 and len({run.run_group for run in runs}) == 1
    assert call(predict_main, "steps=2", *common, f"output_dir={tmp_path / 'alone'}")[0] == 0
    assert pixels(out / "1") == pixels(tmp_path / "alone")


def test_submitit_runs_a_training_of_two_devices_and_names_the_one_that_fails(photos, tmp_path):
    out = tmp_path / "out"
    sweep = ["-m", "hydra/launcher=submitit_local", "trainer.devices=2,0", "trainer.strategy=ddp"]
    sweep += [f"data.root={photos}", "resolution=32", "data.batch_size=1", "trainer.max_steps=2", "progress=false"]
    sweep += ["callbacks=[checkpoint]", "trainer.accelerator=cpu"]
    status, output = Command("train", *sweep, f"output_dir={out}", log=tmp_path / "log").wait()
    lines = output.splitlines()
    assert status == 1 and lines[-1] == f"Wrote {out}/summary.csv and {out}/index.html", output
    assert lines[1].startswith("error: job 1 (trainer.devices=0): trainer: Lightning refuses") and len(lines) == 4
    assert lines[2] == "error: 1 of 2 jobs failed."
    assert [row["job"] for row in summary(out)] == ["0"]
    assert all(float(row["val/loss"]) > 0 for row in summary(out))
    assert not list(out.glob("1/checkpoints"))
    [log] = [text for file in out.glob(".submitit/*/*.out") if "On 2 x cpu" in (text := file.read_text())]
    assert f"writing to {out}/0" in log
    assert torch.load(out / "0" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2


TOLD = {
    "hydra/launcher=joblib output_dir=a,b": "output_dir: has 2 values, which hydra/launcher=joblib cannot sweep;",
    "hydra/launcher=submitit_local hydra.launcher.tasks_per_node=2": "hydra.launcher.tasks_per_node=2: each task would",
    "hydra/launcher=submitit_slurm trainer.devices=2": "set hydra.launcher.tasks_per_node=2.",
}


@pytest.mark.parametrize("words", TOLD)
def test_settings_by_which_jobs_would_disturb_each_other_are_refused(call, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    where = [] if "output_dir" in words else [f"output_dir={tmp_path / 'out'}"]
    status, printed, complaint = call(predict_main, "-m", *words.split(), "steps=1,2", "prompt=a", *where)
    assert (status, printed) == (1, "") and TOLD[words] in complaint and complaint.count("\n") == 1


def test_processes_that_torchrun_has_started_do_not_sweep_side_by_side(call, tmp_path, monkeypatch):
    for name, value in {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "SDMODULE_STARTED": "now"}.items():
        monkeypatch.setenv(name, value)
    words = ["-m", "hydra/launcher=joblib", "steps=1,2", "prompt=a", f"output_dir={tmp_path / 'out'}"]
    status, _, complaint = call(predict_main, *words)
    assert status == 1 and complaint.startswith("error: hydra/launcher=joblib: each process that torchrun or srun")


# ---------------------------------------------------------------------------------------------- GPUs


def config(devices: object, launcher: dict[str, object] | None = None, accelerator: str = "auto"):
    trainer = {"devices": devices, "accelerator": accelerator}
    return OmegaConf.create({"trainer": trainer, "hydra": {"launcher": launcher or {}}})


def claim_and_wait(devices: object, visible: str, place: Path) -> None:
    """A job that claims GPUs of a machine with four, and ends once a file is there."""
    torch.cuda.device_count = lambda: 4 if "CUDA_VISIBLE_DEVICES" not in os.environ else 3
    job_devices.claim_gpus(config(devices), visible or None)
    place.with_suffix(".gpus").write_text(os.environ["CUDA_VISIBLE_DEVICES"])
    while not place.is_file():
        time.sleep(0.01)


def test_jobs_on_one_machine_share_its_gpus(tmp_path, monkeypatch):
    """Names that no other run has, of three GPUs: as a launcher has hidden them from its jobs, and as they were."""
    names = [f"GPU-{tmp_path.name}-{k}" for k in range(3)]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    places = [tmp_path / f"job{k}" for k in range(3)]

    def start(place: Path, devices: int) -> None:
        FORKED.Process(target=partial(claim_and_wait, devices, ",".join(names), place)).start()

    def given(place: Path) -> set[str]:
        deadline = time.monotonic() + 30
        while not (file := place.with_suffix(".gpus")).is_file() or not file.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return set(file.read_text().split(","))

    start(places[0], 1)
    first = given(places[0])
    start(places[1], 2)
    assert len(first) == 1 and given(places[1]) == set(names) - first
    start(places[2], 2)
    time.sleep(0.3)
    assert not places[2].with_suffix(".gpus").exists()  # one of them is not enough
    places[0].touch()
    places[1].touch()
    assert len(given(places[2])) == 2
    places[2].touch()


def test_joblib_starts_as_many_jobs_as_the_gpus_suffice_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for devices, expected in ((1, 4), (2, 2), (3, 1), (-1, 1)):
        chosen = config(devices, {"n_jobs": -1})
        job_devices.check_launcher("joblib", chosen)
        assert chosen.hydra.launcher.n_jobs == expected
    on_cpu = config(1, {"n_jobs": -1}, accelerator="cpu")
    job_devices.check_launcher("joblib", on_cpu)
    assert on_cpu.hydra.launcher.n_jobs == -1
    with pytest.raises(ValueError, match=r"hydra\.launcher\.n_jobs=5: .* 2 jobs with trainer\.devices=2 at a time"):
        job_devices.check_launcher("joblib", config(2, {"n_jobs": 5}))


def test_the_record_of_a_job_holds_no_secret(call, tmp_path):
    from sdmodule.cli.sweep import Sweep

    sweep = Sweep(started="now")
    sweep.record(tmp_path, ["steps=1", "logger.wandb.settings.api_key=abc"], None)
    assert "abc" not in json.dumps(sweep.read_record(tmp_path)) and Sweep(started="now").read_record(tmp_path) is None
