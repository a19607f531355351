"""Training with a latent cache equals training without, and the cache follows changes of the data."""

from __future__ import annotations

import json
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from lightning import Callback, Trainer
from PIL import Image
from safetensors import safe_open

from benchmarks.forked import Command, run
from sdmodule.callbacks.latent_cache import LatentCache
from sdmodule.callbacks.validation_samples import ValidationSamples
from sdmodule.cli.main import train_main
from sdmodule.conditioning.prompt_syntax import escape_prompt
from sdmodule.conditioning.text import encode_prompts
from sdmodule.data.cache.latents import CachedEmbeddings
from sdmodule.data.cache.tensor_store import TensorStore
from sdmodule.data.datamodule import ImageFolderDataModule
from sdmodule.data.toy.dataset import ShapesDataModule
from sdmodule.data.toy.scenes import caption, render, sample_scene
from sdmodule.errors import SettingsError
from sdmodule.module import StableDiffusionModule
from sdmodule.training.loss import encode_moments

pytestmark = pytest.mark.slow  # each test trains several times


@pytest.fixture(scope="session")
def checkpoint(small_checkpoint):
    return small_checkpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five images, one with a caption of more than 77 tokens."""
    images = tmp_path / "images"
    images.mkdir()
    for k in range(5):
        scene = sample_scene(random.Random(k))
        render(scene, 32).save(images / f"{k}.png")
        (images / f"{k}.txt").write_text(", ".join([caption(scene)] * (12 if k == 2 else 1)))
    return images


class Losses(Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.values.append(outputs["loss"].item())


def fit(
    checkpoint: Path, data: Any, cache: LatentCache | None, steps: int = 3, *callbacks: Callback, **settings: Any
) -> list[float]:
    module = StableDiffusionModule(str(checkpoint), sampling={"steps": 2}, **settings)
    losses = Losses()
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        callbacks=[losses, *callbacks, *([cache] if cache else [])],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        limit_val_batches=0,
    )
    trainer.fit(module, data)
    return losses.values


def images_of(folder: Path, **settings: Any) -> ImageFolderDataModule:
    return ImageFolderDataModule(str(folder), **{"batch_size": 2, "resolution": 32, "val_fraction": 0, **settings})


def cached_keys(cache: Path, kind: str = "moments") -> dict[str, str]:
    """The keys of a cache, with the file of each."""
    keys = {}
    for file in sorted(cache.glob(f"{kind}-*/*.safetensors")):
        with safe_open(file, "pt") as shard:
            keys |= {f"{file.parent.name}/{key}": str(file) for key in shard.keys()}
    return keys


@pytest.mark.parametrize("flip", [False, True], ids=["", "flipped"])
@pytest.mark.parametrize("what", ["latents", "all"])
def test_losses_equal_those_of_training_without_a_cache(checkpoint, folder, tmp_path, what, flip):
    settings = {"objective": {"caption_dropout": 0.5}, "optimizer": lambda weights: torch.optim.AdamW(weights, lr=1e-3)}
    plain = fit(checkpoint, images_of(folder, random_flip=flip), None, 8, **settings)
    for _ in range(2):  # filled, then read
        data = images_of(folder, random_flip=flip)
        assert fit(checkpoint, data, LatentCache(tmp_path / "cache", what), 8, **settings) == pytest.approx(
            plain, rel=1e-5
        )
    assert len(cached_keys(tmp_path / "cache")) == (10 if flip else 5)
    assert len(cached_keys(tmp_path / "cache", "embeddings")) == (6 if what == "all" else 0)


class InUse(Callback):
    """The networks whose weights are on the device after each batch; samples after the first, as validation does."""

    def __init__(self) -> None:
        self.seen: list[set[str]] = []

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.homes = {name: one.data_ptr() for name, one in pl_module.named_parameters()}

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not self.seen:
            pl_module.infer("a red circle", num_inference_steps=1, show_progress=False)
        away = (name for name, one in pl_module.named_parameters() if one.data_ptr() != self.homes[name])
        self.seen.append({name.split(".")[0] for name in away})


def test_networks_that_training_does_not_use_leave_the_device(checkpoint, folder, tmp_path, monkeypatch):
    plain = fit(checkpoint, images_of(folder), None, 2)
    monkeypatch.setattr("sdmodule.callbacks.latent_cache.SAVES_MEMORY_OF", ("cpu",))  # copies stand for its memory
    in_use = InUse()
    losses = fit(checkpoint, images_of(folder), LatentCache(tmp_path / "cache", "all"), 2, in_use)
    assert losses == pytest.approx(plain, rel=1e-5)
    assert in_use.seen[0] - in_use.seen[1] == {"text_encoder", "vae"}  # sampling brought them, the next batch did not


@pytest.mark.parametrize("what", ["latents", "all"])
def test_masked_losses_equal_those_of_training_without_a_cache(checkpoint, folder, tmp_path, what):
    Image.linear_gradient("L").resize((32, 32)).save(folder / "mask.png")
    rows = [{"file_name": f"{k}.png", "text": "a", "mask_file_name": "mask.png"} for k in range(5)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain, cached = (
        fit(checkpoint, images_of(folder, random_flip=True), cache, objective={"masked": True})
        for cache in (None, LatentCache(tmp_path / "cache", what))
    )
    assert cached == pytest.approx(plain, rel=1e-5)


def test_parentheses_in_captions_are_no_prompt_weights(checkpoint, folder, tmp_path):
    """As a prompt weight, 30 would be an error, and 3 would shorten the text."""
    text = "a clock (12:30) in a frame (4:3)"
    for k in range(5):
        (folder / f"{k}.txt").write_text(text)
    plain = fit(checkpoint, images_of(folder), None, objective={"caption_dropout": 0.0})
    samples = ValidationSamples(tmp_path / "samples", num_prompts=1)
    cache, objective = LatentCache(tmp_path / "cache", "all"), {"caption_dropout": 0.0}
    cached = fit(checkpoint, images_of(folder), cache, 3, samples, objective=objective)
    assert cached == pytest.approx(plain, rel=1e-5)
    assert (tmp_path / "samples" / "000003.png").is_file()
    [store] = tmp_path.glob("cache/embeddings-*")
    pipeline = StableDiffusionPipeline.from_pretrained(checkpoint)
    theirs = pipeline.encode_prompt(text, torch.device("cpu"), 1, False)[0]
    torch.testing.assert_close(CachedEmbeddings(TensorStore(store))([escape_prompt(text)]).hidden_states, theirs)


def test_moments_of_generated_images_are_cached(checkpoint, module, tmp_path):
    data = ShapesDataModule(batch_size=2, train_length=6, val_length=2, size=32)
    fit(checkpoint, data, LatentCache(tmp_path))
    assert data.train_set[0].keys() == {"image", "caption"}, "the data module is restored"
    [folder] = tmp_path.iterdir()
    store = TensorStore(folder)
    cached = torch.stack([store[Path(key).name] for key in cached_keys(tmp_path)])
    moments = encode_moments(module.parts, torch.stack([data.train_set[k]["image"] for k in range(6)]))
    assert cached.dtype == torch.float32 and cached.shape == (6, 8, 8, 8)
    torch.testing.assert_close(*(x[x[:, 0, 0, 0].argsort()] for x in (cached, moments)))


def test_cached_embeddings_of_different_lengths_are_padded_as_by_the_text_encoder(checkpoint, module, folder, tmp_path):
    fit(checkpoint, images_of(folder), LatentCache(tmp_path, "all"))
    [store] = tmp_path.glob("embeddings-*")
    embeddings = CachedEmbeddings(TensorStore(store))
    captions = ["", *((folder / f"{k}.txt").read_text() for k in range(5))]
    for batch in (captions, captions[:2]):
        computed = encode_prompts(batch, module.parts.tokenizer, module.text_encoder)
        torch.testing.assert_close(embeddings(batch).hidden_states, computed)
    assert "an image of nothing" not in embeddings


def test_only_what_has_changed_is_encoded(checkpoint, folder, tmp_path):
    cache = tmp_path / "cache"

    def encoded(base: Path = checkpoint, **settings: Any) -> tuple[int, int]:
        before = [cached_keys(cache, kind) for kind in ("moments", "embeddings")]
        fit(base, images_of(folder, **settings), LatentCache(cache, "all"), steps=1)
        now = [cached_keys(cache, kind) for kind in ("moments", "embeddings")]
        assert all(old.items() <= new.items() for old, new in zip(before, now)), "existing entries are untouched"
        moments, embeddings = (len(new) - len(old) for old, new in zip(before, now))
        return moments, embeddings

    assert encoded() == (5, 6)
    assert encoded() == (0, 0)
    (folder / "4.png").rename(folder / "9.png")
    (folder / "4.txt").rename(folder / "9.txt")
    assert encoded() == (0, 0), "entries do not depend on file names"
    render(sample_scene(random.Random(77)), 32).save(folder / "1.png")
    assert encoded() == (1, 0)
    (folder / "1.txt").write_text("something else")
    assert encoded() == (0, 1)
    assert encoded(resolution=40) == (5, 0)
    assert encoded(random_flip=True) == (5, 0), "the mirrored images"

    other = shutil.copytree(checkpoint, tmp_path / "other")
    assert encoded(other) == (0, 0), "a copy of the model has the same fingerprint"
    module = StableDiffusionModule(str(checkpoint))
    with torch.no_grad():
        module.vae.encoder.conv_in.bias[0] += 1e-3
    module.save_pretrained(other)
    assert encoded(other) == (5, 0)


def test_a_corrupt_file_is_skipped_and_its_images_are_encoded_again(checkpoint, folder, tmp_path):
    plain = fit(checkpoint, images_of(folder), LatentCache(tmp_path))
    [file] = tmp_path.glob("*/*.safetensors")
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.warns(UserWarning, match=r"safetensors is corrupt and was skipped"):
        assert fit(checkpoint, images_of(folder), LatentCache(tmp_path)) == plain
    assert len(cached_keys(tmp_path)) == 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["cache=latents", "data.center_crop=false"], "set data.center_crop=true, or cache=none"),
        (["cache=all", "tuning.text_encoder=true"], "use cache=latents"),
        (["cache=all", "data.shuffle_tags=true"], "use cache=latents"),
        (["cache=latents", "model=autoencoder"], "use cache=none"),
        (["cache=latents", "cache.what=some"], "cache.what=some"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_what_cannot_be_cached_is_reported_before_anything_is_written(
    call, checkpoint, folder, tmp_path, settings, message
):
    common = [f"pretrained={checkpoint}", f"data.root={folder}", "resolution=32", f"output_dir={tmp_path / 'out'}"]
    status, _, complaint = call(train_main, *common, f"cache.folder={tmp_path / 'cache'}", *settings)
    assert status == 1 and message in complaint and len(complaint.splitlines()) == 1
    assert not (tmp_path / "out").exists() and not (tmp_path / "cache").exists()


def test_an_unknown_dataset_is_refused(checkpoint, folder, tmp_path):
    data = images_of(folder)
    data.setup()
    data.train_set = torch.utils.data.Subset(data.train_set, [0])
    with pytest.raises(SettingsError, match="cannot cache the images of this data module"):
        fit(checkpoint, data, LatentCache(tmp_path))


@pytest.mark.slow
def test_an_interrupted_making_goes_on_where_it_stopped(checkpoint, tmp_path):
    cache, out = tmp_path / "cache", tmp_path / "out"
    command = ["train", "data=shapes", "data.train_length=700", "data.val_length=2", "trainer.max_steps=1"]
    command += [f"pretrained={checkpoint}", "cache=latents", f"cache.folder={cache}", f"output_dir={out}"]
    command += ["data.batch_size=2", "+steps=1"]
    one = Command(*command, log=tmp_path / "log")
    one.wait_until(lambda: bool(cached_keys(cache)))
    one.send(signal.SIGINT)
    status, output = one.wait()
    assert status == 130 and "interrupted: what is done is in" in output and "Traceback" not in output
    before = cached_keys(cache)
    assert 256 <= len(before) < 700
    output = run(*command, log=tmp_path / "log")
    assert f"Encoding images into {next(cache.iterdir())}: {700 - len(before):,}\n" in output
    after = cached_keys(cache)
    assert len(after) == 700 and before.items() <= after.items()
    assert not [file for file in cache.rglob("*") if file.is_file() and file.suffix != ".safetensors"]
    assert output.splitlines()[-1].startswith("Sample with it: ")
