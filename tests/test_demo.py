"""``make demo``: its sheet, its last lines, and the commands that it prints."""

import runpy
import shlex
from pathlib import Path

import pytest
from PIL import Image

import demo
from benchmarks.forked import run

FOX = demo.FOX.resolve()


def test_the_images_of_the_fox_are_those_that_the_example_makes(tmp_path):
    runpy.run_path(str(Path(demo.__file__).parent / "examples" / "make_fox.py"))["main"](tmp_path)
    made = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.*"))
    assert len(made) == 10
    for name in made:
        if name.suffix == ".png":
            assert Image.open(tmp_path / name).tobytes() == Image.open(FOX / name).tobytes()
        else:
            assert (tmp_path / name).read_text() == (FOX / name).read_text()


@pytest.mark.slow
def test_the_demo_makes_a_sheet_and_prints_commands_that_work(monkeypatch, capsys, tmp_path):
    def forked(script, *arguments):
        *settings, name = arguments
        settings += ["steps=2"] if script == "predict.py" else ["++steps=2"]
        run(script.removesuffix(".py"), *settings, f"output_dir={demo.OUTPUT / name}", log=tmp_path / "log")

    monkeypatch.setattr(demo, "command", forked)  # the same commands, without the seconds that a start takes
    monkeypatch.setattr(demo, "OUTPUT", tmp_path / "demo")
    monkeypatch.setattr(demo, "STEPS", 2)
    monkeypatch.setattr(demo, "SEEDS", 1)
    demo.main()
    sheet = Image.open(tmp_path / "demo" / "grid.png")
    assert sheet.width == 6 * 136 + 8 and len(sheet.convert("RGB").getcolors(1000)) > 100

    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[0].startswith(f"Made {tmp_path / 'demo' / 'grid.png'}: ")
    assert lines[1].startswith("On backgrounds that were not among the six, val/loss fell from ")
    printed = [shlex.split(line) for line in lines[3:]]
    assert [words[1] for words in printed] == ["predict.py", "predict.py", "train.py"]
    short = {"predict.py": ["steps=1"], "train.py": ["trainer.max_steps=1", "validate_first=false", "++steps=1"]}
    for number, (_, script, *settings) in enumerate(printed):
        settings += [*short[script], f"output_dir={tmp_path / str(number)}"]
        run(script.removesuffix(".py"), *settings, log=tmp_path / "log")
    assert (tmp_path / "1" / "index.html").is_file() and (tmp_path / "2" / "export").is_dir()
