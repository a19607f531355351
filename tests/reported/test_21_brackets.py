"""Rows 21 and 34: a prompt in brackets arrives letter for letter, and paths within settings need no quotes."""

from __future__ import annotations

import pytest
from hydra import compose, initialize_config_module

from sdmodule.cli.main import predict_main
from sdmodule.cli.overrides import quote_overrides
from tests.cli.test_commands import records

TEXTS = [
    "[cat:dog:0.5]",
    "[it's]",
    "[猫]",
    "[(a:1.3)]",
    "[a!]",
    "[masterpiece, best quality]",
    "[a] cat [b]",
    "[[a]]",
    "[a",
    "a]",
    '["a" and b]',
    "['a', b]",
    "[a, 'b']",
    "[3]",
    "[null]",
    "{a: b}",
    "[a,b,c]",
]


def composed(command: str, *arguments: str):
    with initialize_config_module("sdmodule.conf", version_base="1.3"):
        return compose(command, quote_overrides(arguments))


@pytest.mark.parametrize("text", TEXTS)
def test_a_prompt_in_brackets_is_that_text(text):
    cfg = composed("predict", f"prompt={text}", f"negative_prompt={text}")
    assert (cfg.prompt, cfg.negative_prompt) == (text, text)
    cfg = composed("train", f"data.prompt={text}", "data.root=x", "data=image_folder")
    assert cfg.data.prompt == text


@pytest.mark.parametrize("text", ['["a cat", "a dog"]', "['a cat','a dog']", "[ 'a cat' , \"a dog\" ]"])
def test_a_list_has_its_texts_in_quotes(text):
    assert list(composed("predict", f"prompt={text}").prompt) == ["a cat", "a dog"]


def test_quoted_texts_may_hold_anything():
    assert list(composed("predict", r"""prompt=["[a], b", 'it\'s ]']""").prompt) == ["[a], b", "it's ]"]


def test_lists_of_paths_stay_lists():
    cfg = composed("predict", "image=[a.png,b.png]", "mask=[0,0,8,8]", "control=[a.png, b.png]")
    assert list(cfg.image) == ["a.png", "b.png"] and list(cfg.mask) == [0, 0, 8, 8]
    assert list(cfg.control) == ["a.png", "b.png"]


def test_the_image_remembers_it(call, checkpoint, tmp_path):
    settings = ["prompt=[cat:dog:0.5]", "negative_prompt=[blurry, ugly]", "steps=1", f"pretrained={checkpoint}"]
    assert call(predict_main, *settings, f"output_dir={tmp_path / 'out'}")[0] == 0
    [record] = records(tmp_path / "out")
    assert (record["prompt"], record["negative_prompt"]) == ("[cat:dog:0.5]", "[blurry, ugly]")
    image = tmp_path / "out" / record["file"]
    assert call(predict_main, f"from={image}", f"output_dir={tmp_path / 'again'}")[0] == 0
    assert records(tmp_path / "again")[0]["prompt"] == "[cat:dog:0.5]"


@pytest.mark.parametrize(
    ("given", "path", "scale"),
    [
        ("[{path: a=b.safetensors}]", "a=b.safetensors", None),
        ("[{path: ../lr=1e-4,rank=4/a.safetensors}]", "../lr=1e-4,rank=4/a.safetensors", None),
        ("[{path: ../lr=1e-4,rank=4/a.safetensors, scale: 0.5}]", "../lr=1e-4,rank=4/a.safetensors", 0.5),
        ("[{scale: 0.5, path: ~/a b.safetensors}]", "~/a b.safetensors", 0.5),
        ("[{path: ~/a.safetensors}]", "~/a.safetensors", None),
        ("[{path: 'a=b.safetensors'}]", "a=b.safetensors", None),
        ("[{path: plain.safetensors}]", "plain.safetensors", None),
    ],
)
def test_row_34_paths_of_adapters_need_no_quotes(given, path, scale):
    [adapter] = composed("predict", f"adapters={given}").adapters
    assert (adapter.path, adapter.get("scale")) == (path, scale)


def test_row_34_two_paths_of_adapters():
    first, second = composed("predict", "adapters=[{path: ~/a.safetensors}, {path: b=1, scale: 2}]").adapters
    assert (first.path, second.path, second.scale) == ("~/a.safetensors", "b=1", 2)


def test_row_34_sources_of_data():
    [source] = composed("train", "data=mixed", "data.sources=[{root: ~/photos, weight: 2}]").data.sources
    assert (source.root, source.weight) == ("~/photos", 2)
