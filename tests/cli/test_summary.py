"""What a training and a sampling say when they end, and whether the command that they print works."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

from sdmodule.cli.main import predict_main, train_main
from sdmodule.cli.next_command import command_line
from sdmodule.components.checkpoint import load_components
from tests.cli.test_commands import records


@pytest.fixture(scope="session")
def checkpoint(small_checkpoint):
    return small_checkpoint


ROOT = Path(__file__).parents[2]
FIGURES = re.compile(
    r"Trained 2 steps in (\d+ seconds?|\d+:\d\d minutes), [\d.]+ images per second, peak memory [\d.]+ GiB"
)


def last_lines(result):
    """The summary of a training that worked, from "Trained" on."""
    status, printed, complaint = result
    assert (status, complaint) == (0, ""), complaint
    lines = printed.splitlines()
    return lines[next(k for k, line in enumerate(lines) if line.startswith("Trained")) :]


def sampled_with(call, line, out, *settings):
    """Run the command that a training has printed; returns the records of its images."""
    command, *arguments = shlex.split(line.removeprefix("Sample with it: "))
    assert command == "sdmodule-predict"
    status, printed, complaint = call(predict_main, *arguments, f"output_dir={out}", "steps=2", *settings)
    assert (status, complaint) == (0, "")
    assert "\nSampled 1 image, " in printed and printed.endswith(f"Wrote {out}/grid.png and {out}/index.html\n")
    return records(out)


KINDS = {
    "full": ([], r"pretrained=\S+/export height=40 width=40 .prompt=.*"),
    "single file": (
        ["callbacks.export.layout=single_file"],
        r"pretrained=\S+/export/model\.safetensors height=40 width=40 .prompt=.*",
    ),
    "lora": (["experiment=lora", "validate_first=false"], r"'adapters=\[\{path: \S+/export\}\]' .*"),
    "lora in peft's layout": (
        ["experiment=lora", "validate_first=false", "callbacks.export.layout=peft"],
        r"'adapters=\[\{path: \S+/export\}\]' .*",
    ),
    "textual inversion": (
        ["experiment=textual_inversion", "tuning.placeholder=<it>", "data.template='a photo of {}'"],
        r"'adapters=\[\{path: \S+/export\}\]' .*'prompt=a photo of <it>'",
    ),
    "controlnet": (["experiment=controlnet"], r"controlnet=\S+/export .*control=\S+\.png control_edges=true .*"),
    "inpaint": (
        ["model=inpaint", "training.inpaint.convert=true"],
        r"pretrained=\S+/export model=inpaint image=\S+\.png 'mask=\[10,12,30,36\]' .*",
    ),
    "autoencoder": (["model=autoencoder"], r"components\.vae=\S+/export/vae .*"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_training_ends_with_figures_and_the_command_that_samples(call, checkpoint, photos, tmp_path, kind):
    settings, expected = KINDS[kind]
    out = tmp_path / "my_run"
    common = [f"data.root={photos}", f"pretrained={checkpoint}", f"output_dir={out}", "resolution=40", "cache=none"]
    common += ["trainer.max_steps=2", "trainer.accumulate_grad_batches=1", "data.batch_size=2", "progress=false"]
    common.append("++steps=2")
    lines = last_lines(call(train_main, *settings, *common))
    assert FIGURES.fullmatch(lines[0]), lines[0]
    assert lines[-2] == f"Wrote {out}; the export is {out}/export"
    assert re.search(expected, lines[-1]), lines[-1]
    metric = "val/psnr" if kind == "autoencoder" else "val/loss"
    if kind == "textual inversion":
        assert len(lines) == 3
    else:
        assert re.fullmatch(rf"{metric}: [\d.]+ after", lines[1]), lines
    [record] = sampled_with(call, lines[-1], tmp_path / "sampled", "batch_size=1")
    assert record["prompt"].startswith("image ") or "<it>" in record["prompt"]


@pytest.mark.slow
def test_validation_losses_are_told_from_where_they_were_measured(call, checkpoint, photos, tmp_path):
    out = tmp_path / "out"
    common = [f"data.root={photos}", f"pretrained={checkpoint}", f"output_dir={out}", "resolution=32", "progress=false"]
    common.append("+steps=2")
    lines = last_lines(call(train_main, *common, "trainer.max_steps=2", "validate_first=true"))
    assert re.fullmatch(r"val/loss: [\d.]+ before, [\d.]+ after", lines[1])
    common += ["trainer.val_check_interval=2", "ckpt_path=last"]
    lines = last_lines(call(train_main, *common, "trainer.max_steps=7", "callbacks=[checkpoint]"))
    assert re.fullmatch(r"Trained 5 steps in [\w: ]+", lines[0]), "without timings, none are told"
    assert re.fullmatch(r"val/loss: [\d.]+ at step 2, [\d.]+ at step 6", lines[1])
    assert lines[2:] == [f"Wrote {out}"], "and without an export there is nothing to sample with"


def test_a_finished_training_writes_another_layout(call, checkpoint, photos, tmp_path):
    out = tmp_path / "out"
    common = [f"data.root={photos}", f"pretrained={checkpoint}", f"output_dir={out}", "resolution=32", "progress=false"]
    common += ["trainer.max_steps=1", "callbacks=[checkpoint,export]"]
    assert call(train_main, *common)[0] == 0
    again = [*common, "ckpt_path=last", "callbacks.export.layout=single_file"]
    status, printed, complaint = call(train_main, *again)
    assert (status, complaint) == (0, "") and f"pretrained={out}/export/model.safetensors" in printed
    folder, file = (load_components(str(place)) for place in (out / "export", out / "export" / "model.safetensors"))
    assert all(torch.equal(value, file.unet.state_dict()[key]) for key, value in folder.unet.state_dict().items())
    assert "nothing is left to train" in call(train_main, *again)[2]


def test_captions_reach_the_printed_command_letter_for_letter(call, checkpoint, photos, tmp_path):
    caption = 'it\'s a [clock] (12:30), "$HOME" ${x} & more'
    rows = [{"file_name": f"{k}.png", "text": caption} for k in range(6)]
    (photos / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [f"data.root={photos}", f"pretrained={checkpoint}", f"output_dir={tmp_path / 'out'}", "resolution=32"]
    lines = last_lines(call(train_main, *settings, "trainer.max_steps=1", "callbacks=[export]"))
    assert lines[0].startswith("Trained 1 step in ")
    [record] = sampled_with(call, lines[-1], tmp_path / "sampled")
    assert record["prompt"] == caption.replace("(", r"\(").replace(")", r"\)")


def test_a_training_of_one_step_is_announced_in_the_singular(call, checkpoint, photos, tmp_path):
    settings = [f"data.root={photos}", f"pretrained={checkpoint}", f"output_dir={tmp_path / 'out'}", "resolution=32"]
    status, printed, _ = call(train_main, *settings, "trainer.max_steps=1", "callbacks=[]")
    assert status == 0 and "parameters for 1 step; writing to" in printed


def test_commands_are_printed_in_the_words_that_started_the_process(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "orig_argv", [".venv/bin/python", "train.py", "x=1"])
    monkeypatch.setattr(sys, "argv", ["train.py", "x=1"])
    assert command_line("predict", "prompt=a b") == ".venv/bin/python predict.py 'prompt=a b'"
    monkeypatch.setattr(sys, "argv", ["../my clone/train.py"])
    assert command_line("predict") == ".venv/bin/python '../my clone/predict.py'"

    for name in ("sdmodule-train", "sdmodule-predict"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "sdmodule-train")])
    monkeypatch.setenv("PATH", "/usr/bin")
    assert command_line("predict") == f"{tmp_path}/sdmodule-predict"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert command_line("predict") == "sdmodule-predict"


def test_a_resumed_sampling_counts_what_it_has_sampled(call, checkpoint, tmp_path):
    out = tmp_path / "out"
    settings = ['prompt=["a","b","c"]', "batch_size=1", "steps=1", f"pretrained={checkpoint}", f"output_dir={out}"]
    assert call(predict_main, *settings)[1].splitlines()[1].startswith("Sampled 3 images, ")
    (out / "images" / "00001-1.png").unlink()
    lines = call(predict_main, *settings, "resume=true")[1].splitlines()[1:]
    assert lines[0] == "Resuming: 2 of 3 images are there" and lines[1].startswith("Sampled 1 image, ")
    assert call(predict_main, *settings, "resume=true")[1].splitlines()[2] == "Sampled 0 images"


def test_words_that_the_embedded_model_never_saw_are_named_once(call, checkpoint, tmp_path):
    common = ["steps=1", "progress=false", f"output_dir={tmp_path / 'out'}", "num_images_per_prompt=2"]
    printed = call(predict_main, "prompt=a (red:1.2) cat on a sofa, at night", *common)[1]
    assert printed.splitlines()[1] == (
        'pretrained=tiny never saw "cat", "sofa", "night"; it draws circles, diamonds, hearts, squares, stars, '
        'triangles, such as "a red circle on a blue background".'
    )
    known = "prompt=a small (red:1.2) star at the top on an orange background"
    assert "never saw" not in call(predict_main, known, *common)[1]
    assert "never saw" not in call(predict_main, "prompt=a cat", f"pretrained={checkpoint}", *common)[1]
