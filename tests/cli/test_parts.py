"""Predictions in parts, and their merge."""

import json
import shutil
import sys
from contextlib import redirect_stdout
from io import StringIO

import numpy as np
import pytest
from PIL import Image

from benchmarks.forked import run_ranks
from sdmodule.cli.main import predict_main
from sdmodule.cli.merge import merge_main
from tests.cli.test_commands import records, told
from tests.cli.test_png_metadata import made, same_images

pytestmark = pytest.mark.slow  # samples, though few steps

PROMPTS = json.dumps([f"image {k}" for k in range(10)])


def listing(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def plain(folder):
    """The records without what no two runs share."""
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records(folder)]


@pytest.fixture(scope="module")
def command(checkpoint):
    return [f"prompt={PROMPTS}", "batch_size=2", "steps=1", "seed=7", f"pretrained={checkpoint}", "progress=false"]


@pytest.fixture(scope="module")
def sampled(command, tmp_path_factory):
    """A run in one process, the same in three parts, and what these said."""
    folder, said = tmp_path_factory.mktemp("sampled"), []
    with pytest.MonkeyPatch.context() as patch:
        for place in (["whole"], *(["run", f"shard={k}/3"] for k in (1, 2, 3))):
            patch.setattr(sys, "argv", ["command", *command, f"output_dir={folder / place[0]}", *place[1:]])
            with redirect_stdout(StringIO()) as printed:
                predict_main()
            said.append(printed.getvalue())
    (folder / "said.json").write_text(json.dumps(said))
    return folder


@pytest.fixture
def whole(sampled):
    return sampled / "whole"


@pytest.fixture
def parts(sampled, tmp_path):
    """The folders of the three parts: of 2, 4 and 4 images."""
    shutil.copytree(sampled / "run", tmp_path / "run")
    return [tmp_path / "run" / f"part-{k}-of-3" for k in (1, 2, 3)]


def test_a_part_says_what_it_samples(sampled):
    said = json.loads((sampled / "said.json").read_text())[1:]
    assert [lines.splitlines()[1] for lines in said] == [
        "Part 1 of 3: images 0 to 1 of 10, numbered from 0",
        "Part 2 of 3: images 2 to 5 of 10, numbered from 0",
        "Part 3 of 3: images 6 to 9 of 10, numbered from 0",
    ]
    assert [lines.splitlines()[2].split(",")[0] for lines in said] == [f"Sampled {count} images" for count in (2, 4, 4)]


def test_merged_parts_are_the_run_of_one_process(call, whole, parts, tmp_path):
    out = tmp_path / "run"
    status, printed, _ = call(merge_main, *parts, f"output_dir={out}")
    assert (status, printed) == (
        0,
        f"Merged 3 parts: 10 images\nWrote {out / 'grid.png'} and {out / 'index.html'}\n",
    )
    for part in parts:
        shutil.rmtree(part)
    assert listing(out) == listing(whole) and plain(out) == plain(whole) and same_images(made(out), made(whole))
    assert np.array_equal(np.asarray(Image.open(out / "grid.png")), np.asarray(Image.open(whole / "grid.png")))
    ours, theirs = (json.loads((folder / "timings.json").read_text()) for folder in (out, whole))
    assert ours.keys() == theirs.keys() and ours["images"] == 10 and ours["seconds"].keys() == theirs["seconds"].keys()
    settings = [(folder / "config.yaml").read_text() for folder in (out, whole)]
    assert settings[0].replace(str(out), "OUT") == settings[1].replace(str(whole), "OUT")
    assert '"title": "run"' in (out / "index.html").read_text()


def test_images_that_are_missing_are_named_and_made_by_the_part_that_lacks_them(call, command, whole, parts, tmp_path):
    out = tmp_path / "merged"
    (parts[1] / "images" / "00003-10.png").unlink()
    cut = parts[1] / "images" / "00005-12.png"
    cut.write_bytes(cut.read_bytes()[:-40])
    with (parts[1] / "predictions.jsonl").open("a") as lines:
        lines.write('{"file": "images/000')
    kept = parts[1] / "images" / "00002-9.png"
    date = kept.stat().st_mtime_ns
    told(
        call(merge_main, *parts[:2], f"output_dir={out}"),
        "lacks 6 of 10 images: 3 of shard=2/3, 5 of shard=2/3, 6 to 9 of shard=3/3; sample them with resume=true",
    )
    assert not out.exists()
    again = call(predict_main, *command, f"output_dir={tmp_path / 'run'}", "shard=2/3", "resume=true")
    assert again[0] == 0 and "Resuming: 2 of 4 images are there" in again[1] and kept.stat().st_mtime_ns == date
    assert call(merge_main, *reversed(parts), f"output_dir={out}")[0] == 0
    assert same_images(made(out), made(whole)) and plain(out) == plain(whole)
    before = (out / "images" / "00000-7.png").stat()
    assert before.st_ino == (parts[0] / "images" / "00000-7.png").stat().st_ino
    assert call(merge_main, *parts, f"output_dir={out}")[1] == f"{out} holds the 10 images of this run already\n"
    assert (out / "images" / "00000-7.png").stat() == before and listing(out) == listing(whole)


