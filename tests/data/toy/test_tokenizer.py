"""A tokenizer of a small vocabulary behaves as CLIP's does."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import CLIPTokenizer

from sdmodule.data.toy.tokenizer import BEGIN, END, scene_captions, write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, scene_captions(200), size=1024)
    return CLIPTokenizer.from_pretrained(folder)


def test_known_words_are_one_token_each(tokenizer):
    text = "a small red circle on the left on a blue background"
    assert tokenizer.tokenize(text) == [f"{word}</w>" for word in text.split()]
    assert tokenizer.tokenize(text.upper()) == tokenizer.tokenize(text)


@pytest.mark.parametrize("text", ["an octopus, painted", "größe 3½", "日本 🌵", "a\nb", "it's red!"])
def test_unknown_words_are_split_and_nothing_is_lost(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids).replace(" ", "") == "".join(text.split())


def test_prompts_begin_end_and_are_padded_to_77(tokenizer):
    ids = tokenizer("a red star", padding="max_length").input_ids
    begin, end = tokenizer.convert_tokens_to_ids([BEGIN, END])
    assert len(ids) == 77 == tokenizer.model_max_length
    assert ids[0] == begin and ids[4:] == [end] * 73
    assert begin != end and max(ids) < len(tokenizer)


def test_the_vocabulary_has_at_most_its_size(tokenizer, tmp_path: Path):
    assert len(tokenizer) <= 1024
    write_tokenizer(tmp_path, ["red", "red", "blue"], size=600, length=16)
    small = CLIPTokenizer.from_pretrained(tmp_path)
    assert len(small) <= 600 and small.model_max_length == 16
    assert small.tokenize("red") == ["red</w>"]


def test_the_same_texts_give_the_same_files(tmp_path: Path):
    for name in ("a", "b"):
        write_tokenizer(tmp_path / name, scene_captions(50), size=700)
    for file in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
