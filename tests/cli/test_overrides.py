"""Free text on the command line reaches the configuration letter for letter."""

import random

import pytest
from hydra import compose, initialize_config_module
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from sdmodule.cli.config_keys import key_tags, read_tags
from sdmodule.cli.instantiate import instantiate
from sdmodule.cli.overrides import quote_overrides

LETTERS = ["a", "é", " ", "'", '"', "\\", "$", "{", "}", "[", "]", "(", ")", ",", ":", "=", "?", "#", "\n", "\t", "🦊"]

NASTY = [
    "a cat, (fluffy:1.2), 50% off = {fun} ünïcode",
    "it's a 'cat'",
    'a "cat"',
    '"\'"',
    "back\\slash",
    "trailing\\",
    "trailing\\\\",
    "trailing\\\n",
    "\\'",
    "\\\\'",
    "'\\",
    "${x}",
    "\\${x}",
    "\\\\${x}",
    "${oc.env:HOME}",
    "'${x}'\\",
    "${",
    "$5",
    "???",
    "",
    " ",
    " leading and trailing ",
    "two\nlines",
    "\ttab\r",
    "a, b",
    "a: b = c",
    "true",
    "1.0",
    "choice(a,b)",
    "range(1,3)",
    "~x",
    "[a] cat [b]",
    "{a: b}",
    "[",
    "a]",
    "<lora:x:1>",
    "🦊 #1 @home %d !tag &ref *ref",
]


def parsed(argument, sweep=False):
    """Requests of an argument that Hydra reads, or that its sweeper first passes on to a job."""
    [override] = OverridesParser.create().parse_overrides(quote_overrides([argument]))
    if sweep:
        [[[argument]]] = BasicSweeper.split_arguments([override], None)
        [override] = OverridesParser.create().parse_overrides([argument])
    data = {"_target_": "sdmodule.data.prompts.PromptDataModule", "prompt": "${prompt}"}
    return instantiate(OmegaConf.create({"prompt": override.value(), "data": data}).data).requests


@pytest.mark.parametrize("sweep", [False, True], ids=["single", "sweep"])
@pytest.mark.parametrize("text", NASTY, ids=repr)
def test_a_prompt_arrives_letter_for_letter(text, sweep):
    assert parsed(f"prompt={text}", sweep)[0].prompt == text


def test_random_text_arrives_too():
    rng = random.Random(0)
    for _ in range(100):
        text = "x" + "".join(rng.choices(LETTERS, k=rng.randrange(9)))
        assert [parsed(f"prompt={text}", sweep)[0].prompt for sweep in (False, True)] == [text, text]


@pytest.mark.parametrize("text", ["???", "${x}\\", " it's: (a, b) "])
def test_a_prompt_arrives_through_the_composed_configuration(text):
    with initialize_config_module("sdmodule.conf", version_base="1.3"):
        cfg = compose("predict", quote_overrides([f"prompt={text}", f"negative_prompt={text}"]))
    [request] = instantiate(cfg.data).requests
    assert (request.prompt, request.negative_prompt) == (text, text)


@pytest.mark.parametrize("sweep", [False, True], ids=["single", "sweep"])
def test_a_value_in_brackets_is_a_list(sweep):
    assert [r.prompt for r in parsed('prompt=["a, b","it\'s ]"]', sweep)] == ["a, b", "it's ]"]
    assert [r.prompt for r in parsed("prompt=['a cat', 'a dog']", sweep)] == ["a cat", "a dog"]


def test_null_stays_null():
    assert quote_overrides(["prompt=null"]) == ["prompt=null"]


def test_other_arguments_are_left_alone():
    arguments = ["steps=20", "-m", "sampler=ddim,euler", "prompts=a.txt", "+x='a b'", "~logger", "prompt"]
    assert sorted(quote_overrides(arguments)) == sorted(arguments)


def test_options_come_before_overrides():
    assert quote_overrides(["steps=3", "-m", "prompt=a -m", "~logger", "--cfg", "job"]) == [
        *("-m", "--cfg", "job", "steps=3", "prompt='a -m'", "~logger")
    ]
    assert quote_overrides(["steps=3", "--config-dir", "runs/a=b"]) == ["--config-dir", "runs/a=b", "steps=3"]


