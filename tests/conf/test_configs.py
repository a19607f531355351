"""Every configuration that ships composes and builds what it names."""

from importlib.util import find_spec
from pathlib import Path

import diffusers
import pytest
import torch
from hydra import compose, initialize_config_dir, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from hydra.errors import MissingConfigException
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from omegaconf import OmegaConf
from PIL import Image
from sdmodule.conf import SAMPLERS

from sdmodule import StableDiffusionModule
from sdmodule.callbacks.latent_cache import LatentCache
from sdmodule.cli.config_keys import side_effects
from sdmodule.cli.instantiate import build_trainer, instantiate
from sdmodule.components.schedulers import SHORT_NAMES
from sdmodule.components.source import ASSETS
from sdmodule.errors import SettingsError
from sdmodule.tome.token_merging import TokenMerging

CONF = Path(__file__).parents[2] / "conf"
HAS_GPU = torch.cuda.is_available()
HAS_WEIGHTS = any((ASSETS / "tiny" / "unet").glob("*.safetensors"))
COMMANDS = {"train": ["data.root=photos", "resolution=64"], "predict": ["prompt=a cat"]}
EXPERIMENTS = {
    "controlnet": ["train"],
    "demo": ["train"],
    "dreambooth": ["train"],
    "dreambooth_lora": ["train"],
    "full": ["train"],
    "inpaint": ["train"],
    "lora": ["train"],
    "sd15": ["train", "predict"],
    "sd15_inpaint": ["train", "predict"],
    "sd15_tomesd": ["train", "predict"],
    "sdxl_dreambooth_lora": ["train"],
    "sdxl_full": ["train"],
    "sdxl_lora": ["train"],
    "textual_inversion": ["train"],
    "tiny_autoencoder": ["train"],
    "tiny_clip": ["train"],
    "tiny_inpaint": ["train"],
    "tiny_text2image": ["train"],
}


def options(group):
    return sorted([*(path.stem for path in (CONF / group).glob("*.yaml")), *(SAMPLERS if group == "sampler" else ())])


def configuration(command, *overrides, given=None, tmp_path="."):
    given = COMMANDS[command] if given is None else given
    with initialize_config_module("sdmodule.conf", version_base="1.3"):
        return compose(command, [*given, f"output_dir={tmp_path}/out", *overrides])


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_builds_with_its_defaults(command, checkpoint, tmp_path):
    cfg = configuration(command, f"pretrained={checkpoint}", tmp_path=tmp_path)
    assert isinstance(instantiate(cfg.data), LightningDataModule)
    assert isinstance(instantiate(cfg.model), StableDiffusionModule)
    assert isinstance(build_trainer(cfg), Trainer)
    assert not (tmp_path / "out").exists()  # building writes nothing


@pytest.mark.parametrize("command", COMMANDS)
def test_a_configuration_lists_what_people_set_before_what_is_built(command):
    """``--cfg job`` prints keys in this order, and every file says what it is for."""
    groups = ["model", "data", "cache", "objective", "training", "tuning"]
    groups += ["tome", "sampler", "trainer", "logger", "callbacks"]
    keys = list(configuration(command))
    if command == "predict":
        groups = ["model", "data", *groups[6:], "speed"]
        assert keys[:4] == ["prompt", "prompts", "negative_prompt", "image"]
    else:
        assert keys[0] == "pretrained"
    assert keys[-len(groups) :] == groups
    for path in CONF.rglob("*.yaml"):
        lines = path.read_text().splitlines()
        assert len(lines) <= 60, f"{path} is long"
        assert lines[0].startswith("#"), f"{path} does not say what it is for"


@pytest.mark.parametrize("name", options("model"))
def test_models(name, checkpoint, clip_folder):
    cfg = configuration("train", f"model={name}", f"pretrained={clip_folder if name == 'contrastive' else checkpoint}")
    assert isinstance(instantiate(cfg.model), LightningModule)


@pytest.mark.parametrize("name", options("objective"))
def test_objectives(name, checkpoint):
    module = instantiate(configuration("train", f"objective={name}", f"pretrained={checkpoint}").model)
    assert module.objective.weighting == ("min_snr" if name == "min_snr" else "none")
    assert module.objective.zero_terminal_snr == (name == "zero_snr")


@pytest.mark.parametrize("name", options("tuning"))
def test_tunings(name, checkpoint):
    words = ["tuning.placeholder='<cat>'", "tuning.initializer=star"] if name == "textual_inversion" else []
    cfg = configuration("train", f"tuning={name}", f"pretrained={checkpoint}", *words)
    assert instantiate(cfg.data) and instantiate(cfg.model).tuning.kind == name


