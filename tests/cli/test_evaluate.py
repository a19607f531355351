"""The evaluate command on real runs: figures, files, the page; and a sentence for whatever cannot be scored."""

import json
import shutil
import subprocess
import sys

import pytest

from sdmodule.cli.main import evaluate_main
from tests.chromium import PROGRAM, Page

PROMPTS = '["a red circle", "a blue star", "a green heart"]'


@pytest.fixture(scope="module")
def runs(checkpoint, tmp_path_factory):
    """Two runs with the same prompts and seeds, and other steps."""
    from sdmodule.cli import main

    folder = tmp_path_factory.mktemp("runs")
    for name, steps in (("one", 1), ("two", 2)):
        command = [f"prompt={PROMPTS}", f"pretrained={checkpoint}", f"steps={steps}", f"output_dir={folder / name}"]
        before, sys.argv = sys.argv, ["command", *command, "num_images_per_prompt=2"]
        try:
            main.predict_main()
        finally:
            sys.argv = before
    return folder


@pytest.fixture
def evaluated(call, clip_folder):
    """Evaluate; returns what was printed, and the error of a command that failed."""

    def run(*arguments):
        status, printed, error = call(evaluate_main, f"scorer={clip_folder}", "resamples=50", *arguments)
        assert status == (1 if error else 0)
        assert not error or (error.startswith("error: ") and error.count("\n") == 1), error
        return printed, error

    return run


