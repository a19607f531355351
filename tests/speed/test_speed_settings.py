"""Wrong speed settings end in one sentence, in Python and on the command line."""

from __future__ import annotations

import pytest

from sdmodule.cli.main import predict_main
from sdmodule.errors import SettingsError, build_settings
from sdmodule.speed.speed_settings import EXACT, SpeedSettings
from tests.cli.test_commands import told

WRONG = {
    "guidance_interval": ([0.8, 0.2], [0.5, 0.5], [-0.1, 1], [0, 1.5], [0.5], "all", [0, True]),
    "cache_every": (0, -1, 1.5, True, "often"),
    "cache_layers": (0, None),
    "channels_last": (1, "yes", None),
    "kernels": ("slowest", True),
    "keep_memory": ("no",),
    "decode": ("half",),
    "compile": ("all", True),
    "attention": ("fast", None),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_an_error_names_the_value_and_what_is_allowed(name, value):
    with pytest.raises(SettingsError) as error:
        SpeedSettings(**{name: value})
    message = str(error.value)
    assert message.startswith(f"speed.{name}={value}: ") and ("must be" in message or "choose one of" in message)


def test_no_settings_are_the_defaults():
    assert build_settings(SpeedSettings, "speed", None) == build_settings(SpeedSettings, "speed", {}) == EXACT
    assert EXACT.metadata() == {}
    with pytest.raises(SettingsError, match=r"cache_evry.*cache_every"):
        build_settings(SpeedSettings, "speed", {"cache_evry": 2})
    with pytest.raises(SettingsError, match="speed='turbo'"):
        build_settings(SpeedSettings, "speed", "turbo")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("speed.guidance_interval=[1,0]", ["speed.guidance_interval=[1, 0]", "[0.2,0.8]"]),
        ("speed.cache_layers=9 speed.cache_every=2", ["speed.cache_layers=9", "1 to 2"]),
        ("speed.attention=xformers", ["xformers"]),
        ("speed.attention=cudnn", ["CUDA"]),
        ("speed=warp", ["warp"]),
    ],
)
def test_a_wrong_setting_ends_the_command_with_one_sentence(call, checkpoint, tmp_path, setting, words):
    common = ["prompt=a cat", "steps=1", f"pretrained={checkpoint}", f"output_dir={tmp_path / 'out'}"]
    told(call(predict_main, *common, *setting.split()), *words)
    assert not (tmp_path / "out" / "grid.png").exists()
