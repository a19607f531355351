"""The speed benchmarks on a small model: their reports, not their figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import growth, run, sampling_speed, sharding, training_speed, xl_step
from sdmodule.components.checkpoint import Components, load_components
from sdmodule.errors import SettingsError


@pytest.fixture(scope="session")
def checkpoint(small_checkpoint):
    return small_checkpoint


ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_sampling_is_measured_beside_its_alternatives(checkpoint, tmp_path):
    file, plot = tmp_path / "speed.json", tmp_path / "speed.png"
    arguments = ["--pretrained", str(checkpoint), "--quick", "--single", "--json", str(file), "--plot", str(plot)]
    result = sampling_speed.run(arguments)
    written = json.loads(file.read_text())
    assert {"command", "hardware", "versions", "rows", "protocol"} <= written.keys()
    assert "float32" in result["protocol"] or "bfloat16" in result["protocol"]
    assert str(tmp_path) not in written["command"]
    rows = {row["variant"]: row for row in written["rows"]}
    assert rows["diffusers"]["images"] == rows["speed=exact"]["images"] == "equal to exact"
    assert rows["diffusers"]["step_over_diffusers"] == rows["diffusers, best recipe"]["step_over_best"] == 1.0
    assert rows["exact, keep_memory=false"]["images"] == "equal to exact"
    assert rows["speed=turbo"]["steps"] < rows["speed=fast"]["steps"] < rows["speed=exact"]["steps"] == 50
    assert all(row["step_seconds"] > 0 and row["image_seconds"] > 0 for row in rows.values())
    assert Image.open(plot).height > 2 * 20 * len(rows) and written["quick"]


@pytest.mark.slow
def test_a_step_of_the_large_family_is_measured_beside_the_recipe(tmp_path):
    written = xl_step.run(["--quick", "--json", str(tmp_path / "step.json")])
    rows = {row["name"]: row for row in json.loads((tmp_path / "step.json").read_text())["rows"]}
    assert len(rows) == 4 and written["quick"]
    assert rows[xl_step.RECIPE]["speedup"] == 1.0 and rows[xl_step.RECIPE]["error"] == 0.0
    assert 0 < rows["speed=rounding"]["error"] < 0.02
    assert all(row["seconds"] > 0 and row["peak_gib"] > 0 for row in rows.values())


@pytest.mark.slow
def test_the_memory_of_processes_that_train_together_is_measured(tmp_path):
    sharding.run(["--quick", "--json", str(tmp_path / "sharding.json")])
    rows = json.loads((tmp_path / "sharding.json").read_text())["rows"]
    state = {(row["strategy"], row["process"]): row["state_mib"] for row in rows}
    assert state.keys() == {(strategy, process) for strategy in ("ddp", "fsdp") for process in (0, 1)}
    assert state["fsdp", 0] < 0.9 * state["ddp", 0]
    assert all(0 < row["before_gib"] < row["step_gib"] for row in rows)


@pytest.mark.slow
def test_training_is_measured_beside_its_alternative(checkpoint, tmp_path, monkeypatch):
    def small(pretrained: str | None, precision: str) -> Components:
        parts = load_components(str(checkpoint))
        for part in (parts.unet, parts.vae, parts.text_encoder):
            part.eval().requires_grad_(False)
        return parts

    monkeypatch.setattr(training_speed, "load", small)
    files = ["--json", str(tmp_path / "t.json"), "--plot", str(tmp_path / "t.png")]
    rows = training_speed.run(["--rounds", "1", "--steps", "1", "--size", "32", *files])["rows"]
    assert json.loads((tmp_path / "t.json").read_text())["rows"] == rows
    assert [row["variant"] for row in rows] == [
        "diffusers' script",
        "cache=all",
        "cache=all, checkpointing=outer",
        "cache=all, checkpointing=all",
        "diffusers' script",
        "cache=all",
    ]
    assert Image.open(tmp_path / "t.png").height > 20 * len(rows)
    assert rows[0]["over_script"] == rows[4]["over_script"] == 1.0 and all(row["peak_memory_gib"] > 0 for row in rows)


@pytest.mark.parametrize(
    ("benchmark", "arguments", "message"),
    [
        (sampling_speed, ["--rounds", "0"], "--rounds 0: must be at least 1"),
        (sampling_speed, ["--fast"], "Unrecognized arguments: --fast"),
        (training_speed, ["--batch", "0"], "--batch 0: must be at least 1"),
        (growth, ["--sizes", "0"], "--sizes 0: must be at least 1"),
    ],
)
def test_a_bad_argument_is_one_sentence(benchmark, arguments, message):
    with pytest.raises(SettingsError, match=message):
        benchmark.run(arguments)


def test_one_command_runs_all_benchmarks(tmp_path):
    every = run.commands(list(run.RUNS), quick=False, results=tmp_path)
    assert all(Path(command[1]).is_file() for command in every)
    quick = run.commands(["sampling"], quick=True, results=tmp_path)
    assert len(quick) == len(run.RUNS["sampling"]) - 1 and all("--quick" in command for command in quick)


def test_a_process_that_fails_is_an_error():
    with pytest.raises(SettingsError, match="no such thing"):
        growth.process("raise SystemExit('no such thing')")
    assert growth.process("print(1 + 1)") == "2"


def test_growth_is_plotted(tmp_path):
    steps = [{"what": "step", "size": 512, "batch": k, "seconds": 2.0 * k, "peak_memory_gib": 1 + k} for k in (1, 2)]
    prompts = [{"what": "prompts", "prompts": k, "seconds": 3.0, "peak_memory_gib": 0.5} for k in (10, 100)]
    failed = {"what": "step", "size": 512, "batch": 16, "failed": "out of memory"}
    growth.draw([*steps, *prompts, failed], tmp_path / "growth.png")
    assert Image.open(tmp_path / "growth.png").width > 1500
