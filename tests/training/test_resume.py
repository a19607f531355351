"""Finding the checkpoint to resume from."""

from pathlib import Path

import pytest
import torch

from sdmodule.errors import SettingsError
from sdmodule.training.resume import find_checkpoint


@pytest.fixture(scope="session")
def checkpoint(small_checkpoint):
    return small_checkpoint


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Folder of a run with two checkpoints."""
    (tmp_path / "checkpoints").mkdir()
    for step in (10, 20):
        content = {"global_step": step, "state_dict": {"weights": torch.ones(1000)}, "loops": {}, "callbacks": {}}
        torch.save(content | {"optimizer_states": []}, tmp_path / f"checkpoints/step={step}.ckpt")
    return tmp_path


def test_last_is_the_newest_checkpoint(run: Path) -> None:
    assert find_checkpoint("last", run, 100) == str(run / "checkpoints/step=20.ckpt")
    assert find_checkpoint(None, run, 100) is None


@pytest.mark.parametrize("how", ["truncated", "empty", "flipped"])
def test_last_skips_a_corrupt_checkpoint_with_a_warning(run: Path, how: str) -> None:
    broken = run / "checkpoints/step=20.ckpt"
    content = bytearray(broken.read_bytes())
    content[len(content) // 2] ^= 0xFF
    broken.write_bytes({"truncated": content[:-100], "empty": b"", "flipped": content}[how])
    with pytest.warns(UserWarning, match="step=20.ckpt is corrupt"):
        assert find_checkpoint("last", run, 100) == str(run / "checkpoints/step=10.ckpt")


def test_last_without_a_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"no intact checkpoint in .*output_dir"):
        find_checkpoint("last", tmp_path, 100)


@pytest.mark.parametrize(
    ("path", "steps", "message"),
    [
        ("none.ckpt", 100, "none.ckpt: not found"),
        ("broken.ckpt", 100, "is corrupt or not a training checkpoint"),
        ("checkpoints/step=20.ckpt", 20, "is at step 20 of trainer.max_steps=20"),
    ],
)
def test_a_checkpoint_that_cannot_be_resumed_from_is_named_in_the_error(
    run: Path, path: str, steps: int, message: str
) -> None:
    (run / "broken.ckpt").write_bytes(b"nothing")
    with pytest.raises(SettingsError, match=message):
        find_checkpoint(str(run / path), run, steps)