@pytest.mark.parametrize(
    ("overrides", "effects"),
    [
        (["tuning=full"], ""),
        (["tuning=lora"], "tuning=lora sets model.optimizer.lr=0.0001"),
        (["tuning=lora", "model.optimizer.lr=0.1"], ""),
        (["experiment=lora", "model.optimizer.lr=0.0001"], "tuning=lora sets model.optimizer.lr=0.0001"),
    ],
)
def test_a_tuning_method_says_what_it_sets_in_other_groups(monkeypatch, overrides, effects):
    with initialize_config_module("sdmodule.conf", version_base="1.3"):
        cfg = compose("train", overrides, return_hydra_config=True)
    monkeypatch.setattr(HydraConfig, "get", lambda: cfg.hydra)
    assert side_effects(cfg, "tuning") == effects


@pytest.mark.parametrize("name", options("data"))
def test_data(name, tmp_path):
    (tmp_path / "noto").mkdir()
    for thing in ("fox", "owl"):
        Image.new("RGBA", (8, 8), "red").save(tmp_path / "noto" / f"{thing}.png")
    command = "predict" if name == "prompts" else "train"
    given = {
        "emoji_scenes": [f"data.sprites={tmp_path}"],
        "shapes": [],
        "mixed": ["data.sources=[{root: photos}, {shards: a.tar, weight: 2}, {name: owner/name, split: test}]"],
        "dreambooth": ["data.root=photos", "data.prompt=a photo of sks dog", "data.class_prompt=a photo of a dog"],
        "huggingface": ["data.name=owner/name"],
        "streaming": ["data.url=s3://bucket/set"],
        "webdataset": ["data.shards='shards/{000..009}.tar'"],
    }.get(name, COMMANDS[command])
    cfg = configuration(command, f"data={name}", given=[*given, *(["resolution=64"] if command == "train" else [])])
    assert isinstance(instantiate(cfg.data), LightningDataModule)


@pytest.mark.parametrize("name", options("sampler"))
@pytest.mark.parametrize("command", COMMANDS)
def test_samplers(command, name, checkpoint):
    cfg = configuration(command, f"sampler={name}", f"pretrained={checkpoint}")
    assert instantiate(cfg.model).sampling.steps == 50


@pytest.mark.parametrize(("name", "ratio"), [("exact", 0.5), ("none", 0.0), ("tomesd", 0.5), ("window", 0.5)])
def test_token_merging(name, ratio, checkpoint):
    assert name in options("tome")
    cfg = configuration("predict", f"tome={name}", f"pretrained={checkpoint}")
    merging = instantiate(cfg.model).sampling.merging
    assert (merging.ratio, merging.engine) == (ratio, "exact" if name == "none" else name)


@pytest.mark.parametrize("name", options("speed"))
def test_speed(name, checkpoint):
    assert options("speed") == ["exact", "fast", "rounding", "turbo"]
    cfg = configuration("predict", f"speed={name}", f"pretrained={checkpoint}")
    sampling = instantiate(cfg.model).sampling
    assert (sampling.speed.channels_last == "auto") == bool(sampling.speed.effect) == (name != "exact")
    assert (sampling.speed.kernels == "fastest") == (name != "exact")
    assert (sampling.speed.cache_every > 1) == (sampling.speed.guidance_interval != (0.0, 1.0)) == (name == "turbo")
    lossy = name in ("fast", "turbo")
    assert (sampling.steps < 50) == (sampling.scheduler == "dpmpp_2m") == bool(sampling.merging.ratio) == lossy
    assert str(build_trainer(cfg).precision) in ("32-true",) if name == "exact" else ("32-true", "bf16-true", "16-true")


def test_settings_given_beside_a_preset_win(checkpoint):
    given = ["experiment=sd15", "speed=turbo", "steps=9", "sampler=euler", "tome=none", "speed.cache_every=1"]
    sampling = instantiate(configuration("predict", *given, f"pretrained={checkpoint}").model).sampling
    assert (sampling.steps, sampling.scheduler, sampling.merging.ratio) == (9, "euler", 0.0)
    assert sampling.speed.cache_every == 1 and sampling.speed.guidance_interval != (0.0, 1.0)
    preset = instantiate(configuration("predict", *given[:2], f"pretrained={checkpoint}").model).sampling
    assert preset.steps < 50 and preset.scheduler == "dpmpp_2m"


