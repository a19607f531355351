"""Processes that SLURM or torchrun starts: one folder, one log, and a job that is queued or started again goes on."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from benchmarks.forked import FORKED, Command, run_command, run_ranks, start_ranks
from benchmarks.soak import load_results, same
from sdmodule.training.checkpoint_io import is_intact
from sdmodule.training.rank_watch import RankWatch, listen

pytestmark = pytest.mark.slow  # starts two processes several times

STEPS = 24


@pytest.fixture(autouse=True)
def nameless(monkeypatch):
    """As in a shell: no command of this process has named an output folder."""
    monkeypatch.delenv("SDMODULE_STARTED", raising=False)


@pytest.fixture(scope="module")
def common(checkpoint, tmp_path_factory) -> list[str]:
    from tests.faults.conftest import write_scenes

    photos = write_scenes(tmp_path_factory.mktemp("photos") / "scenes", 12)
    settings = [f"pretrained={checkpoint}", f"data.root={photos}", "resolution=32", "data.batch_size=1"]
    settings += [f"trainer.max_steps={STEPS}", "trainer.val_check_interval=10", "callbacks=[checkpoint,ema,export]"]
    return [*settings, "callbacks.checkpoint.every_n_train_steps=2", "progress=false", "trainer=cpu"]


@pytest.fixture(scope="module")
def undisturbed(common, tmp_path_factory):
    """Weights, optimizer, average and export of two processes that nobody disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run_ranks("train", *common, f"output_dir={folder / 'out'}", log=folder / "log")
    return load_results("train", folder / "out")


