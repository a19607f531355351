"""A CLIP learns which caption belongs to which image, and is exported as a scorer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from lightning import Callback, Trainer
from PIL import Image

from sdmodule.callbacks.ema import EMA
from sdmodule.cli.main import train_main
from sdmodule.data.toy.dataset import ShapesDataModule
from sdmodule.errors import SettingsError
from sdmodule.evaluation import TransformersScorer
from sdmodule.io.images import image_to_tensor
from sdmodule.training.contrastive import ContrastiveModule
from tests.clip_folders import write_siglip
from tests.fitting import fit

CAPTIONS = [
    "a red circle on a blue background",
    "a blue star on a green background",
    "a red circle on a blue background",
]


def trained(folder, steps, *callbacks, **settings) -> tuple[ContrastiveModule, Trainer]:
    torch.manual_seed(0)
    given = {"negatives": 8, "variation": {"noise": 0.1, "shift": 0.05}, **settings}
    resume = given.pop("resume", None)
    module = ContrastiveModule(str(folder), optimizer=lambda p: torch.optim.AdamW(p, lr=3e-3), **given)
    data = ShapesDataModule(batch_size=16, train_length=4000, val_length=32, size=32)
    loops = {"val_check_interval": steps, "num_sanity_val_steps": 0, "check_val_every_n_epoch": None}
    return module, fit(module, data, steps, *callbacks, resume=resume, **loops)


@pytest.mark.slow
def test_captions_are_found_after_training_and_the_average_is_validated_too(clip_folder):
    module, trainer = trained(clip_folder, 80, EMA(decay=0.9, start_step=1))
    figures = trainer.callback_metrics
    assert figures["val/loss"] < 2.5 < torch.tensor(16.0).log()
    assert figures["val/retrieval_top1"] > 0.2 and figures["val/retrieval_top5"] > 0.5
    assert figures.keys() >= {"val/loss_raw", "val/retrieval_top1_raw", "val/retrieval_top5_raw", "train/loss"}
    assert module.clip.logit_scale != ContrastiveModule(str(clip_folder)).clip.logit_scale


def test_the_loss_is_that_of_transformers(clip_folder):
    module = ContrastiveModule(str(clip_folder))
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    inputs = module.folder.tokenizer(CAPTIONS[:2], padding=True, return_tensors="pt")
    pixels = module.folder.image_processor(
        [Image.fromarray(((i + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()) for i in images],
        return_tensors="pt",
    )
    expected = module.clip(**inputs, **pixels, return_loss=True).loss
    torch.testing.assert_close(module.loss(*module(images, CAPTIONS[:2]), CAPTIONS[:2]), expected, rtol=1e-2, atol=1e-3)


def test_what_is_left_out_of_long_captions_is_said_once(clip_folder, recwarn):
    module, images = ContrastiveModule(str(clip_folder)), torch.zeros(2, 3, 32, 32)
    for captions in (CAPTIONS[:2], ["a red circle " * 40, "a star"], ["a red circle " * 40, "a star"]):
        module(images, captions)
    [said] = [str(warning.message) for warning in recwarn if "longer captions" in str(warning.message)]
    assert said.startswith("The model reads 77 tokens;") and "a red circle a red circle" in said


def test_equal_captions_are_no_negatives_and_further_captions_are(clip_folder):
    module = ContrastiveModule(str(clip_folder))
    images, texts = F.normalize(torch.randn(3, 16), dim=-1), F.normalize(torch.randn(4, 16), dim=-1)
    texts[2] = texts[0]
    found = module.loss(images, texts, [*CAPTIONS, "a heart"])  # the first and the third are equal

    logits = module.clip.logit_scale.exp() * images @ texts.T
    mine, pairs = logits.diagonal(), {0: [0, 1, 3], 1: [0, 1, 2, 3], 2: [1, 2, 3]}
    of_images = [logits[k, columns].logsumexp(0) - mine[k] for k, columns in pairs.items()]
    of_texts = [logits[[k for k in columns if k < 3], row].logsumexp(0) - mine[row] for row, columns in pairs.items()]
    torch.testing.assert_close(found, (sum(of_images) + sum(of_texts)) / 6)


def test_the_export_is_a_scorer_with_the_same_features(clip_folder, tmp_path):
    module, _ = trained(clip_folder, 2)
    module.save_pretrained(tmp_path / "half", dtype="float16")
    scorer = TransformersScorer(tmp_path / "half")
    image = Image.new("RGB", (32, 32), (200, 30, 90))
    with torch.no_grad():
        images, texts = module.eval()(image_to_tensor(image)[None], CAPTIONS)
    torch.testing.assert_close(F.normalize(scorer.image_features([image]), dim=-1), images, atol=2e-2, rtol=0)
    torch.testing.assert_close(F.normalize(scorer.text_features(CAPTIONS), dim=-1), texts, atol=1e-2, rtol=0)
    size = (tmp_path / "half" / "model.safetensors").stat().st_size
    assert size < 2.2 * sum(value.numel() for value in module.clip.parameters()) + 20_000
    again = ContrastiveModule(str(tmp_path / "half"))
    assert again.clip.dtype == torch.float32


def test_a_resumed_training_ends_with_the_weights_of_one_that_was_not_interrupted(clip_folder, tmp_path):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 2:
                trainer.save_checkpoint(tmp_path / "two.ckpt")

    whole, _ = trained(clip_folder, 4, Stop())
    again = ContrastiveModule.load_from_checkpoint(tmp_path / "two.ckpt", weights_only=True)
    assert again.hparams["negatives"] == 8 and len(again._earlier) == 8
    resumed, _ = trained(clip_folder, 4, resume=tmp_path / "two.ckpt")
    for name, value in whole.clip.state_dict().items():
        assert torch.equal(value, resumed.clip.state_dict()[name]), name


def test_scratch_draws_new_weights_in_the_same_architecture(clip_folder):
    torch.manual_seed(1)
    module = ContrastiveModule(str(clip_folder), scratch=["clip"])
    before = ContrastiveModule(str(clip_folder))
    assert module.clip.config.projection_dim == 16 and module.resolution == 32
    weight = "vision_model.embeddings.patch_embedding.weight"
    assert not torch.equal(module.clip.state_dict()[weight], before.clip.state_dict()[weight])


def test_what_cannot_be_trained_is_said_in_a_sentence(clip_folder, checkpoint, tmp_path):
    siglip = write_siglip(tmp_path / "siglip", checkpoint / "tokenizer")
    cases = {
        "pretrained=.*is a diffusers checkpoint; give the folder of a CLIP": {"pretrained": str(checkpoint)},
        "pretrained=.*is a SiglipModel; give a CLIPModel": {"pretrained": str(siglip)},
        "scratch=unet: unknown; choose one of clip": {"scratch": ["unet"]},
        "model=contrastive has none": {"tuning": {"kind": "lora"}},
        r"model.variation.blurr: unknown; it has blur, colour": {"variation": {"blurr": 1}},
        "model.variation.noise=2: must be": {"variation": {"noise": 2}},
        "model.negatives=-1: must be": {"negatives": -1},
    }
    for message, settings in cases.items():
        with pytest.raises(SettingsError, match=message):
            ContrastiveModule(**{"pretrained": str(clip_folder), **settings})
    with pytest.raises(
        SettingsError, match=r"its images are of 64x48 pixels, and this model reads 32x32; set data\.size"
    ):
        ContrastiveModule(str(clip_folder))(torch.zeros(1, 3, 64, 48), ["a circle"])


@pytest.mark.slow
def test_a_training_by_the_command_ends_with_the_command_that_scores(call, clip_folder, photos, tmp_path):
    command = [
        "model=contrastive",
        f"pretrained={clip_folder}",
        f"data.root={photos}",
        f"output_dir={tmp_path / 'out'}",
    ]
    status, printed, error = call(train_main, *command, "resolution=32", "trainer.max_steps=2", "progress=false")
    assert (status, error) == (0, "")
    last = printed.splitlines()[-1]
    assert last.startswith("Score images with it: ") and last.endswith(
        f"run=FOLDER scorer={tmp_path / 'out' / 'export'}"
    )
    assert (tmp_path / "out" / "export" / "preprocessor_config.json").is_file()
