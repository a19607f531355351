"""Write the files that `test_files_of_0_1_0.py` reads, as version 0.1.0 writes them.

Run it once, with 0.1.0, and never again: what later versions must read is what 0.1.0 wrote::

    python tests/compatibility/make.py
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from sdmodule.components.checkpoint import Components  # noqa: E402
from sdmodule.components.save import save_components  # noqa: E402
from sdmodule.data.toy.scenes import caption, render, sample_scene  # noqa: E402
from sdmodule.data.toy.tokenizer import scene_captions, write_tokenizer  # noqa: E402

FOLDER = Path(__file__).parent / "0.1.0"
ADAPTER = "pytorch_lora_weights.safetensors"
LARGEST = 300_000
"""Bytes that all files may have together."""

TRAIN = ["pretrained=base", "data.root=photos", "resolution=32", "tuning=lora", "tuning.rank=2", "data.batch_size=2"]
TRAIN += ["callbacks=[checkpoint,ema,export]", "callbacks.ema.start_step=1", "model.optimizer.lr=1e-3", "logger=none"]
PREDICT = [
    "pretrained=base",
    'prompt=["a red circle","a (blue:1.3) star"]',
    "num_images_per_prompt=2",
    "steps=4",
    "seed=3",
]
PREDICT += ["negative_prompt=a heart", "sampler=euler_a", "tome.ratio=0.5"]
PREDICT += ["callbacks=[predictions,timing,images]"]


def write_base(folder: Path) -> None:
    """A diffusers folder of a tiny model with random weights."""
    torch.manual_seed(0)
    write_tokenizer(folder / "tokenizer", scene_captions(200), size=560)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(4, 8),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D",) * 2,
        mid_block_type=None,
        layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=8,
        norm_num_groups=2,
    )
    vae = AutoencoderKL(
        block_out_channels=(4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=32,
    )
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    parts = {"unet": unet, "vae": vae, "text_encoder": CLIPTextModel(text), "tokenizer": tokenizer}
    save_components(Components(**parts, scheduler=scheduler, source="base"), folder)


def write_photos(folder: Path) -> None:
    """Four images with captions."""
    folder.mkdir()
    for k in range(4):
        scene = sample_scene(random.Random(k))
        render(scene, 32).save(folder / f"{k}.png")
        (folder / f"{k}.txt").write_text(caption(scene) + "\n")


def write(folder: Path) -> None:
    """Write the model, a training, where that ends two steps later, and a prediction."""

    def command(script: str, *arguments: str) -> None:
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, str(ROOT / script), *arguments], check=True, cwd=folder, env=environment)

    write_base(folder / "base")
    write_photos(folder / "photos")
    command("train.py", *TRAIN, "trainer.max_steps=4", "output_dir=training")
    with tempfile.TemporaryDirectory() as straight:
        command("train.py", *TRAIN, "trainer.max_steps=6", f"output_dir={straight}")
        shutil.copy(Path(straight, "export", ADAPTER), folder / "six_steps.safetensors")
    command("predict.py", *PREDICT, "output_dir=prediction")


def main() -> None:
    """Write the files in a temporary folder, for a checkpoint names its place, and keep them if they are small."""
    if FOLDER.exists():
        sys.exit(f"{FOLDER} exists; later versions must read what it holds")
    with tempfile.TemporaryDirectory(prefix="sdmodule-") as temporary:
        write(Path(temporary))
        files = [file for file in Path(temporary).rglob("*") if file.is_file()]
        named = [file for file in files if str(ROOT).encode() in file.read_bytes()]
        size = sum(file.stat().st_size for file in files)
        print(f"{len(files)} files of {size:,} bytes")
        assert size <= LARGEST and not named, named
        shutil.copytree(temporary, FOLDER)


if __name__ == "__main__":
    main()