def start_in_slurm(folder: Path, port: str, *settings: str, **variables: str) -> list[Command]:
    """Two nodes with a process each, as ``srun`` starts them; ``scontrol`` notes how it is called."""
    bin = folder / "bin"
    bin.mkdir(exist_ok=True)
    (bin / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {folder}/scontrol\n')
    (bin / "scontrol").chmod(0o755)
    job = {"SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_JOB_NAME": "train", "SLURM_NODELIST": "127.0.0.1"}
    job |= {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_NNODES": "2", "SLURM_LOCALID": "0"}
    job |= {"MASTER_PORT": port, "PATH": f"{bin}:{os.environ['PATH']}"} | variables
    settings = (*settings, "trainer.devices=1", "trainer.num_nodes=2", "trainer.strategy=ddp")
    return [
        Command(
            "train",
            *settings,
            log=folder / f"log-{rank}",
            environment=job | {"SLURM_PROCID": rank, "SLURM_NODEID": rank},
            preparation=partial(os.chdir, folder),
        )
        for rank in ("0", "1")
    ]


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def test_a_job_of_slurm_that_runs_out_of_time_is_requeued_and_goes_on(common, undisturbed, tmp_path):
    out = tmp_path / "outputs" / "train" / "slurm-4711.0"
    ranks = start_in_slurm(tmp_path, free_port(), *common)
    ranks[0].wait_until((out / "checkpoints" / "last.ckpt").is_file)
    for rank in ranks:
        rank.send(signal.SIGUSR1)
    (status, log), (other, silent) = [rank.wait(60) for rank in ranks]
    assert (status, other) == (128 + signal.SIGUSR1,) * 2, log + silent
    assert "interrupted: what is done is in" in log and "SLURM job 4711 is queued again" in log
    assert (tmp_path / "scontrol").read_text() == "requeue 4711\n"
    reached = torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert 2 <= reached < STEPS

    ended = [rank.wait() for rank in start_in_slurm(tmp_path, free_port(), *common, SLURM_RESTART_COUNT="1")]
    assert [status for status, _ in ended] == [0, 0], ended
    assert "Restarted; resuming from" in ended[0][1] and ended[1][1] == ""
    assert same(load_results("train", out), undisturbed)
    assert [path.name for path in (tmp_path / "outputs" / "train").iterdir()] == ["slurm-4711.0"]


def elastic_rank(arguments: list[str], folder: Path) -> None:
    """What torchrun starts; in its first life, rank 1 is killed after some steps."""
    environment = dict(os.environ)
    log = folder / f"log-{environment['RANK']}-{environment['TORCHELASTIC_RESTART_COUNT']}"

    def be_killed() -> None:
        while not list(folder.glob("outputs/train/*/*/checkpoints/last.ckpt")):
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGKILL)

    def prepare() -> None:
        os.chdir(folder)
        if (environment["RANK"], environment["TORCHELASTIC_RESTART_COUNT"]) == ("1", "0"):
            threading.Thread(target=be_killed, daemon=True).start()

    run_command("train", arguments, environment, log, log, prepare)


def test_torchrun_restarts_a_job_whose_rank_was_killed_and_it_goes_on(common, undisturbed, tmp_path):
    config = LaunchConfig(1, 1, 2, run_id="one", rdzv_backend="c10d", rdzv_endpoint="localhost:0")
    config.max_restarts, config.start_method, config.local_addr = 1, "forkserver", "localhost"
    arguments = [*common, "trainer.devices=2", "trainer.strategy=ddp"]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        elastic_launch(config, elastic_rank)(arguments, tmp_path)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    [out] = (tmp_path / "outputs" / "train").glob("*/*")
    assert "Restarted; resuming from" in (tmp_path / "log-0-1").read_text()
    assert same(load_results("train", out), undisturbed)


def wait_for_others(rank: int, port: int) -> None:
    """A process that waits for another, as in a collective operation, and does not end by itself."""
    watch = RankWatch(rank, None, ("localhost", port), 0, patience=0.2, saving=0.2)
    time.sleep(60)
    watch.leave()


@pytest.mark.parametrize("ends", ["killed", "in order"])
def test_a_process_that_waits_for_one_that_is_gone_ends(tmp_path, ends):
    """Rank 0 is this process: it hears that rank 1 is gone, and tells rank 2."""
    server = listen()
    processes = [FORKED.Process(target=wait_for_others, args=(rank, server.getsockname()[1])) for rank in (1, 2)]
    for process in processes:
        process.start()
    watch = RankWatch(0, server, ("", 0), 2)
    watch.ending()
    if ends == "killed":
        processes[0].kill()
        processes[1].join(20)
        assert processes[1].exitcode == 1
    watch.leave()
    if ends == "in order":
        time.sleep(0.6)
        assert all(process.is_alive() for process in processes)
    for process in processes:
        process.kill()
        process.join()


@pytest.mark.parametrize("killed", [0, 1])
def test_the_process_that_is_left_says_so_and_leaves_a_whole_checkpoint(common, tmp_path, killed):
    out = tmp_path / "out"
    settings = [*common, "trainer.max_steps=100000", "trainer.val_check_interval=100000", f"output_dir={out}"]
    ranks = start_ranks("train", *settings, log=tmp_path / "log")
    assert ranks[killed].kill((out / "checkpoints" / "last.ckpt").is_file)
    status, output = ranks[1 - killed].wait(60)
    lines = output.splitlines()
    assert status == 1 and lines[-1].startswith("error: another process of this run is gone;"), output
    checkpoints = list((out / "checkpoints").glob("*.ckpt"))
    assert checkpoints and all(map(is_intact, checkpoints))


def test_a_folder_is_named_by_time_outside_of_slurm_and_torchrun(monkeypatch):
    from sdmodule.cli.processes import name_start

    def named(**variables: str) -> str | None:
        with monkeypatch.context() as patch:
            patch.delenv("SDMODULE_STARTED", raising=False)
            for name, value in variables.items():
                patch.setenv(name, value)
            name_start()
            return os.environ.get("SDMODULE_STARTED")

    assert time.strptime(named(), "%Y-%m-%d/%H-%M-%S")
    assert time.strptime(
        named(SLURM_JOB_ID="7", SLURM_STEP_ID="4294967291"), "%Y-%m-%d/%H-%M-%S"
    )  # in the batch script
    assert named(SLURM_JOB_ID="7", SLURM_STEP_ID="2") == "slurm-7.2"
    assert named(NODE_RANK="1") is None  # the folder is then called latest, on all nodes
