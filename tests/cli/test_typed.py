"""What people type wrongly, through the real commands: one sentence of ours that says what was meant."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sdmodule.cli.main import predict_main, train_main
from tests.cli.test_commands import told

ROOT = Path(__file__).parents[2]
MAINS = {"predict": predict_main, "train": train_main}

UNKNOWN_KEYS = {
    "predict tome.ration=0.5": "did you mean tome.ratio?",
    "predict lr=1e-4": "did you mean model.optimizer.lr?",
    "train lr=1e-4": "did you mean model.optimizer.lr?",
    "train learning_rate=1e-4": "did you mean model.optimizer.lr?",
    "train optimizer.lr=1e-4": "did you mean model.optimizer.lr?",
    "train precision=bf16-mixed": "did you mean trainer.precision?",
    "train trainer.max_step=5": "did you mean trainer.max_steps?",
    "train max_steps=5": "did you mean trainer.max_steps?",
    "train steps=5": "did you mean sampler.steps or trainer.max_steps?",
    "train epochs=5": "did you mean trainer.max_epochs?",
    "train data.batchsize=4": "did you mean data.batch_size?",
    "train batch_size=4": "did you mean data.batch_size?",
    "train callbacks.sample.num_prompts=2": "callbacks.samples.num_prompts",
    "predict sampler.step=5": "did you mean sampler.steps?",
    "predict ratio=0.5": "did you mean tome.ratio?",
    "predict batchsize=4": "did you mean batch_size?",
    "predict num_steps=5": "did you mean steps?",
    "predict num_inference_steps=5": "did you mean steps?",
    "predict guidance=7": "did you mean guidance_scale",
    "predict cfg_scale=7": "did you mean guidance_scale?",
    "predict SEED=7": "did you mean seed?",
    "predict adapter=a.safetensors": "adapters? --help",
    "predict task=inpaint": "did you mean model=inpaint?",
    "predict scheduler=euler": "did you mean sampler=euler?",
    "predict samplr=euler": "did you mean sampler=euler?",
    "predict steps.many=3": "steps is a value and has no keys",
    "predict adapters.path=a.safetensors": "adapters is a list and has no keys",
    "predict zzz=3": "there is no key zzz; --help shows all keys",
    "predict hydra.jobs.name=a": "did you mean hydra.job.name?",
    # keys and groups of other options, and of the other command
    "train tuning.rank=4": "only tuning=lora has this key",
    "train rank=4": "did you mean tuning.rank with tuning=lora?",
    "train class_prompt=a": "did you mean data.class_prompt with data=dreambooth?",
    "predict data.root=photos": "is for train.py",
    "predict tuning=lora": "is for train.py",
    "train speed=fast": "is for predict.py",
    "predict experiment=lora": "is for train.py, because it chooses data=emoji",
    "predict experiment=tiny_autoencoder": "is for train.py, because it chooses model=autoencoder",
    "predict data=emoji": "predict.py does not take it; choose data=prompts",
    "predict model@other=inpaint": "write model=inpaint",
}

OPTIONS_OF_GROUPS = {
    "predict sampler=dddim": "did you mean sampler=ddim? choose one of checkpoint, ddim, ",
    "train data=emojis": "did you mean data=emoji? choose one of dreambooth, emoji, ",
    "train trainer=gpus": "did you mean trainer=gpu? choose one of ",
    "predict trainer=wandb": "did you mean logger=wandb?",
    "predict callbacks=[timng]": "did you mean callbacks=timing?",
    "predict -m sampler=ddim,dddim": "sampler=dddim: unknown",
    "predict sampler=": "choose one of checkpoint",
    "predict sampler=???": "sampler: missing; add sampler=OPTION",
    "predict sampler=null": "must be an option of the group (checkpoint, ddim, ",
    "predict tome=0.5": "must be an option of the group (exact, none, tomesd, window)",
    "predict sampler={zzz:1}": "sets a key that sampler does not have",
    "predict hydra/launcher=nothing": "choose one of basic",
}

ADDED_AND_REMOVED = {
    "predict +sampler=euler": "sampler=ddim is chosen already; write sampler=euler, without the plus sign",
    "predict ++sampler=euler": "write sampler=euler, without the plus sign",
    "predict +steps=3": "steps exists already; write steps=3, without the plus sign",
    "predict ~step": "there is no key step to remove; did you mean ~steps",
    "predict ~sampler=euler": "sampler=ddim is chosen; write ~sampler",
    "predict ~steps=3": "steps is 50; write ~steps",
    "predict prompt=a ~trainer": "trainer: is missing; leave out ~trainer",
}

VALUES = {
    "train": "data.root: missing; add data.root=…",
    "predict steps=1,2": "several values are a sweep; add -m (--multirun)",
    "predict sampler=ddim,euler": "add -m (--multirun) to run one after the other.",
    "predict logger=csv,wandb": "or write logger=[csv,wandb] for a list",
    "predict prompt=a seed=???": "seed: missing; add seed=…",
    "predict prompt=a 'steps=${steps}'": "steps=${steps}: refers to itself",
    "predict prompt=a hydra.searchpath=3": "hydra.searchpath=3: must be a list of folders",
    "predict steps=range(1,3)": "several values are a sweep; add -m (--multirun)",
    "predict -m steps=range(1,a)": "cannot be read as a sweep",
    "predict -m steps=choice(": "cannot be read as a sweep",
    "predict -m steps=interval(1,3)": "cannot be run as a sweep",
    "predict -m sampler=glob(zzz*)": "-m: the sweep has no run",
    "predict -m hydra.job.name=a,b": "settings of Hydra cannot be swept",
    "predict steps=[1": "steps=[1: brackets or quotes do not match",
    "predict steps=={3}": "has characters that mean something to Hydra",
    "predict 'ste ps=3'": "'ste ps' is no name of a key",
    "predict hydra.job.chdir=abc": "hydra.job.chdir=abc: must be true or false",
    "predict hydra.mode=foo": "hydra.mode=foo: unknown; choose one of MULTIRUN, RUN",
    "predict prompt=a 'steps=${stepz}'": "refers to stepz, which does not exist; did you mean ${steps}?",
    "predict prompt=a 'steps=${foo:3}'": "there is no resolver foo",
    "predict prompt=a 'output_dir=${oc.env:NOT_SET_AT_ALL}'": "the environment variable NOT_SET_AT_ALL is not set",
    "predict prompt=a tomesd_cfg=ratio:0.5": "tomesd_cfg=ratio:0.5: must be settings, in quotes",
    "predict prompt=a 'tomesd_cfg={ratio: 0.5}' tome.ratio=0.3": "give one of them",
    "predict prompt=a hydra.sweeper.params.x=3": "these settings cannot be composed",
    "predict prompt=a pretrained=": "pretrained=: must be a non-empty path",
}

WORDS = {
    "predict --prompt x": "write prompt=x",
    "predict --prompt=x": "write prompt=x",
    "predict -prompt=x": "write prompt=x",
    "predict --prompt a red circle": 'write prompt="a red circle"',
    "predict --guidance-scale 7": "write guidance_scale=7",
    "predict --num-steps=3": "write steps=3",
    "train --lr 3": "write model.optimizer.lr=3",
    "train --from a.png": "there is no such option",
    "predict --hlp": "did you mean --help?",
    "predict -x": "there is no such option",
    "predict prompt = x": "has spaces around the =; write prompt=x",
    "predict prompt= x": "has a space after the =; write prompt=x",
    "predict prompt =x": "has spaces around the =; write prompt=x",
    "predict seed = -1": "write seed=-1",
    "predict =3": "there is no key before the =",
    "predict tomesd_cfg={ratio: 0.5}": "put it in quotes: 'tomesd_cfg={ratio: 0.5}'",
    "predict adapters=[{path: a, scale: 1}] steps=3": "put it in quotes: 'adapters=[{path: a, scale: 1}]'",
    "predict prompt=a red circle": 'put it in quotes: prompt="a red circle"',
    "predict a red circle": 'settings are written as key=value; write prompt="a red circle"',
    "predict steps": "write steps=VALUE",
    "predict euler": "write sampler=euler",
    "predict many.txt": "write prompts=many.txt",
    "train lora": "write tuning=lora",
    "train photos": "write data.root=FOLDER",
    "predict help": "write --help",
    "predict --cfg": "needs a value; choose one of all, hydra, job",
    "predict --cfg jobs": "unknown; choose one of all, hydra, job",
    "predict --cfg job -p nowhere": "--package=nowhere: there is no such key",
    "predict --info foo": "unknown; choose one of all, config, ",
    "predict --cfg job -m": "--cfg --multirun: cannot be given together",
    "predict --resolve": "write --cfg job --resolve",
    "predict --config-name nowhere": "--config-name=nowhere: not found",
    "predict --config-dir nowhere": "nowhere: not found; give an existing folder",
    "predict --config-path nowhere": "use --config-dir=FOLDER",
    "predict --help promt": "did you mean prompt",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "lines",
    [UNKNOWN_KEYS, OPTIONS_OF_GROUPS, ADDED_AND_REMOVED, VALUES, WORDS],
    ids=["keys", "options", "plus and tilde", "values", "words"],
)
def test_a_wrong_line_is_answered_in_one_sentence(call, tmp_path, monkeypatch, lines):
    monkeypatch.chdir(tmp_path)
    wrong = {}
    for line, sentence in lines.items():
        command, *words = split(line)
        status, printed, complaint = call(MAINS[command], *words)
        one_line = complaint.startswith("error: ") and complaint.count("\n") == 1
        if status != 1 or printed or not one_line or sentence not in complaint or foreign(complaint):
            wrong[line] = (status, printed, complaint)
    assert wrong == {}
    assert list(tmp_path.iterdir()) == [] or any(" -m " in line for line in lines)  # a sweep has a folder first


def split(line: str) -> list[str]:
    """The words of a line; quotes keep only those together that begin a word, since braces are split as in a shell."""
    words, rest = [], line
    while rest:
        quote = "'" if rest.startswith("'") else " "
        word, _, rest = rest.removeprefix("'").partition(quote)
        words.append(word)
        rest = rest.lstrip()
    return words


def foreign(complaint: str) -> bool:
    """Whether a message has words of Hydra, OmegaConf or ANTLR in it."""
    marks = ("hydra.cc", "full_key", "object_type", "mismatched input", "EOF", "Viable", "Could not override", "append")
    return any(mark in complaint for mark in marks)


def test_a_new_key_can_still_be_added(call, tmp_path):
    status, printed, _ = call(predict_main, "+new.key=3", "--cfg", "job", "--package", "new")
    assert (status, printed) == (0, "# @package new\nkey: 3\n")


def test_hydras_abbreviations_still_work(call):
    for words in (["-cjob"], ["--cf", "job"], ["--cfg=job"], ["-c", "job"]):
        status, printed, complaint = call(predict_main, *words, "steps=3")
        assert (status, complaint) == (0, "") and "\nsteps: 3\n" in printed


@pytest.mark.parametrize("words", [["--version"], ["prompt=a", "--version"], ["--vers"], ["--version", "-m", "x"]])
def test_version_is_ours_beside_any_other_argument(call, words):
    for main in MAINS.values():
        status, printed, complaint = call(main, *words)
        assert (status, complaint) == (0, "") and printed.startswith("sdmodule ") and ", torch " in printed


def test_the_traceback_of_an_error_of_hydra_can_be_asked_for(call, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(Exception, match="Could not override 'stepz'"):
        call(predict_main, "stepz=3")


def test_an_empty_wandb_mode_is_named(call, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "")
    out = tmp_path / "out"
    result = call(predict_main, "prompt=a", f"pretrained={checkpoint}", "logger=wandb", f"output_dir={out}")
    told(result, "WANDB_MODE=: unknown", "disabled, offline, online")
    assert not out.exists()


def test_epochs_are_announced_in_steps(call, checkpoint, photos, tmp_path):
    settings = [f"data.root={photos}", f"pretrained={checkpoint}", f"output_dir={tmp_path / 'out'}", "callbacks=[]"]
    settings += ["data.batch_size=2", "data.val_fraction=0", "resolution=32"]
    status, printed, _ = call(train_main, *settings, "trainer.max_epochs=1")
    assert status == 0 and "for 3 steps" in printed


def test_configurations_of_ones_own_are_among_the_hints(call, tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "sampler").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nsteps: 3\n")
    (tmp_path / "experiment" / "broken.yaml").write_text("steps: [3\n")
    (tmp_path / "sampler" / "special.yaml").write_text("defaults: [checkpoint]\nmyown: 3\n")
    own = f"--config-dir={tmp_path}"
    told(call(predict_main, own, "experiment=mien"), "did you mean experiment=mine?", "mine, sd15")
    told(call(predict_main, own, "sampler=special", "sampler.myow=4"), "did you mean sampler.myown?")
    told(call(predict_main, own, "experiment=broken", "prompt=a"), "broken.yaml", "line 1")
    assert "  special  " in call(predict_main, own, "--help", "sampler=special")[1].replace("\n", "  \n")


@pytest.mark.parametrize("script", ["predict.py", "train.py"])
def test_a_python_without_the_packages_is_told_of_the_right_one(script):
    """As ``python predict.py`` is outside of the virtual environment."""
    without = [sys.executable, "-S", str(ROOT / script), "--help"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(without, capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: ") and f"use .venv/bin/python {script}" in done.stderr
    assert done.stderr.count("\n") == 1
