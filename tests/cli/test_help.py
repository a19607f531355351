"""What the commands say of themselves: ``--help``, ``sdmodule``, ``python -m sdmodule``."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from sdmodule.cli import about
from sdmodule.cli.command_tree import CommandTree
from sdmodule.cli.main import predict_main, train_main

ROOT = Path(__file__).parents[2]
MAINS = {"predict": predict_main, "train": train_main}

SELF_EVIDENT = re.compile(
    r"components\.\w+|logger\.\w+\.(name|version|save_dir)|callbacks\.\w+\.(output_dir|dirpath)"
    r"|trainer\.(accelerator|devices|strategy|max_steps|\w+_every_n_steps|gradient_clip_val|accumulate_grad_batches"
    r"|limit_val_batches|default_root_dir)"
)
"""Keys whose names say what they are, the trainer's to everyone who knows Lightning."""


def leaves(value, prefix=""):
    """Dotted names of all values."""
    if not isinstance(value, dict) or not value:
        return [prefix]
    return [leaf for key, inner in value.items() for leaf in leaves(inner, f"{prefix}.{key}" if prefix else key)]


def entries(page):
    """Key, default and explanation of each line; what goes on below is joined."""
    joined = re.sub(r"\n {24,}", "  ", page)
    found = re.findall(r"^ {0,2}([\w.]+)(?:=(.*?))?(?: {2,}(.*))?$", joined, re.MULTILINE)
    return {key: (default, explanation.strip()) for key, default, explanation in found}


@pytest.mark.parametrize("command", MAINS)
def test_every_key_of_the_composed_tree_is_in_the_help(call, command):
    status, page, complaint = call(MAINS[command], "--help")
    assert (status, complaint) == (0, "")
    with initialize_config_module("sdmodule.conf", version_base="1.3"):
        cfg = compose(command)
    shown = entries(page)
    keys = leaves(OmegaConf.to_container(cfg, resolve=False))
    assert [key for key in keys if key not in shown] == []
    unexplained = [key for key in keys if not shown[key][1] and not SELF_EVIDENT.fullmatch(key)]
    assert unexplained == []
    assert [line for line in page.splitlines() if len(line) > 100] == []
    order = [line.partition("=")[0] for line in page.splitlines() if re.match(r"\w+=", line)]
    groups = [group for group in CommandTree(command).choices if not group.startswith("hydra")]
    assert [name for name in order if name in groups] == groups


def test_the_help_shows_the_defaults(call):
    shown = entries(call(predict_main, "--help")[1])
    wanted = {"prompt": "null", "steps": "50", "guidance_scale": "null", "precision": "32-true", "tome.ratio": "0.0"}
    wanted |= {"sampler.scheduler": "ddim", "sampler.steps": "50", "adapters": "[]", "speed.channels_last": "false"}
    wanted |= {"tome": "none", "sampler": "ddim", "model": "text2image", "experiment": "null"}
    assert {key: shown[key][0] for key in wanted} == wanted
    assert shown["sampler.steps"][1] == "as steps"
    changed = entries(call(predict_main, "--help", "steps=7", "sampler.eta=0.5")[1])
    assert [changed[key][0] for key in ("steps", "sampler.steps", "sampler.eta")] == ["7", "7", "0.5"]
    assert entries(call(train_main, "--help")[1])["data.root"] == ("???", "must be given; path: the folder")


@pytest.mark.parametrize(
    ("line", "contained", "missing"),
    [
        (
            "predict --help sampler",
            ["sampler=ddim is chosen", "  euler_a ", "  sampler.eta=0.0"],
            ["tome", "num_images"],
        ),
        ("predict sampler --help", ["sampler=ddim is chosen"], ["tome"]),
        ("predict --help=tome", ["  window  ", "  tome.ratio=0.0"], ["sampler"]),
        ("predict --help sampler=euler", ["sampler=euler is chosen", "sampler.scheduler=euler"], []),
        ("predict -h prompt", ["prompt=null"], ["tome"]),
        ("predict --help callbacks.timing", ["callbacks.timing.warmup_steps=3"], ["callbacks.page", "tome"]),
        ("train --help data=dreambooth", ["  emoji   ", "data.class_prompt=null", "data.root=???"], ["tome.ratio"]),
        ("train --help tuning=lora", ["tuning.rank=4", "tuning=lora sets:", "model.optimizer.lr=1.0e-4"], ["tome"]),
        ("train --help experiment=lora", ["  dreambooth_lora ", "  tuning=lora", "trainer.max_steps=2000"], []),
        ("train --help cache", ["cache=none is chosen", "  cache.verify=stat"], []),
        ("predict --help data", ["  prompts  "], ["emoji"]),
    ],
)
def test_help_on_a_group_or_a_key(call, line, contained, missing):
    command, *words = line.split()
    status, page, complaint = call(MAINS[command], *words)
    assert (status, complaint) == (0, "")
    assert [text for text in contained if text not in page] == [] == [text for text in missing if text in page]


def test_hydras_own_pages_are_unchanged(call):
    status, page, _ = call(predict_main, "--hydra-help")
    assert status == 0 and page.startswith("Hydra (") and "--multirun,-m" in page
    status, page, _ = call(predict_main, "--cfg", "job")
    with initialize_config_module("sdmodule.conf", version_base="1.3"):
        composed = OmegaConf.to_yaml(compose("predict"))
    assert status == 0 and page == composed


def test_about_says_what_there_is(call, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    status, page, complaint = call(about.main)
    lines = page.splitlines()
    assert (status, complaint) == (0, "") and 15 < len(lines) < 25
    assert any("tiny, tiny-inpaint" in line for line in lines) and any(line.startswith("  cpu (") for line in lines)
    assert re.search(r"python\S* train\.py experiment=", page) and "README.md" in page
    monkeypatch.chdir(tmp_path)
    assert f"{ROOT}/predict.py" in call(about.main)[1]
    monkeypatch.setattr(about, "ROOT", tmp_path)  # as if installed from a wheel
    assert re.search(r"  \S*sdmodule-predict prompt=", call(about.main)[1])


def test_about_has_a_version_and_refuses_other_words(call):
    assert call(about.main, "--version")[1].startswith("sdmodule ")
    status, printed, complaint = call(about.main, "prompt=a")
    assert (status, printed) == (1, "") and re.match(r"error: prompt=a: sdmodule takes --version only; ", complaint)
    entry = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert '\nsdmodule = "sdmodule.cli.about:main"\n' in entry


@pytest.mark.parametrize("line", ["predict.py --help", "train.py --help", "predict.py --version", "-m sdmodule"])
def test_output_that_nobody_reads_on_is_no_error(line):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, *line.split()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, cwd=ROOT, env=environment)
    os.close(write)
    assert (done.stderr, done.returncode) == (b"", 0) or (done.stderr == b"" and done.returncode == 1)


def test_importing_the_package_imports_neither_torch_nor_diffusers():
    code = "import sys, sdmodule; print(sorted({'torch', 'diffusers', 'lightning', 'hydra'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
