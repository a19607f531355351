"""Whatever settings predict is given, it ends in images or in one error message."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from sdmodule.cli.main import predict_main
from sdmodule.components.schedulers import SHORT_NAMES

JUNK = [
    "null",
    "true",
    "-1",
    "0",
    "1",
    "2",
    "7",
    "0.5",
    "abc",
    "''",
    "[]",
    "{}",
    "[1,2]",
    "[a,b]",
    "{a: b}",
    "nan",
    "inf",
]
JUNK += [
    "-inf",
    "1e400",
    "1e-9",
    "10000000000000000000000",
    "???",
    "'${x}'",
    "'${oc.env:HOME}'",
    "'{0.x}'",
    "%s",
    "../x",
]
JUNK += ["/", "\x00", "'é\u2028'", "x" * 300, "1_000", "0x10", "[null]", "[[1]]", "{_target_: os.getcwd}"]

# for some keys, values that are meant for them; the valid ones are small, to be fast
MEANINGFUL = {
    "prompt": ["a red circle", "[a,b,c]", "(a:1.5)", "(a:99)", "((((a", "a\\", "[a, [b]]", "a " * 200],
    "prompts": ["prompts.jsonl", "prompts.txt", "empty.jsonl", "nothing.jsonl"],
    "negative_prompt": ["[a,b]", "red"],
    "image": ["photo.png", "[photo.png,photo.png]", "prompts.txt", "nothing.png"],
    "mask": ["mask.png", "alpha", "[0,0,8,8]", "[8,8,0,0]", "[0,0,999,9]", "[[0,0,8,8],[1,1,9,9]]"],
    "model": ["text2image", "inpaint", "autoencoder"],
    "strength": ["0.1", "0.6", "1.0001"],
    "mask_blur": ["1.5", "1e6"],
    "only_masked": ["true", "false", "yes"],
    "padding": ["3", "100000"],
    "revision": ["main"],
    "steps": ["3", "1000", "1001"],
    "guidance_scale": ["7.5", "1", "-3"],
    "height": ["32", "40", "33", "4"],
    "width": ["32", "40", "33", "4"],
    "num_images_per_prompt": ["3"],
    "batch_size": ["3", "1000"],
    "precision": ["32-true", "bf16-mixed", "64-true", "16-true", "16-mixed"],
    "sampler": [*SHORT_NAMES, "checkpoint", "ddim_sd15"],
    "sampler.scheduler": [*SHORT_NAMES, "{name: ddim, clip_sample: true}", "{name: ddim, nothing: 1}", "{_target_: x}"],
    "sampler.eta": ["1", "2"],
    "sampler.guidance_rescale": ["0.7", "2"],
    "tome": ["none", "exact", "window", "tomesd"],
    "tome.ratio": ["0.25", "0.75", "0.99"],
    "tomesd_cfg": ["{ratio: 0.5}", "{ratio: 2}"],
    "trainer": ["cpu", "gpu", "nothing"],
    "logger": ["csv", "none", "[csv,csv]", "nothing"],
    "callbacks": ["[predictions]", "[predictions,page]", "[predictions,nothing]"],
    "data.batch_row": ["0", "5"],
    "from": ["photo.png", "prompts.txt", "nothing.png"],
    "resume": ["true"],
    "seed": ["18446744073709551616", "9223372036854775808", "4294967296"],
    "experiment": ["sd15", "nothing"],
    "components.vae": ["tiny", "nothing"],
    "components.scheduler": ["tiny"],
}
EXCLUDED = {
    "pretrained",  # set by the test
    "output_dir",  # set by the test
    "trainer.devices",  # these start processes
    "trainer.strategy",
    "trainer.default_root_dir",
}


def predict_keys() -> list[str]:
    """Every key of predict's configuration, groups included."""

    def leaves(node: DictConfig, name: str = "") -> list[str]:
        keys = []
        for key in node:
            value = OmegaConf.to_container(node, resolve=False)[key]
            keys.append(f"{name}{key}")
            if isinstance(value, dict) and value:
                keys += leaves(node._get_node(key), f"{name}{key}.")
        return keys

    GlobalHydra.instance().clear()
    with initialize_config_module("sdmodule.conf", version_base="1.3"):
        config = compose("predict")
    return [key for key in leaves(config) if key not in EXCLUDED and not key.endswith("_target_")]


