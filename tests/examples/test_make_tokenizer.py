"""The tokenizer of the embedded models reads every word of the captions of things and shapes as one token."""

from __future__ import annotations

import random
import re
import runpy
import string
from itertools import product

import pytest
from transformers import CLIPTokenizer

from sdmodule.data.toy.scenes import caption, sample_scene
from tests.docs.test_pages import ROOT


@pytest.fixture(scope="module")
def main():
    """The function of the script."""
    return runpy.run_path(str(ROOT / "examples" / "embedded" / "make_tokenizer.py"))["main"]


def test_each_word_of_names_styles_and_grammar_is_one_token(main, tmp_path):
    for style in ("noto", "flat", "3d"):
        (tmp_path / "sprites" / style).mkdir(parents=True)
        for first, second in product(string.ascii_lowercase[:10], repeat=2):
            (tmp_path / "sprites" / style / f"straw{first}{second} {second}berry.png").touch()
    main(tmp_path / "sprites", tmp_path / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")

    rng = random.Random(0)
    texts = [caption(sample_scene(rng, held_out=None)) for _ in range(100)]
    texts.append("a strawac cberry to the left of an strawja aberry on an orange background, flat style")
    for text in texts:
        assert len(tokenizer.tokenize(text)) == len(re.findall(r"\w+|,", text)), text
    assert len(tokenizer.tokenize(", 3d style")) == 4  # CLIP reads each digit alone
    assert tokenizer.unk_token_id not in tokenizer("hydrogen", add_special_tokens=False).input_ids
    assert tokenizer.model_max_length == 77


def test_a_folder_without_sprites_is_refused(main, tmp_path):
    with pytest.raises(SystemExit, match="has no sprites"):
        main(tmp_path, tmp_path / "tokenizer")
    assert not (tmp_path / "tokenizer").exists()
