"""Every command line of the README from before 0.1.0 can still be typed, renamed keys aside, and sets what it says."""

from __future__ import annotations

import shlex
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_module
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from omegaconf._utils import get_yaml_loader
from PIL import Image

from sdmodule.cli.main import predict_main, train_main
from sdmodule.cli.overrides import quote_overrides, with_png_settings

RENAMED: dict[str, str] = {
    "model.caption_dropout": "objective.caption_dropout",
    "model.timestep_shift": "objective.timestep_shift",
    "model.prior_weight": "objective.prior_weight",
    "model.compile": "training.compile",
    "model.checkpointing": "training.checkpointing",
    "model.convert": "training.inpaint.convert",
    "model.whole_masks": "training.inpaint.full_mask_share",
    "model.hole_weight": "training.inpaint.masked_area_weight",
}
"""Keys that 0.1.0 has renamed."""

COMMANDS = r"""
predict.py prompts=docs/grid.txt seed=2
predict.py prompt="a red circle on a blue background"
predict.py 'prompt=["a blue heart", "a green square"]' num_images_per_prompt=4 seed=7
predict.py prompts=prompts.jsonl
predict.py prompt="a blue heart" sampler=dpmpp_2m steps=20
predict.py -m prompt="a blue heart" guidance_scale=2,4,8
predict.py prompts=prompts.jsonl output_dir=my_run resume=true
predict.py --from my_run/images/00003-3.png
predict.py --from my_run/images/00003-3.png steps=100
predict.py prompt="a blue heart" tome.ratio=0.5
predict.py prompt="a blue heart" speed=turbo
predict.py -m prompt="a blue heart" tome.ratio=0,0.5,0.75
predict.py prompt="a cat" pretrained=/models/sd15 trainer=gpu precision=16-mixed
predict.py model=inpaint image=photo.png mask=mask.png prompt="a blue star on a white background"
predict.py model=inpaint image=photo.png mask=[400,200,700,500] only_masked=true mask_blur=4
predict.py model=inpaint image=photo.png mask=alpha prompt="a blue star"
train.py data.root=my_photos trainer.max_steps=500
train.py data.root=my_photos output_dir=my_run ckpt_path=last
predict.py --cfg job
predict.py -m tome.ratio=0,0.5,0.75 steps=25 seed=5
train.py data.root=my_photos pretrained=/models/sd15 trainer=gpu \
    trainer.precision=16-mixed trainer.max_steps=2000 output_dir=my_run
train.py experiment=lora data.root=my_photos pretrained=/models/sd15 trainer=gpu output_dir=my_lora
predict.py pretrained=/models/sd15 'adapters=[{path: my_lora/export, scale: 0.8}]' prompt="a photo of my cat"
train.py experiment=dreambooth_lora data.root=my_dog data.prompt="a photo of sks dog" \
    data.class_prompt="a photo of a dog" pretrained=/models/sd15 trainer=gpu
train.py experiment=textual_inversion data.root=my_cat tuning.placeholder="<my-cat>" tuning.initializer=cat
predict.py controlnet=my_net/export control=photo.png control_edges=true prompt="a lighthouse in a storm"
train.py experiment=lora data.root=EMOJI trainer.max_steps=4000
train.py model=inpaint model.convert=true data.root=my_photos pretrained=/models/sd15 \
    trainer=gpu trainer.precision=16-mixed trainer.max_steps=2000 output_dir=my_run
train.py data=mixed 'data.sources=[{root: my_cat, weight: 3, template: "a photo of {}"}, {root: photos}]'
train.py data=huggingface data.name=owner/name data.split=train data.caption_column=caption
train.py data=webdataset data.shards='shards/{000..009}.tar'
train.py experiment=demo data.root=sdmodule/assets/emoji
predict.py experiment=sd15 pretrained=/models/sd15
train.py experiment=tiny_autoencoder output_dir=outputs/tiny_autoencoder
train.py experiment=tiny_text2image components.vae=outputs/tiny_autoencoder/export/vae output_dir=outputs/tiny_first
train.py experiment=tiny_text2image pretrained=outputs/tiny_first/export 'scratch=[text_encoder]' \
    seed=2 data.seed=2 trainer.max_steps=6500 decay_steps=1500 output_dir=outputs/tiny_text2image
train.py experiment=tiny_inpaint
"""
"""Every command line, without ``python``."""

MENTIONED = r"""
predict.py logger=[csv,wandb]
predict.py logger=tensorboard
predict.py logger=mlflow
predict.py logger=wandb
predict.py merge_adapters=true
predict.py tomesd_cfg='{ratio: 0.5}'
predict.py tome=exact
predict.py tome=window
predict.py tome=tomesd
predict.py tome.ratio=0.5 tome.engine=window tome.max_downsample=2 tome.sx=4 tome.sy=2 tome.use_rand=false
predict.py tome.ratio=0.5 tome.merge_attn=true tome.merge_crossattn=true tome.merge_mlp=true tome.reuse_steps=2
predict.py speed=exact
predict.py speed=rounding
predict.py speed=fast
predict.py speed=turbo steps=16 tome=none
predict.py speed.guidance_interval=[0,0.75] speed.cache_every=2 speed.channels_last=true speed.compile=blocks
predict.py speed.attention=sdpa speed.kernels=fastest speed.decode=sliced speed.keep_memory=false
predict.py pretrained=owner/name revision=main variant=fp16 components.unet=other/unet components.scheduler=other
predict.py experiment=sd15
train.py logger=wandb logger.wandb.log_model=true
train.py tuning.text_encoder=true tuning.text_encoder_lr=1e-5 tuning.text_encoder_stop=100
train.py trainer.limit_val_batches=4 callbacks.ema.start_step=50 callbacks.export.weights=raw
train.py experiment=full
train.py experiment=dreambooth
train.py experiment=controlnet
train.py experiment=inpaint
train.py tuning=lora tuning.method=dora
train.py tuning=lora tuning.method=loha
train.py tuning=lora tuning.method=lokr
train.py model=inpaint model.whole_masks=0.5 model.hole_weight=4
train.py objective=min_snr
train.py objective=zero_snr
train.py data.root=x data.center_crop=false data.random_flip=true data.buckets=true data.batch_size=4
train.py data.root=x 'data.template="a photo of {}"' data.shuffle_tags=true data.keep_tags=1 model.caption_dropout=0.1
train.py data=huggingface data.name=owner/name data.val_split=test
train.py data=webdataset data.shards='shards/{000..009}.tar' data.val_shards='shards/010.tar'
train.py data.root=x cache=latents cache.folder=outputs/cache
train.py data.root=x cache=all
train.py data.root=x trainer.nan_loss=skip
train.py data.root=x model.compile=blocks model.checkpointing=outer
train.py data.root=x model.compile=whole model.checkpointing=all
train.py data.root=x model.optimizer._target_=bitsandbytes.optim.AdamW8bit
train.py trainer=ddp
train.py trainer=fsdp
"""
"""Settings that its text and tables name, each in the command that it is about."""


