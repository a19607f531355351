"""CLIP-like models as scorers: the features are transformers' own, whatever the batch; other folders are refused."""

import importlib.util
import shutil

import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoTokenizer

from sdmodule.errors import SettingsError
from sdmodule.evaluation.inception import InceptionFeatures
from sdmodule.evaluation.scorer import Scorer, features_of, features_of_texts
from sdmodule.evaluation.transformers_scorer import TransformersScorer
from tests.clip_folders import write_siglip

TEXTS = ["a red circle", "a blue star on a green background", "a red circle"]


@pytest.fixture(scope="module")
def siglip_folder(checkpoint, tmp_path_factory):
    return write_siglip(tmp_path_factory.mktemp("scorers") / "siglip", checkpoint / "tokenizer")


def images():
    return [
        Image.new("RGB", size, colour) for size, colour in (((32, 32), "red"), ((50, 40), "blue"), ((9, 70), "tan"))
    ]


def test_a_clip_gives_its_own_features(clip_folder):
    scorer = TransformersScorer(clip_folder)
    assert isinstance(scorer, Scorer)
    model, tokenizer = AutoModel.from_pretrained(clip_folder), AutoTokenizer.from_pretrained(clip_folder)
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model.get_text_features(**inputs).pooler_output
    torch.testing.assert_close(scorer.text_features(TEXTS), expected)
    together, [alone] = scorer.image_features(images()), features_of(images(), [scorer], batch_size=1)
    assert together.shape == (3, 16) and together.dtype == torch.float32
    torch.testing.assert_close(together, alone)
    torch.testing.assert_close(features_of_texts(TEXTS, scorer, batch_size=1), expected)


def test_a_siglip_reads_texts_of_one_length_without_a_mask(siglip_folder):
    scorer = TransformersScorer(siglip_folder)
    model, tokenizer = AutoModel.from_pretrained(siglip_folder), AutoTokenizer.from_pretrained(siglip_folder)
    ids = tokenizer(TEXTS, padding="max_length", max_length=16, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = model.get_text_features(input_ids=ids).pooler_output
    torch.testing.assert_close(scorer.text_features(TEXTS), expected)
    assert scorer.image_features(images()).shape == (3, 32)
    assert scorer.text_features(["a circle " * 200]).shape == (1, 32)


def test_folders_of_other_kinds_are_refused_in_a_sentence(checkpoint, clip_folder, tmp_path):
    damaged = shutil.copytree(clip_folder, tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"")
    without_tokenizer = shutil.copytree(clip_folder, tmp_path / "bare")
    for file in without_tokenizer.iterdir():
        if file.name not in ("config.json", "model.safetensors", "preprocessor_config.json"):
            file.unlink()
    cases = {
        checkpoint: "is a diffusers checkpoint; give the folder of a CLIP-like model",
        checkpoint / "text_encoder": "is a CLIPText.*, which does not map images and texts into one space",
        tmp_path / "nothing": "not found",
        tmp_path: "has no config.json",
        damaged: "cannot be read",
        without_tokenizer: "its tokenizer has [0-9,]+ tokens, and the model [0-9,]+; add the files",
        clip_folder / "config.json": "is a file",
        "owner/not-there": "cannot be read",
        "tiny-clip": "ships without weights; train.py experiment=tiny_clip makes them, or give the folder",
    }
    for place, message in cases.items():
        with pytest.raises(SettingsError, match=message) as caught:
            TransformersScorer(place)
        assert f"scorer={place}" in str(caught.value) and str(caught.value).endswith(".")


def test_inception_needs_its_weights_and_its_package(tmp_path):
    with pytest.raises(SettingsError, match=r"inception=.*none.pth: not found; give the path of weights-inception"):
        InceptionFeatures(tmp_path / "none.pth")
    (tmp_path / "other.pth").write_bytes(b"no weights")
    installed = importlib.util.find_spec("torch_fidelity")
    wanted = "cannot be read" if installed else r"needs torch-fidelity; pip install 'sdmodule\[fidelity\]'"
    with pytest.raises(SettingsError, match=wanted):
        InceptionFeatures(tmp_path / "other.pth")