@pytest.mark.parametrize("command", COMMANDS)
def test_tomesd_cfg_is_token_merging_by_another_name(command, checkpoint):
    def merging(*overrides):
        return instantiate(configuration(command, f"pretrained={checkpoint}", *overrides).model).sampling.merging

    assert merging("tomesd_cfg={ratio: 0.5, merge_mlp: true}") == TokenMerging(ratio=0.5, merge_mlp=True)
    assert merging("tomesd_cfg=null").ratio == merging("tomesd_cfg={ratio: 0}").ratio == 0
    with pytest.raises(SettingsError, match="give one of them"):
        merging("tomesd_cfg={ratio: 0.5}", "tome.ratio=0.5")


def test_every_short_name_of_a_scheduler_is_a_sampler():
    assert set(SHORT_NAMES) == set(SAMPLERS)


@pytest.mark.parametrize("name", options("trainer"))
@pytest.mark.parametrize("command", COMMANDS)
def test_trainers(command, name):
    cfg = configuration(command, f"trainer={name}", "logger=none")
    if name in ("auto", "cpu") or HAS_GPU:
        assert isinstance(build_trainer(cfg), Trainer)
    else:
        with pytest.raises(SettingsError, match="trainer=cpu"):
            build_trainer(cfg)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_gpu_is_used_where_there_is_one(command):
    trainer = build_trainer(configuration(command))
    assert trainer.strategy.root_device.type == ("cuda" if HAS_GPU else "cpu")


@pytest.mark.parametrize(
    "group", sorted({folder.name for folder in CONF.glob("*/")} - {"experiment", "hydra", "shared", "speed"})
)
def test_a_group_composes_alone(group, tmp_path):
    """As in the application of someone else, which has nothing but this group; presets of speed set other groups."""
    for name in options(group):
        app = tmp_path / f"{name}.yaml"
        app.write_text(f"defaults:\n  - {group}@mine: {name}\nhydra:\n  searchpath: [pkg://sdmodule.conf]\n")
        with initialize_config_dir(str(tmp_path), version_base="1.3"):
            mine = compose(name)
        for key in OmegaConf.missing_keys(mine):  # what must be given, such as a folder of images
            OmegaConf.update(mine, key, "given")
        assert "mine" in OmegaConf.to_container(mine, resolve=True)


@pytest.mark.parametrize("name", options("logger"))
@pytest.mark.parametrize("command", COMMANDS)
def test_loggers(command, name, tmp_path):
    if name == "mlflow" and find_spec("mlflow") is None:
        with pytest.raises(SettingsError, match="logger=mlflow needs the package mlflow"):
            instantiate(configuration(command, "logger=mlflow").logger)
        return
    loggers = instantiate(configuration(command, f"logger={name}", tmp_path=tmp_path).logger)
    assert list(loggers) == ([] if name == "none" else [name])
    assert all(isinstance(logger, Logger) for logger in loggers.values())


@pytest.mark.parametrize("command", COMMANDS)
def test_several_loggers(command, tmp_path):
    cfg = configuration(command, "logger=[csv,tensorboard]", tmp_path=tmp_path)
    assert list(instantiate(cfg.logger)) == ["csv", "tensorboard"]
    assert list(configuration("train").logger) == ["csv"]


@pytest.mark.parametrize("name", options("callbacks"))
def test_callbacks(name):
    command = "predict" if name in {"predictions", "timing", "images", "page"} else "train"
    callbacks = instantiate(configuration(command, f"callbacks=[{name}]").callbacks)
    assert callbacks and all(isinstance(callback, Callback) for callback in callbacks.values())


@pytest.mark.parametrize(("name", "what"), [("none", None), ("latents", "latents"), ("all", "all")])
def test_caches(name, what):
    assert options("cache") == ["all", "latents", "none"]
    caches = [c for c in build_trainer(configuration("train", f"cache={name}")).callbacks if isinstance(c, LatentCache)]
    assert [cache.what for cache in caches] == ([what] if what else [])


def test_every_experiment_is_tested():
    assert set(options("experiment")) == set(EXPERIMENTS)


@pytest.mark.parametrize(("command", "name"), [(c, name) for name, commands in EXPERIMENTS.items() for c in commands])
def test_experiments(command, name, checkpoint, clip_folder, sprites, tmp_path):
    """Everything builds, with a checkpoint on disk in place of the published one."""
    if name == "tiny_clip":
        checkpoint = clip_folder
    given = [] if name.startswith("tiny_") else COMMANDS[command]  # these draw their own data
    if (command, name) == ("predict", "sd15_inpaint"):
        Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")
        given = [*given, f"image={tmp_path / 'photo.png'}", "mask=[0,0,4,4]"]
    if name == "tiny_clip":
        given = [*given, f"data.sprites={sprites}"]
    cfg = configuration(command, f"experiment={name}", f"pretrained={checkpoint}", given=given, tmp_path=tmp_path)
    assert isinstance(instantiate(cfg.data), LightningDataModule)
    assert isinstance(build_trainer(cfg), Trainer)
    module = instantiate(cfg.model)
    if command == "train":
        assert module.configure_optimizers()