@pytest.mark.parametrize("key", ["ckpt_path", "pretrained", "data.root", "output_dir", "prompts", "+cache.folder"])
@pytest.mark.parametrize(
    "path",
    ["runs/checkpoints/step=7.ckpt", "2024", "1_000", "my photos (2)/a", "it's {here}", "C:\\photos\\", "a = b, c"],
)
def test_a_path_arrives_letter_for_letter(key, path):
    [override] = OverridesParser.create().parse_overrides(quote_overrides([f"{key}={path}"]))
    assert OmegaConf.create({"value": override.value()}).value == path


def test_a_path_can_refer_to_other_settings():
    [override] = OverridesParser.create().parse_overrides(quote_overrides(["output_dir=runs/seed=${seed}"]))
    assert OmegaConf.create({"output_dir": override.value(), "seed": 3}).output_dir == "runs/seed=3"


def test_a_path_that_hydra_reads_is_left_to_it():
    arguments = ["pretrained=a,b", "output_dir=runs/${seed}", "ckpt_path=null"]
    assert quote_overrides(arguments) == arguments


@pytest.mark.parametrize(
    ("typed", "value"),
    [
        ("my_lora/export", "my_lora/export"),
        ("runs/lr=1e-4, rank=4.safetensors", "runs/lr=1e-4, rank=4.safetensors"),
        ("2024", "2024"),
        ("[a.safetensors,b.safetensors]", ["a.safetensors", "b.safetensors"]),
        ("[runs/lr=1e-4/a.safetensors, b]", ["runs/lr=1e-4/a.safetensors", "b"]),
        ("[{path: a, scale: 0.5}, b]", [{"path": "a", "scale": 0.5}, "b"]),
        ("[{path: lr=1e-4/a, scale: 0.5}]", [{"path": "lr=1e-4/a", "scale": 0.5}]),
        ("[]", []),
        ("null", None),
    ],
)
def test_adapters_are_a_path_or_a_list(typed, value):
    [override] = OverridesParser.create().parse_overrides(quote_overrides([f"adapters={typed}"]))
    assert OmegaConf.to_container(OmegaConf.create({"adapters": override.value()}))["adapters"] == value


PROMPTS = {
    "prompt",
    "negative_prompt",
    "prompt_2",
    "negative_prompt_2",
    "data.prompt",
    "data.class_prompt",
    "tuning.placeholder",
    "tuning.initializer",
}
TEXT = {"image", "mask", "control", "ip_adapter_image", "from", "data.shards", "data.val_shards", "data.url"}
TEXT |= {"data.val_url"}
PATHS = {
    "pretrained",
    "refiner",
    "ip_adapter",
    "prompts",
    "ckpt_path",
    "output_dir",
    "cache.folder",
    "callbacks.export.folder",
}
PATHS |= {"shard", "data.verify", "data.sprites", "data.cache_folder"}
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler", "controlnet")
PARTS += ("refiner", "ip_adapter", "image_encoder")
PATHS |= {f"components.{part}" for part in PARTS}
PATHS |= {"data.root", "data.val_root", "data.class_root", "data.made_in", "data.name", "data.split", "data.val_split"}
PATHS |= {"data.subset", "data.image_column", "data.caption_column", "data.caption_key", "data.revision", "revision"}
PATHS |= {"run", "against", "scorer", "inception", "callbacks.metrics.scorer", "callbacks.checkpoint.monitor"}


def test_the_configuration_tags_its_text_keys():
    tags = key_tags()
    assert {key for key, tag in tags.items() if tag == "prompt"} == PROMPTS
    assert {key for key, tag in tags.items() if tag == "text"} == TEXT
    assert {key for key, tag in tags.items() if tag in ("path", "name")} == PATHS
    assert {key for key, tag in tags.items() if tag == "paths"} == {"adapters", "controlnet"}


def test_a_comment_protects_a_new_key(tmp_path):
    (tmp_path / "data" / "shared").mkdir(parents=True)
    (tmp_path / "tuning").mkdir()
    (tmp_path / "top.yaml").write_text("a: null  # text: a\nb:  # path: all below\n  c: null\n  d: x\ne: 1  # text\n")
    (tmp_path / "data" / "shared" / "x.yaml").write_text("_target_: y\nf: ${g}/h  # name: f\n")
    (tmp_path / "tuning" / "x.yaml").write_text("# @package _global_\ntuning:\n  i: ???  # text: i\ndata:\n  j: 1\n")
    assert read_tags(tmp_path) == {"a": "text", "b.c": "path", "b.d": "path", "data.f": "name", "tuning.i": "text"}