def test_a_run_is_scored_with_its_prompts(evaluated, runs, tmp_path):
    run = shutil.copytree(runs / "one", tmp_path / "run")
    printed, _ = evaluated(f"run={run}", "batch_size=4")
    result = json.loads((run / "evaluation.json").read_text())
    assert result["images"] == 6 and result["prompts"] == 3 and result["confidence"] == 0.95
    figures = result["metrics"]
    assert figures.keys() == {"clip_score", "retrieval_top1"}
    for name, figure in figures.items():
        assert figure["low"] <= figure["value"] <= figure["high"] and name in printed
    assert "retrieval_top5 needs more than 5 prompts; there are 3." in printed
    page = (run / "index.html").read_text()
    assert '"clip_score"' in page and result["scorer"] in page
    evaluated(f"run={run}", "batch_size=1")
    again = json.loads((run / "evaluation.json").read_text())["metrics"]
    assert again["clip_score"]["value"] == pytest.approx(figures["clip_score"]["value"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(PROGRAM is None, reason="there is no Chromium here; apt-get install chromium")
def test_the_page_shows_the_figures(evaluated, runs, tmp_path):
    run = shutil.copytree(runs / "one", tmp_path / "run")
    evaluated(f"run={run}", f"against={runs / 'two'}")
    browser = Page(tmp_path / "profile")
    try:
        browser.open((run / "index.html").as_uri())
        shown = browser.run("document.querySelector('#evaluation').innerText")
        browser.screenshot(tmp_path / "page.png")
    finally:
        browser.close()
    assert "clip score difference" in shown and "95% intervals; scorer" in shown
    assert not browser.messages


def test_two_runs_are_compared_image_by_image(evaluated, runs, tmp_path):
    printed, _ = evaluated(f"run={runs / 'one'}", f"against={runs / 'two'}", f"output_dir={tmp_path}")
    figures = json.loads((tmp_path / "evaluation.json").read_text())["metrics"]
    difference = figures["clip_score"]["value"] - figures["clip_score_against"]["value"]
    assert figures["clip_score_difference"]["value"] == pytest.approx(difference)
    assert {"fid", "kid", "cmmd", "precision", "recall", "density", "coverage"} < figures.keys()
    assert "FID is of 6 images and 16 features: it needs more images than features" in printed
    assert "not of the same prompts" not in printed
    assert not (tmp_path / "index.html").exists()


def test_a_run_against_itself_differs_in_nothing(evaluated, runs, tmp_path):
    evaluated(f"run={runs / 'one'}", f"against={runs / 'one'}", f"output_dir={tmp_path}")
    figures = json.loads((tmp_path / "evaluation.json").read_text())["metrics"]
    for name in ("clip_score_difference", "fid", "cmmd"):
        assert figures[name]["value"] == pytest.approx(0, abs=1e-4)
    assert figures["precision"]["value"] == figures["recall"]["value"] == figures["coverage"]["value"] == 1


def test_images_without_prompts_are_compared_alone(evaluated, photos, runs, tmp_path):
    evaluated(f"run={photos}", f"against={runs / 'one'}", f"output_dir={tmp_path}")
    assert "clip_score" not in json.loads((tmp_path / "evaluation.json").read_text())["metrics"]


def test_images_moved_out_of_a_run_keep_their_prompts(evaluated, runs, tmp_path):
    shutil.copytree(runs / "one" / "images", tmp_path / "images")
    printed, _ = evaluated(f"run={tmp_path / 'images'}", f"against={runs / 'two'}")
    assert json.loads((tmp_path / "images" / "evaluation.json").read_text())["prompts"] == 3
    assert "not of the same prompts" not in printed


def test_differing_runs_are_said_to_differ(evaluated, runs, tmp_path):
    fewer = shutil.copytree(runs / "two", tmp_path / "fewer")
    lines = (fewer / "predictions.jsonl").read_text().splitlines()
    (fewer / "predictions.jsonl").write_text("\n".join(lines[:1]) + "\n")
    printed, _ = evaluated(f"run={runs / 'one'}", f"against={fewer}", f"output_dir={tmp_path / 'out'}")
    assert "The 6 and 1 images are not of the same prompts and seeds" in printed
    assert "FID, KID and CMMD need at least 2 images on each side; there are 6 and 1." in printed


def test_what_cannot_be_scored_ends_in_one_sentence(evaluated, runs, photos, checkpoint, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "training" / "checkpoints").mkdir(parents=True)
    missing = shutil.copytree(runs / "one", tmp_path / "missing")
    next((missing / "images").iterdir()).unlink()
    damaged = shutil.copytree(photos, tmp_path / "damaged")
    (damaged / "0.png").write_bytes((damaged / "0.png").read_bytes()[:40])
    outside = shutil.copytree(runs / "one", tmp_path / "outside")
    (outside / "predictions.jsonl").write_text('{"file": "../missing/grid.png", "prompt": "a"}\n')
    cases = {
        (f"run={tmp_path / 'nothing'}",): "not found; give the folder of a predict run",
        (f"run={tmp_path / 'empty'}",): "has no images",
        (f"run={photos / '0.png'}",): "is a file",
        (f"run={photos}",): "its images have no prompts; give a predict run, or against=FOLDER",
        (f"run={checkpoint}",): "is a checkpoint, without images",
        (f"run={tmp_path / 'training'}",): "is the folder of a training",
        (f"run={runs}",): "has 2 runs; give one of them, such as",
        (f"run={missing}",): "names 6 images, and 1 of them are missing, such as images/",
        (f"run={outside}",): "which is not in it",
        (f"run={damaged}", f"against={photos}"): "0.png cannot be read",
        (f"run={runs / 'one'}", f"against={tmp_path / 'empty'}"): f"against={tmp_path / 'empty'}: has no images",
        (f"run={runs / 'one'}", "inception=weights.pth"): "is for distances; give against=FOLDER too",
        (f"run={runs / 'one'}", f"against={photos}", "inception=weights.pth"): "inception=weights.pth: not found",
        (f"run={runs / 'one'}", "device=tpu"): "device=tpu: there is no such device; choose one of auto, cpu",
        (f"run={runs / 'one'}", "batch_size=0"): "batch_size=0: must be a whole number of at least 1",
        (): "error: run: missing; add run=… to the command.",
        (f"run={runs / 'one'}", "steps=3"): "steps=3: is for predict.py",
    }
    for arguments, message in cases.items():
        _, error = evaluated(*arguments)
        assert message in error, (arguments, error)


def test_a_folder_alone_is_told_its_key(call, runs):
    status, _, error = call(evaluate_main, runs / "one")
    assert status == 1 and f"settings are written as key=value; write run={runs / 'one'}" in error


def test_python_runs_it_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "sdmodule.evaluate", "--help"], capture_output=True, text=True, check=True
    )
    assert "scorer" in done.stdout and "against=null" in done.stdout