@pytest.mark.parametrize("name", ["controlnet", "full", "inpaint", "lora"])
@pytest.mark.parametrize(
    "data",
    [
        ["data=huggingface", "data.name=owner/name"],
        ["data=webdataset", "data.shards=a.tar"],
        ["data=mixed", "data.sources=[{root: photos}, {shards: a.tar}]"],
    ],
)
def test_an_experiment_takes_any_data(name, data):
    """It keeps its settings for data, and drops its default images."""
    built = instantiate(configuration("train", f"experiment={name}", *data, given=["resolution=64"]).data)
    assert isinstance(built, LightningDataModule) and "emoji" not in str(built.sources)
    assert built.random_flip == (name in ("full", "inpaint"))


def test_experiments_default_to_the_emoji_and_take_a_folder():
    def root(*given: str) -> str:
        data = instantiate(configuration("train", "experiment=lora", *given, given=["resolution=64"]).data)
        return Path(data.sources[0].source.root).name

    assert [root(), root("data.root=mine")] == ["emoji", "mine"]


@pytest.mark.parametrize("command", EXPERIMENTS["sd15"])
def test_sd15_is_the_published_recipe(command, checkpoint):
    cfg = configuration(command, "experiment=sd15")
    assert cfg.pretrained == cfg.model.pretrained == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert (cfg.sampler.steps, cfg.sampler.guidance_scale) == (50, 7.5)

    from sdmodule.sampling.schedule import sampling_schedule

    module = instantiate(configuration(command, "experiment=sd15", f"pretrained={checkpoint}").model)
    scheduler = sampling_schedule(module.parts, module.sampling).scheduler
    assert type(scheduler) is diffusers.DDIMScheduler
    wanted = {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "clip_sample": False,
        "set_alpha_to_one": False,
    }
    assert {key: scheduler.config[key] for key in wanted} == wanted


@pytest.mark.parametrize("command", ["train", "predict"])
def test_experiments_that_build_on_sd15(command):
    assert configuration(command, "model=inpaint").pretrained == "tiny-inpaint"
    assert configuration(command, "model=inpaint", "pretrained=disk").pretrained == "disk"
    inpaint = configuration(command, "experiment=sd15_inpaint")
    assert inpaint.pretrained == "stable-diffusion-v1-5/stable-diffusion-inpainting"
    merged = configuration(command, "experiment=sd15_tomesd")
    assert (merged.pretrained, merged.tome.ratio) == ("stable-diffusion-v1-5/stable-diffusion-v1-5", 0.5)
    plain = configuration(command, "experiment=sd15")
    assert inpaint.sampler == merged.sampler == plain.sampler
    assert configuration(command, "experiment=sd15_inpaint", "pretrained=disk").pretrained == "disk"


def test_the_command_line_wins_over_sd15(checkpoint):
    overrides = ["experiment=sd15", "steps=3", "sampler=euler", f"pretrained={checkpoint}"]
    sampling = instantiate(configuration("predict", *overrides).model).sampling
    assert (sampling.steps, sampling.scheduler) == (3, "euler")


@pytest.mark.skipif(not HAS_WEIGHTS, reason="the embedded model has no weights yet")
def test_the_embedded_model_is_the_default():
    model = instantiate(configuration("predict").model)
    assert model.parts.source == "tiny"


def test_a_configuration_survives_yaml():
    cfg = configuration("predict")
    again = OmegaConf.create(OmegaConf.to_yaml(cfg))
    assert OmegaConf.to_container(again, resolve=True) == OmegaConf.to_container(cfg, resolve=True)


def test_another_project_uses_the_groups(tmp_path):
    (tmp_path / "app.yaml").write_text(
        "hydra:\n  searchpath: [pkg://sdmodule.conf]\ndefaults: [sampler: euler, _self_]\n"
    )
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        assert compose("app").sampler.scheduler == "euler"
        assert compose("app", ["sampler=unipc"]).sampler.scheduler == "unipc"
        with pytest.raises(MissingConfigException, match="checkpoint\n\tddim\n"):
            compose("app", ["sampler=foo"])