def test_a_part_on_two_devices_is_resumed_by_both(call, command, whole, parts, tmp_path):
    (parts[1] / "images" / "00004-11.png").write_bytes(b"no image")
    (parts[1] / "predictions.1.jsonl").write_text((parts[1] / "predictions.jsonl").read_text().splitlines()[1] + "\n")
    (parts[1] / "predictions.jsonl").write_text("")  # a kill between an image and its record
    here = [f"output_dir={tmp_path / 'run'}", "shard=2/3", "resume=true"]
    said = run_ranks("predict", *command, *here, log=tmp_path / "log")
    assert "Resuming: 3 of 4 images are there" in said
    assert not (parts[1] / "predictions.1.jsonl").exists() and len(records(parts[1])) == 4
    assert call(merge_main, *parts, f"output_dir={tmp_path / 'merged'}")[0] == 0
    assert same_images(made(tmp_path / "merged"), made(whole)) and plain(tmp_path / "merged") == plain(whole)


@pytest.mark.parametrize(
    ("shard", "words"),
    [
        ("0/3", ["shard=0/3", "such as 3/100"]),
        ("4/3", ["shard=4/3", "counted from 1"]),
        ("half", ["shard=half"]),
        ("1/6", ["shard=1/6", "10 images with batch_size=2", "at most 5 parts"]),
    ],
)
def test_a_part_that_there_is_not_is_refused(call, command, tmp_path, shard, words):
    told(call(predict_main, *command, f"output_dir={tmp_path / 'out'}", f"shard={shard}"), *words)
    assert not (tmp_path / "out").exists()


def test_parts_that_do_not_belong_together_are_refused(call, command, parts, tmp_path):
    out = f"output_dir={tmp_path / 'out'}"
    others = [("steps=2", "steps=2 instead of 1"), ("seed=8", "other prompts, seeds or input images")]
    for change, difference in others:
        folder = tmp_path / change
        assert call(predict_main, *command, change, f"output_dir={folder}", "shard=2/3")[0] == 0
        told(call(merge_main, parts[0], folder / "part-2-of-3", out), "of another run than", difference)
    copy = shutil.copytree(parts[0], tmp_path / "copy")
    told(call(merge_main, parts[0], copy, out), str(copy), "shard=1/3", "give one of them")
    told(call(merge_main, tmp_path / "run", out), "no part of a run", "shard=…")
    told(call(merge_main, *parts), "output_dir: missing")
    told(call(merge_main, out), "the folders of the parts: missing")
    told(call(merge_main, *parts, "steps=3", out), "steps=3: merge takes")
    told(call(merge_main, *parts, "--force", out), "--force: there is no such option")
    told(call(merge_main, *parts, f"output_dir={parts[0]}"), "is itself a part")
    assert not (tmp_path / "out").exists()


def test_a_merge_that_was_killed_at_any_point_is_continued(call, whole, parts, tmp_path, monkeypatch):
    """Cut off after each of its writes; images of another run in the folder are moved aside once."""
    from sdmodule.io import merge_parts

    out = tmp_path / "out"
    steps = ("_link", "write_grid", "write_page", "set_aside_images", "_move")
    shutil.copytree(whole, out)
    (out / "images" / "00000-7.png").rename(out / "images" / "00099-7.png")
    for name in steps:
        original, calls = getattr(merge_parts, name), []

        def stops(*arguments, original=original, calls=calls):
            calls.append(arguments)
            if len(calls) == 3 or original.__name__ not in ("_link", "_move"):
                raise KeyboardInterrupt
            return original(*arguments)

        monkeypatch.setattr(merge_parts, name, stops)
        assert call(merge_main, *parts, f"output_dir={out}")[0] == 130
        monkeypatch.setattr(merge_parts, name, original)
    assert call(merge_main, *parts, f"output_dir={out}")[0] == 0
    aside = {"images-1", "predictions-1.jsonl"}
    assert aside <= {path.name for path in out.iterdir()}
    assert [name for name in listing(out) if name.split("/")[0] not in aside] == listing(whole)
    assert plain(out) == plain(whole) and same_images(made(out), made(whole))
