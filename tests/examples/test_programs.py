"""The programs of examples/ run: someone else's Hydra application, a plain Lightning script, LightningCLI."""

from __future__ import annotations

import runpy
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks.forked import output_of
from sdmodule.cli.main import predict_main
from sdmodule.data.toy.scenes import caption, render, sample_scene

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = pytest.mark.slow


def run_program(name: str, arguments: list[str]) -> None:
    sys.argv = [name, *arguments]
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def run_main(name: str, **settings: object) -> None:
    runpy.run_path(str(EXAMPLES / name))["main"](**settings)


def test_a_hydra_application_composes_single_groups(checkpoint, tmp_path):
    settings = ["steps=2", "tome=window", f"+pretrained={checkpoint}", f"output_dir={tmp_path / 'out'}"]
    output = output_of(partial(run_program, "hydra_app/app.py", settings), tmp_path / "log")
    images = sorted((tmp_path / "out").iterdir())
    assert [image.stem for image in images] == [
        "a green star on a white background",
        "a red circle on a blue background",
    ]
    assert all(str(image) in output for image in images)
    assert len({Image.open(image).tobytes() for image in images}) == 2


def test_a_lightning_script_trains_a_second_module_beside_ours(tmp_path):
    output = output_of(partial(run_main, "lightning_script.py", steps=2), tmp_path / "log")
    assert "of the images have their color" in output


def test_lightning_cli_trains_with_the_module_and_data(checkpoint, tmp_path):
    import random

    photos = tmp_path / "photos"
    photos.mkdir()
    for k in range(4):
        scene = sample_scene(random.Random(k))
        render(scene, 32).save(photos / f"{k}.png")
        (photos / f"{k}.txt").write_text(caption(scene))
    arguments = ["fit", f"--model.pretrained={checkpoint}", f"--data.root={photos}", "--data.resolution=32"]
    arguments += [
        "--data.batch_size=2",
        "--model.tuning.kind=lora",
        "--trainer.max_steps=2",
        "--trainer.accelerator=cpu",
    ]
    arguments += [f"--trainer.default_root_dir={tmp_path}", "--trainer.logger=false"]
    output_of(partial(run_program, "lightning_cli.py", arguments), tmp_path / "log")
    [saved] = (tmp_path / "checkpoints").glob("*.ckpt")
    weights = torch.load(saved, weights_only=True)["state_dict"]
    assert weights and all("lora_" in name for name in weights)


def ray_on_one_machine(prompts: Path, folder: Path, pretrained: Path) -> None:
    """A local cluster of two processors, of which each of two actors takes half."""
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    run_main(
        "ray_data.py", prompts=prompts, folder=folder, pretrained=str(pretrained), steps=2, batch_size=2, seed=3,
        actors=2, cpus=0.5,
    )  # fmt: skip
    ray.shutdown()


@pytest.mark.skipif(find_spec("ray") is None, reason="needs sdmodule[ray]: 240 MB that no other test uses")
def test_ray_samples_the_images_of_predict(call, checkpoint, tmp_path):
    prompts, folder = tmp_path / "prompts.txt", tmp_path / "images"
    prompts.write_text("a red circle\na blue star\na green heart\na small square\n")
    settings = [f"prompts={prompts}", "steps=2", "seed=3", f"pretrained={checkpoint}", "batch_size=2"]
    assert call(predict_main, *settings, f"output_dir={tmp_path / 'out'}")[0] == 0
    wanted = {file.name: Image.open(file).tobytes() for file in (tmp_path / "out" / "images").iterdir()}
    folder.mkdir()
    (folder / "00002-5.png").write_bytes((tmp_path / "out" / "images" / "00002-5.png").read_bytes())
    output = output_of(partial(ray_on_one_machine, prompts, folder, checkpoint), tmp_path / "log")
    assert "3 of 4 images are left to sample" in output
    sampled = {file.name: Image.open(file).tobytes() for file in folder.iterdir()}
    assert sampled == wanted
