"""Sample a file of prompts on a Ray cluster: with Ray Data, one actor per GPU, or several that share processors.

Image k is drawn from ``seed + k``, as by ``predict.py``, whichever actor samples it. Images that are there already are
left out, so the program may be started again. The output folder must be one that all machines write to.

Example::

    python examples/ray_data.py prompts.txt my_images --actors 8 --gpus 1
    python examples/ray_data.py prompts.txt my_images --actors 2 --cpus 0.5
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import ray


class Sampler:
    """An actor: loads the model once, and samples batches of prompts.

    Args:
        folder: where the images are written.
        pretrained: the checkpoint.
        steps: denoising steps.
        seed: seed of the first image.
    """

    def __init__(self, folder: str, pretrained: str, steps: int, seed: int) -> None:
        import torch

        from sdmodule import StableDiffusionModule

        self.folder, self.steps, self.seed = Path(folder), steps, seed
        self.sd = StableDiffusionModule.from_pretrained(pretrained).to("cuda" if torch.cuda.is_available() else "cpu")

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Sample a batch; returns its indices and the files that were written."""
        import torch

        generators = [torch.Generator().manual_seed(self.seed + int(index)) for index in batch["index"]]
        options = {"num_inference_steps": self.steps, "generator": generators, "show_progress": False}
        images = self.sd.infer([str(prompt) for prompt in batch["prompt"]], **options)["samples"]
        files = [name(self.folder, int(index), self.seed) for index in batch["index"]]
        for image, file in zip(images, files, strict=True):
            aside = file.with_suffix(".part")
            image.save(aside, format="png")
            aside.rename(file)  # an actor that is killed leaves no half image
        return {"index": batch["index"], "file": list(map(str, files))}


def name(folder: Path, index: int, seed: int) -> Path:
    """File of an image, called as ``predict.py`` calls it."""
    return folder / f"{index:05d}-{seed + index}.png"


def main(
    prompts: str,
    folder: str,
    pretrained: str = "tiny",
    steps: int = 50,
    seed: int = 0,
    batch_size: int = 4,
    actors: int = 1,
    gpus: float = 0,
    cpus: float = 1,
) -> list[str]:
    """Sample all prompts of a file, one per line; returns the new files.

    Args:
        prompts: the file.
        folder: where the images are written.
        pretrained: the checkpoint, where every machine finds it.
        steps: denoising steps.
        seed: seed of the first image.
        batch_size: prompts per call.
        actors: how many there are.
        gpus: GPUs of each; a fraction lets several share one.
        cpus: processors of each; likewise.
    """
    place = Path(folder).absolute()
    place.mkdir(parents=True, exist_ok=True)
    lines = [line.strip() for line in Path(prompts).read_text(encoding="utf-8").splitlines() if line.strip()]
    left = [{"index": k, "prompt": line} for k, line in enumerate(lines) if not name(place, k, seed).is_file()]
    print(f"{len(left)} of {len(lines)} images are left to sample")
    if not left:
        return []
    model = {"folder": str(place), "pretrained": pretrained, "steps": steps, "seed": seed}
    pool = ray.data.ActorPoolStrategy(size=actors)
    # blocks of a batch each, so that there is work for all actors
    data = ray.data.from_items(left, override_num_blocks=-(-len(left) // batch_size))
    sampled = data.map_batches(
        Sampler, fn_constructor_kwargs=model, batch_size=batch_size, compute=pool, num_gpus=gpus, num_cpus=cpus
    )
    files = [row["file"] for row in sorted(sampled.take_all(), key=lambda row: row["index"])]
    print(f"Sampled {len(files)} images with {actors} actors; they are in {place}")
    return files


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Sample a file of prompts with Ray Data.")
    parser.add_argument("prompts", help="file with one prompt per line")
    parser.add_argument("folder", help="where the images are written")
    for option, default in (("pretrained", "tiny"), ("steps", 50), ("seed", 0), ("batch_size", 4), ("actors", 1)):
        parser.add_argument(f"--{option.replace('_', '-')}", type=type(default), default=default)
    for option, default in (("gpus", 0.0), ("cpus", 1.0)):
        parser.add_argument(f"--{option}", type=float, default=default, help="of each actor; may be a fraction")
    main(**vars(parser.parse_args()))
