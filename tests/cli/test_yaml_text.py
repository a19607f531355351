"""Settings are written as OmegaConf writes them."""

import pytest
from omegaconf import OmegaConf

from sdmodule.cli.yaml_text import is_plain, to_yaml

SHARED = {"a": 1}
SETTINGS = {
    "words": ["", " ", "yes", "no", "null", "~", "12", "1e3", "1_000", ".inf", "nan", "12:30:45", "2026-11-30", "0x1f"],
    "text": [
        "a: b",
        "- a",
        "# a",
        "'a'",
        '"a"',
        "a\nb",
        "a\n",
        "\ta",
        "ä 🦊 \x07",
        "${a}",
        "???",
        "{a, b}",
        "x " * 100,
    ],
    "numbers": [0, -1, 1.0, 1e-8, 1e30, float("inf"), float("nan"), True, False, None],
    "empty": [{}, [], {"a": {}}, {"a": []}],
    "shared": [SHARED, SHARED],
}


def test_the_text_is_omegaconfs():
    assert is_plain(SETTINGS)
    assert to_yaml(SETTINGS) == OmegaConf.to_yaml(OmegaConf.create(SETTINGS))


@pytest.mark.parametrize("value", [(1, 2), {1: 2}, {"a": [b"bytes"]}, OmegaConf.create({}), type("Text", (str,), {})()])
def test_what_yaml_does_not_know_is_not_plain(value):
    assert not is_plain(value)
