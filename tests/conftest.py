"""A tiny random checkpoint, images to train on, and commands that are called in this process."""

from __future__ import annotations

import gc
import getpass
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

OFFLINE = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
os.environ.update(OFFLINE)  # huggingface_hub reads it when it is imported

# torch's own default, so that tests, and the commands that they start, compile the same code once
COMPILED = Path(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}")
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(COMPILED))
# otherwise it compiles four programs, for eight seconds, to see whether the compiler knows the processor's instructions
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

# torch and what needs it are imported in the fixtures: the process that hands out the tests has no use for them


MARKED_FOLDERS = {"benchmarks": "slow", "faults": "faults", "gpu": "gpu", "speed/cpu": "slow"}
"""Markers of all tests in a folder."""


LONG_FOLDERS = ("faults", "docs", "benchmarks")
"""Folders whose tests take longest."""

SHARING_FILES = ("test_sharded.py",)
"""Files whose tests share what takes long to make."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of some folders, and let each of two processes begin with half of the long ones.

    Otherwise one of them is left alone with the last of these. Files whose tests share what took long to make come
    early, too: at the end, the process that has nothing left takes tests of the other, and would make it again.
    """
    for item in items:
        folder = item.path.parent.relative_to(Path(__file__).parent).as_posix()
        if folder in MARKED_FOLDERS:
            item.add_marker(MARKED_FOLDERS[folder])
    groups: dict[str, list[pytest.Item]] = {"long": [], "shared": [], "short": []}
    for item in items:
        kind = "long" if item.path.parent.name in LONG_FOLDERS else "short"
        groups["shared" if item.path.name in SHARING_FILES else kind].append(item)
    long, shared, short = groups.values()
    half = len(short) // 2
    items[:] = [*long[::2], *shared, *short[:half], *long[1::2], *short[half:]]


gc.disable()  # imports make no garbage, and to look for it takes a fifth of their time


def pytest_collection_finish() -> None:
    """Exempt all that is imported from garbage collection, which would look through it again and again."""
    from tests import seldom_collected  # noqa: F401

    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test reaches the network or the user's cache, and each starts with W&B offline."""
    for name, value in OFFLINE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(autouse=True, scope="session")
def done_once() -> Iterator[None]:
    """Files are composed and networks are read once, in this process and in the one that commands are forked from."""
    from benchmarks.forked import FORKED, PRELOADED
    from tests.isolation import fast_composition, networks_read_once, plugins_found_once

    FORKED.set_forkserver_preload(["tests.seldom_collected", *PRELOADED, "tests.warm_commands"])
    with fast_composition(), networks_read_once(), plugins_found_once():
        yield


@pytest.fixture(scope="session")
def two_level_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder of random weights for 32 x 32 pixels, with a tokenizer for the captions of scenes."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from sdmodule.components.checkpoint import Components
    from sdmodule.components.save import save_components
    from sdmodule.data.toy.tokenizer import scene_captions, write_tokenizer

    folder = tmp_path_factory.mktemp("checkpoint")
    write_tokenizer(folder / "tokenizer", scene_captions(200), size=1024)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = Components(
            unet=UNet2DConditionModel(
                sample_size=8,
                block_out_channels=(32, 64),
                down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
                layers_per_block=1,
                attention_head_dim=2,
                cross_attention_dim=32,
                norm_num_groups=8,
            ),
            vae=AutoencoderKL(
                block_out_channels=(8, 16, 16),
                down_block_types=("DownEncoderBlock2D",) * 3,
                up_block_types=("UpDecoderBlock2D",) * 3,
                layers_per_block=1,
                norm_num_groups=4,
                sample_size=32,
            ),
            text_encoder=CLIPTextModel(
                CLIPTextConfig(
                    vocab_size=len(tokenizer),
                    hidden_size=32,
                    intermediate_size=64,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    bos_token_id=tokenizer.bos_token_id,
                    eos_token_id=tokenizer.eos_token_id,
                    pad_token_id=tokenizer.pad_token_id,
                )
            ),
            tokenizer=tokenizer,
            scheduler=DDIMScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                prediction_type="epsilon",
                clip_sample=False,
                set_alpha_to_one=False,
                steps_offset=1,
            ),
            source=str(folder),
        )
    save_components(parts, folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint(two_level_checkpoint: Path) -> Path:
    """What most tests train and sample with; files that look at no levels replace it by the small one."""
    return two_level_checkpoint


@pytest.fixture(scope="session")
def small_checkpoint(two_level_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a UNet of one level, whose training steps take half as long."""
    from dataclasses import replace

    import torch
    from diffusers import UNet2DConditionModel

    from sdmodule.components.checkpoint import load_components
    from sdmodule.components.save import save_components

    folder = tmp_path_factory.mktemp("small_checkpoint")
    parts = load_components(str(two_level_checkpoint))
    level = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("UpBlock2D",)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel.from_config({**parts.unet.config, "block_out_channels": (32,), **level})
    save_components(replace(parts, unet=unet, source=str(folder)), folder)
    return folder


@pytest.fixture(scope="session")
def xl_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of random weights with the architecture of Stable Diffusion XL, for 32 x 32 pixels."""
    import torch

    from sdmodule.components.save import save_components
    from tests.xl_parts import tiny_xl_parts

    folder = tmp_path_factory.mktemp("xl_checkpoint")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_components(tiny_xl_parts(tmp_path_factory.mktemp("xl_words")), folder)
    return folder


@pytest.fixture(scope="session")
def clip_folder(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a CLIP with random weights, which reads the captions of scenes."""
    from tests.clip_folders import write_clip

    return write_clip(tmp_path_factory.mktemp("scorers") / "clip", checkpoint / "tokenizer")


@pytest.fixture(scope="session")
def sprites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty things in three styles, each a disc in a colour of its own."""
    from PIL import Image, ImageDraw

    folder = tmp_path_factory.mktemp("sprites")
    for style, shade in {"noto": 1.0, "flat": 0.7, "3d": 0.4}.items():
        (folder / style).mkdir()
        for k in range(40):
            image = Image.new("RGBA", (32, 32))
            colour = (round(255 * shade * (k % 4) / 3), round(255 * shade * (k // 4 % 4) / 3), round(255 * shade), 255)
            ImageDraw.Draw(image).ellipse((1, 1, 30, 30), fill=colour)
            image.save(folder / style / f"thing {'abcdefghij'[k % 10]}{'klmn'[k // 10]}.png")
    return folder


@pytest.fixture
def module(checkpoint: Path):
    """The checkpoint, ready to sample."""
    from sdmodule.module import StableDiffusionModule

    return StableDiffusionModule.from_pretrained(str(checkpoint))


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """Run a command in this process; returns its exit status, its standard output and its standard error."""

    from tests.isolation import restored_messages

    def run(main, *arguments):
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        status = 0
        try:
            main()
        except SystemExit as end:
            status = end.code
        return status, *capfd.readouterr()

    with restored_messages():
        yield run


@pytest.fixture
def photos(tmp_path):
    """Six images with a ``metadata.jsonl``."""
    from PIL import Image

    folder = tmp_path / "photos"
    folder.mkdir()
    for k in range(6):
        Image.new("RGB", (40, 48), (40 * k, 90, 200)).save(folder / f"{k}.png")
    rows = [{"file_name": f"{k}.png", "text": f"image {k}"} for k in range(6)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
