"""Rows 15, 19, 35 and 40: numbers of steps, W&B without a key, two runs in one folder, ranks by pattern."""

from __future__ import annotations

import csv
import re
import signal

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.forked import Command
from sdmodule.cli.main import predict_main, train_main
from sdmodule.errors import SettingsError
from sdmodule.io import folder_lock
from sdmodule.io.folder_lock import folder_locked
from sdmodule.training.optimizers import Optimization
from tests.reported.drawing import numbered


@pytest.fixture(scope="session")
def checkpoint(small_checkpoint):
    return small_checkpoint


# ---------------------------------------------------------------------------------------------- row 15


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        (["trainer.max_epochs=1"], 8),
        (["trainer.max_epochs=2", "trainer.accumulate_grad_batches=3"], 6),
        (["trainer.max_epochs=50", "trainer.max_steps=3"], 3),
    ],
)
def test_row_15_epochs_announce_and_take_their_own_number_of_steps(call, checkpoint, tmp_path, settings, steps):
    folder = numbered(tmp_path / "photos", 9)
    common = [f"pretrained={checkpoint}", f"data.root={folder}", "resolution=32", "data.batch_size=1"]
    common += ["data.val_fraction=0.1", "callbacks=[checkpoint]", "validate_first=false"]
    status, printed, errors = call(train_main, *common, *settings, f"output_dir={tmp_path / 'out'}")
    assert status == 0, errors
    assert f"parameters for {steps} steps;" in printed
    with (tmp_path / "out" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows[-1]["val/loss"] and int(rows[-1]["step"]) == steps - 1, "steps are counted from 0"
    last = torch.load(tmp_path / "out" / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == steps


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (
            lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50),
            r"CosineAnnealingLR reaches its minimum after 50 of 100 steps and rises again; set its T_max=100",
        ),
        (
            lambda optimizer: torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=50),
            r"PolynomialLR ends after 50 of 100 steps",
        ),
    ],
)
def test_row_15_a_schedule_that_ends_early_is_said(schedule, message):
    with pytest.warns(UserWarning, match=message):
        Optimization(None, schedule).check([torch.nn.Parameter(torch.ones(2))], 100)


# ---------------------------------------------------------------------------------------------- row 19


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"WANDB_MODE": "online"}, ["logger=wandb: found no key of W&B", "wandb login", "WANDB_MODE=offline"]),
        ({"WANDB_MODE": "online", "WANDB_API_KEY": "short"}, ["logger=wandb: W&B refuses the run", "WANDB_API_KEY"]),
        ({"WANDB_MODE": "onlyne"}, ["WANDB_MODE=onlyne: unknown; choose one of disabled, offline, online"]),
    ],
)
def test_row_19_wandb_that_refuses_a_run_is_one_sentence(checkpoint, tmp_path, environment, words):
    settings = ["prompt=a", "steps=1", "logger=wandb", f"pretrained={checkpoint}", f"output_dir={tmp_path / 'out'}"]
    home = {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc")}
    one = Command("predict", *settings, log=tmp_path / "log", environment={**home, **environment})
    status, output = one.wait()
    lines = [line for line in output.splitlines() if line.startswith("error: ")]
    assert status == 1 and "Traceback" not in output and len(lines) == 1, output
    assert all(word in lines[0] for word in words)


@pytest.mark.slow
def test_row_19_an_offline_run_that_is_resumed_is_the_same_run(call, checkpoint, tmp_path):
    folder = numbered(tmp_path / "photos", 4)
    common = [f"pretrained={checkpoint}", f"data.root={folder}", "resolution=32", "data.val_fraction=0"]
    common += ["callbacks=[checkpoint]", "logger=wandb", f"output_dir={tmp_path / 'out'}"]
    assert call(train_main, *common, "trainer.max_steps=1")[0] == 0
    assert call(train_main, *common, "trainer.max_steps=2", "ckpt_path=last")[0] == 0
    names = [path.name for path in (tmp_path / "out" / "wandb").glob("offline-run-*")]
    assert len({name.split("-")[3] for name in names}) == 1, names  # a second one of this second ends in -1


# ---------------------------------------------------------------------------------------------- row 35


def test_row_35_two_runs_do_not_share_a_folder_and_a_killed_one_leaves_no_lock(call, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_lock, "PATIENCE", 0.5)
    out = tmp_path / "out"
    common = [f"pretrained={checkpoint}", "steps=1", f"output_dir={out}"]
    first = Command(
        "predict", "prompt=a", *common, "num_images_per_prompt=100000", "batch_size=1", log=tmp_path / "log"
    )
    first.wait_until(lambda: bool(list(out.glob("images/*.png"))))
    before = sorted(path.name for path in out.iterdir())
    status, _, errors = call(predict_main, "prompt=b", *common)
    assert status == 1 and f"output_dir={out}: another run is writing to this folder" in errors
    assert sorted(path.name for path in out.iterdir()) == before
    first.send(signal.SIGKILL)
    first.wait()
    assert call(predict_main, "prompt=b", *common)[0] == 0


def test_row_35_a_folder_can_be_locked_again_at_once(tmp_path):
    for _ in range(2):
        with folder_locked(tmp_path / "out"), pytest.raises(SettingsError, match="another run"):
            with folder_locked(tmp_path / "out", patience=0.1):
                pass
    assert list((tmp_path / "out").iterdir()) == []


def test_row_35_torchrun_without_a_strategy_is_refused(call, checkpoint, tmp_path, monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    status, _, errors = call(predict_main, "prompt=a", f"pretrained={checkpoint}", f"output_dir={tmp_path / 'out'}")
    assert status == 1 and "torchrun started 2 processes, and each would train alone; add" in errors
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------- row 40


@pytest.mark.slow
def test_row_40_rank_and_alpha_by_pattern(call, checkpoint, tmp_path):
    folder = numbered(tmp_path / "photos", 2)
    common = [f"pretrained={checkpoint}", f"data.root={folder}", "resolution=32", "data.val_fraction=0"]
    patterns = ["tuning.rank_pattern={attn2.to_k: 8, to_v: 2}", "tuning.alpha_pattern={to_v: 6}"]
    settings = ["tuning=lora", *patterns, "trainer.max_steps=1", "callbacks=[export]", f"output_dir={tmp_path / 'out'}"]
    status, _, errors = call(train_main, *common, *settings)
    assert status == 0, errors
    weights = load_file(tmp_path / "out" / "export" / "kohya.safetensors")
    ranks = {key: len(value) for key, value in weights.items() if key.endswith("lora_down.weight")}
    alphas = {key: float(value) for key, value in weights.items() if key.endswith("alpha")}
    wanted = {"attn2_to_k": (8, 8.0), "to_v": (2, 6.0), "to_q": (4, 4.0), "attn1_to_k": (4, 4.0)}
    for name, (rank, alpha) in wanted.items():
        own = [key for key in ranks if re.search(rf"{name}\.lora_down", key)]
        assert own and {ranks[key] for key in own} == {rank}
        assert {alphas[key.replace("lora_down.weight", "alpha")] for key in own} == {alpha}