KEYS = sorted({*predict_keys(), *MEANINGFUL})


@st.composite
def overrides(draw: st.DrawFn) -> list[str]:
    most = draw(st.sampled_from([1, 1, 2, 3, 5]))  # with many settings most examples end at the first wrong one
    keys = draw(st.lists(st.sampled_from(KEYS), max_size=most, unique=True))
    arguments = []
    for key in keys:
        junk = st.sampled_from(JUNK)
        value = draw(st.one_of(st.sampled_from(MEANINGFUL[key]), junk) if key in MEANINGFUL else junk)
        arguments.append(f"{key}={value}")
    if draw(st.integers(0, 9)) and not {"prompt", "prompts"} & set(keys):
        arguments.append("prompt=" + draw(st.text(max_size=30)))
    return draw(st.permutations(arguments))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with some files in it."""
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "seed": 3}\n')
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    (tmp_path / "empty.jsonl").write_text("")
    Image.new("RGBA", (40, 48), (9, 90, 200, 0)).save(tmp_path / "photo.png")
    Image.new("L", (40, 48), 255).save(tmp_path / "mask.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def outcome(call, checkpoint: Path, folder: Path, arguments: list[str]) -> str:
    """Run predict; whether it ended in ``"images"`` or in an ``"error"``, and neither is half done."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    steps = [] if any(one.startswith("steps=") for one in arguments) else ["steps=2"]
    command = [f"pretrained={checkpoint}", *steps, "progress=false", *arguments, f"output_dir={out}"]
    status, printed, errors = call(predict_main, *command)
    lines = [line for line in errors.splitlines() if not line.startswith("warning: ")]
    assert "Traceback" not in errors + printed, errors
    assert not list(folder.rglob("*.part"))
    if status == 0:
        records = [json.loads(line) for line in (out / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
        assert records
        for record in records:
            Image.open(out / record["file"]).load()
        return "images"
    assert status == 1 and len(lines) == 1 and lines[0].startswith("error: "), (status, errors)
    assert len(lines[0]) > 20
    return "error"


@pytest.mark.parametrize("part", range(2))
def test_any_settings_end_in_images_or_in_one_error(call, checkpoint, folder, part):
    outcomes: list[str] = []

    @seed(part)
    @settings(
        max_examples=28,
        deadline=None,
        database=None,
        phases=[Phase.generate],  # shrinking takes minutes, and examples are short as they are
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(arguments=overrides())
    def one(arguments: list[str]) -> None:
        outcomes.append(outcome(call, checkpoint, folder, arguments))

    one()
    print(len(outcomes), "examples,", outcomes.count("images"), "with images")
    assert len(outcomes) >= 25 and outcomes.count("images") >= 4 and outcomes.count("error") >= 4


def test_the_most_steps_end_in_images(call, checkpoint, folder):
    """With a schedule of 50 timesteps, not the usual 1000, which take half a minute."""
    config = json.loads((checkpoint / "scheduler" / "scheduler_config.json").read_text())
    (folder / "schedule").mkdir()
    (folder / "schedule" / "scheduler_config.json").write_text(json.dumps(config | {"num_train_timesteps": 50}))
    short = ["prompt=a", f"components.scheduler={folder / 'schedule'}"]
    assert outcome(call, checkpoint, folder, [*short, "steps=49"]) == "images"
    assert outcome(call, checkpoint, folder, [*short, "steps=50"]) == "error"
