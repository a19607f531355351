"""Textual inversion: learning a word, and using learned words here and in diffusers."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from sdmodule.cli.main import train_main
from sdmodule.errors import SettingsError
from sdmodule.module import StableDiffusionModule


@pytest.fixture(scope="session")
def checkpoint(small_checkpoint):
    return small_checkpoint


WORD = "<my-cat>"


def encoded(module, caption):
    return module.encode_captions([caption]).hidden_states


def test_a_learned_word_gives_the_same_image_here_and_in_diffusers(checkpoint, tmp_path, train_export, sample_image):
    settings = ["tuning=textual_inversion", f"tuning.placeholder={WORD}", "tuning.initializer=star"]
    settings += ["tuning.vectors=2", f"data.prompt={WORD}", "data.template=['a photo of {}','an image of {}']"]
    export = train_export(tmp_path / "out", *settings)
    assert load_file(export / "learned_embeds.safetensors")[WORD].shape == (2, 32)
    adapters = [{"path": str(export)}]
    ours = StableDiffusionModule.from_pretrained(str(checkpoint), adapters=adapters)
    prompt = f"a photo of {WORD} on a (red:1.0) background"
    sampled = ours.infer(prompt, num_inference_steps=3, return_type="numpy", guidance_scale=7.5)["samples"]
    pipeline = StableDiffusionPipeline.from_pretrained(checkpoint)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_textual_inversion(export)
    theirs = pipeline(
        f"a photo of {WORD} on a red background",
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images
    np.testing.assert_array_equal(sampled, theirs)
    by_command = sample_image(tmp_path / "made", f"adapters=[{{path: {export}}}]", prompt=prompt)
    np.testing.assert_allclose(by_command, sampled[0] * 255, atol=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"placeholder": "red", "initializer": "star"}, "placeholder=red: already in the vocabulary"),
        ({"placeholder": "my cat", "initializer": "star"}, "placeholder=my cat: cannot be one word of a prompt"),
        ({"placeholder": WORD, "initializer": "star circle square"}, "give a text of 1 to 1 tokens"),
        ({"placeholder": WORD, "initializer": "star", "vectors": 0}, "vectors=0"),
        ({"placeholder": WORD}, "needs tuning.initializer"),
    ],
)
def test_bad_words_are_named_in_the_error(checkpoint, settings, message):
    with pytest.raises(SettingsError, match=message):
        StableDiffusionModule(str(checkpoint), tuning={"kind": "textual_inversion", **settings})


@pytest.mark.slow
def test_a_word_missing_from_all_captions_is_refused_and_from_some_reported(checkpoint, photos, tmp_path, call):
    out, batch = tmp_path / "out", ["callbacks=[]", "data.val_fraction=0", "trainer.max_steps=1", "resolution=32"]
    command = [f"pretrained={checkpoint}", f"data.root={photos}", f"output_dir={out}", "tuning=textual_inversion"]
    command += [f"tuning.placeholder={WORD}", "tuning.initializer=star", *batch]
    status, _, error = call(train_main, *command)
    assert status == 1 and f'set data.prompt="a photo of {WORD}"' in error and len(error.splitlines()) == 1
    assert not out.exists()
    metadata = photos / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace("image 3", f"a red {WORD}."))
    with pytest.warns(UserWarning, match=f"{WORD} is not in 5 of 6 captions, such as 'image 0'"):
        assert call(train_main, *command)[0] == 0
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*is not in .* captions")
        for template in (f"'{WORD}, {{}}'", f"['{{}}', '{WORD}, {{}}']"):  # of several templates one is drawn each time
            assert call(train_main, *command, f"data.template={template}")[0] == 0


def test_a_new_word_starts_as_its_initializer_and_does_not_change_other_prompts(checkpoint):
    tuning = {"kind": "textual_inversion", "placeholder": WORD, "initializer": "star"}
    module, plain = StableDiffusionModule(str(checkpoint), tuning=tuning), StableDiffusionModule(str(checkpoint))
    with torch.no_grad():
        assert torch.equal(encoded(module, f"a red {WORD}"), encoded(plain, "a red star"))
        assert torch.equal(encoded(module, "a blue circle"), encoded(plain, "a blue circle"))


def test_an_embedding_of_the_web_ui_is_named_by_its_file(checkpoint, tmp_path):
    save_file({"emb_params": torch.randn(3, 32)}, tmp_path / "mycat.safetensors")
    sd = StableDiffusionModule.from_pretrained(
        str(checkpoint), adapters=[{"path": str(tmp_path / "mycat.safetensors")}]
    )
    assert len(sd.parts.tokenizer("a mycat", add_special_tokens=False).input_ids) == 2
    assert not torch.equal(encoded(sd, "a mycat"), encoded(sd, "a star"))
    for wrong, message in ((torch.randn(3, 31), "takes 1 to 75 vectors of 32"), (torch.randn(1, 2, 3), "neither")):
        save_file({"emb_params": wrong}, tmp_path / "wrong.safetensors")
        with pytest.raises(SettingsError, match=message):
            StableDiffusionModule(str(checkpoint), adapters=[{"path": str(tmp_path / "wrong.safetensors")}])
