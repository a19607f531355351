"""Which settings are hidden, and how the home folder is shortened."""

from pathlib import Path

import pytest

from sdmodule.components.checkpoint import load_components
from sdmodule.io.redact import HIDDEN, is_secret, redact, shorten_home


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "ann"))
    return tmp_path / "ann"


@pytest.mark.parametrize("name", ["api_key", "hubToken", "WANDB_API_KEY", "password", "client-secret", "a.token"])
def test_secret_names(name):
    assert is_secret(name)


@pytest.mark.parametrize("name", ["tokenizer", "monkey", "keyboard", "keep", "prompt", "tome", "secretary"])
def test_names_that_only_resemble_secrets(name):
    assert not is_secret(name)


def test_secrets_and_home_folders_are_removed_from_a_configuration(home):
    given = {
        "logger": {"wandb": {"api_key": "abc", "settings": {"token": ["x", "y"]}, "project": "p"}},
        "prompt": f"a letter from {home}/x",
        "components": {"tokenizer": f"{home}/weights", "vae": None},
        "overrides": [f"data.root={home}/photos", "+hub.api_key=abc", "steps=20"],
        "uri": "https://ann:abc@example.org/x",
        "url": ["https://example.org/{0..9}.tar?X-Amz-Signature=abc&part=1", "s3://bucket/set"],
        "use_key": True,
        "key": None,
    }
    assert redact(given) == {
        "logger": {"wandb": {"api_key": HIDDEN, "settings": {"token": [HIDDEN, HIDDEN]}, "project": "p"}},
        "prompt": f"a letter from {home}/x",  # a prompt is free text
        "components": {"tokenizer": "~/weights", "vae": None},
        "overrides": ["data.root=~/photos", f"+hub.api_key={HIDDEN}", "steps=20"],
        "uri": f"https://{HIDDEN}@example.org/x",
        "url": [f"https://example.org/{{0..9}}.tar?X-Amz-Signature={HIDDEN}&part=1", "s3://bucket/set"],
        "use_key": True,
        "key": None,
    }


def test_only_the_home_folder_is_shortened(home):
    assert shorten_home(f"{home}") == "~" and shorten_home(f"see {home}/a and {home}/b") == "see ~/a and ~/b"
    for path in (f"{home}bel/x", f"/other{home}/x", "relative/path", "owner/name"):
        assert shorten_home(path) == path


def test_shortened_paths_are_expanded_again(home, checkpoint):
    home.mkdir()
    (home / "weights").symlink_to(checkpoint)
    assert load_components("~/weights", components={"vae": "~/weights/vae"}).source == "~/weights"
    assert Path(shorten_home(str(home / "weights"))).expanduser() == home / "weights"
