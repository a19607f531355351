"""The wheel has everything that the two commands need, and they run from any folder."""

import json
import os
import shlex
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LETTERS = "50% off = {fun}, ünïcode 'it\\'s' \"q\" \\ ${x} $5 [a] ??? 🦊\n #x: \\"
"""What a shell, Python and Hydra would each like to read in a way of its own."""

pytestmark = pytest.mark.slow


def run(*command, cwd):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a copy, since a build leaves folders behind
    files = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines()
    for name in files:
        if (ROOT / name).is_file() and not name.startswith(("tests/", "benchmarks/")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    run(*pip, "--wheel-dir", folder, source, cwd=folder)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The folder of programs of a fresh environment with the wheel; the dependencies are those of the running one."""
    environment = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=environment)
    [packages] = environment.glob("lib/python*/site-packages")
    # a plain path, so that .pth files in the other folder, and its editable installs, are ignored
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = environment / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=environment)
    return python.parent


def test_the_wheel_holds_configurations_and_assets(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    listed = run(
        "git", "ls-files", "--cached", "--others", "--exclude-standard", "conf", "sdmodule", cwd=ROOT
    ).splitlines()
    wanted = {
        name if name.startswith("sdmodule/") else f"sdmodule/{name}" for name in listed if (ROOT / name).is_file()
    }
    assert sorted(wanted - names) == []
    assert {name.split("/")[0] for name in names} == {
        "sdmodule",
        next(n for n in names if "dist-info" in n).split("/")[0],
    }


def test_the_commands_run_from_another_folder_and_the_printed_one_in_a_shell(installed, tmp_path):
    place = run(installed / "python", "-c", "import sdmodule; print(sdmodule.__file__)", cwd=tmp_path).strip()
    assert Path(place).is_relative_to(installed.parent)
    about = run(installed / "sdmodule", cwd=tmp_path)
    assert "tiny, tiny-inpaint" in about and "sdmodule-predict prompt=" in about
    assert "sampler=ddim" in run(installed / "sdmodule-predict", "--help", cwd=tmp_path)
    short = ["trainer.max_steps=1", "++steps=2"]
    trained = run(installed / "sdmodule-train", "experiment=demo", "output_dir=my run", *short, cwd=tmp_path)
    assert "Trained 1 step in " in trained
    printed = trained.splitlines()[-1].removeprefix("Sample with it: ")
    assert printed.startswith(f"{installed}/sdmodule-predict 'pretrained=my run/export' 'prompt=")
    run("sh", "-c", f"{printed} steps=2 {shlex.quote(f'negative_prompt={LETTERS}')}", cwd=tmp_path)
    [records] = tmp_path.glob("outputs/predict/*/*/predictions.jsonl")
    record = json.loads(records.read_text(encoding="utf-8"))
    assert (record["model"], record["negative_prompt"]) == ("my run/export", LETTERS)
    assert (records.parent / "grid.png").is_file() and sorted(os.listdir(tmp_path)) == ["my run", "outputs"]
