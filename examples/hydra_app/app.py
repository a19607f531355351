"""A Hydra application of its own, which samples with sdmodule's groups.

Example::

    python examples/hydra_app/app.py steps=20 tome=window generator.speed.compile=blocks
"""

from __future__ import annotations

from pathlib import Path

import hydra
from omegaconf import DictConfig


@hydra.main(config_path="conf", config_name="app", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Sample each prompt, and save the images side by side with their prompts as names."""
    generator = hydra.utils.instantiate(cfg.generator)
    folder = Path(cfg.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    images = generator.infer(list(cfg.prompts), seed=cfg.seed)["samples"]
    for prompt, image in zip(cfg.prompts, images, strict=True):
        image.save(folder / f"{prompt}.png")
        print(folder / f"{prompt}.png")


if __name__ == "__main__":
    main()