def split(lines: str) -> list[str]:
    return lines.replace("\\\n", "").strip().splitlines()


def renamed(argument: str) -> str:
    key, equals, value = argument.partition("=")
    return RENAMED.get(key, key) + equals + value


def jobs(command: str, arguments: list[str]) -> list[list[str]]:
    """The settings of each job, as the command hands them to Hydra; a sweep has several jobs."""
    quoted = with_png_settings(arguments) if command == "predict" else quote_overrides(arguments)
    options = [argument for argument in quoted if argument in ("-m", "--cfg", "job")]
    settings = [argument for argument in quoted if argument not in options]
    if "-m" not in options:
        return [settings]
    [batch] = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(settings), None)
    return [list(job) for job in batch]


def composed(command: str, settings: list[str]) -> DictConfig:
    with initialize_config_module("sdmodule.conf", version_base="1.3"):
        return compose(command, settings, return_hydra_config=True)


def found(config: DictConfig, key: str) -> Any:
    """What a key is set to: the file of a group, the names of several loggers, or a value."""
    choices = config.hydra.runtime.choices
    if key in choices:
        return choices[key]
    if key == "logger":
        return sorted(config.logger)
    value = OmegaConf.select(config, key, throw_on_missing=False)
    return OmegaConf.to_container(value, resolve=False) if OmegaConf.is_config(value) else value


def parsed(text: str) -> Any:
    return yaml.load(text, Loader=get_yaml_loader())


@pytest.fixture
def image(call, checkpoint, tmp_path, monkeypatch):
    """The image that some of the commands make again, in the current folder."""
    monkeypatch.chdir(tmp_path)
    settings = ["prompt=a blue heart", "num_images_per_prompt=4", "steps=1", f"pretrained={checkpoint}"]
    assert call(predict_main, *settings, "output_dir=my_run")[0] == 0


@pytest.mark.parametrize("line", split(COMMANDS) + split(MENTIONED))
def test_a_command_line_sets_what_it_says(request, line):
    if "--from" in line:
        request.getfixturevalue("image")
    script, *arguments = map(renamed, shlex.split(line))
    command = script.removesuffix(".py")
    given = jobs(command, arguments)
    assert len(given) == (3 if "-m" in arguments else 1)
    for k, settings in enumerate(given):
        config = composed(command, settings)
        for argument in arguments:
            key, equals, text = argument.partition("=")
            if not equals:
                continue
            value = text if key in ("prompt", "data.prompt") and text[0] != "[" else parsed(text)
            if "-m" in arguments and key != "prompt" and "," in text:
                value = parsed(text.split(",")[k])
            assert found(config, key) == (sorted(value) if key == "logger" and isinstance(value, list) else value), key


RUN = [
    """predict.py 'prompt=["a blue heart", "a green square"]' num_images_per_prompt=4 seed=7""",
    'predict.py -m prompt="a blue heart" tome.ratio=0,0.5,0.75',
    'predict.py prompt="a blue heart" speed=turbo',
    "predict.py --from my_run/images/00003-3.png",
    "train.py experiment=lora data.root=EMOJI trainer.max_steps=4000",
]


@pytest.mark.slow
@pytest.mark.parametrize("line", RUN)
def test_a_command_line_runs(request, call, checkpoint, photos, tmp_path, monkeypatch, line):
    """On a small model and in few steps, which are set behind what the line sets."""
    assert line in split(COMMANDS)
    monkeypatch.chdir(tmp_path)
    if "--from" in line:
        request.getfixturevalue("image")
    script, *arguments = map(renamed, shlex.split(line))
    if script == "predict.py":
        small = [] if "--from" in arguments else [f"pretrained={checkpoint}", "steps=2", "speed.compile=none"]
        status, _, errors = call(predict_main, *arguments, *small, "output_dir=out")
        assert (status, errors) == (0, "")
        made = list((tmp_path / "out").rglob("images/*.png"))
        assert len(made) == {"--from": 1, "-m": 3}.get(arguments[0], 8 if "num_images_per_prompt=4" in arguments else 1)
        assert all(Image.open(file).size == (32, 32) for file in made)
    else:
        small = [f"pretrained={checkpoint}", f"data.root={photos}", "trainer.max_steps=1", "resolution=32", "+steps=1"]
        status, _, errors = call(train_main, *arguments, *small, "output_dir=out")
        assert (status, errors) == (0, "")
        assert (tmp_path / "out" / "export").is_dir()
