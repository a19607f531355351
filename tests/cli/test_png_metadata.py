"""Resuming a run of predict, and making an image again from its PNG metadata."""

import json

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from benchmarks.forked import run, run_ranks
from sdmodule.cli.main import predict_main
from tests.cli.test_commands import records, told

pytestmark = pytest.mark.slow  # most tests sample twice


@pytest.fixture(scope="session")
def checkpoint(small_checkpoint):
    return small_checkpoint


PROMPTS = json.dumps(["a red circle on a blue background", "a small green star", "a (blue:1.2) heart, " * 30])


def pixels(path):
    return np.asarray(Image.open(path))


def made(folder):
    return {file.name: pixels(file) for file in (folder / "images").glob("*.png")}


def same_images(ours, others):
    return ours.keys() == others.keys() and all(np.array_equal(ours[name], others[name]) for name in ours)


def test_resuming_makes_only_missing_and_broken_images(call, checkpoint, tmp_path):
    common = [
        'prompt=["a","b","c"]',
        "batch_size=1",
        "steps=2",
        f"pretrained={checkpoint}",
        f"output_dir={tmp_path / 'out'}",
    ]
    assert call(predict_main, *common)[0] == 0
    before = made(tmp_path / "out")
    (tmp_path / "out" / "images" / "00001-1.png").write_bytes(b"no image")
    (tmp_path / "out" / "images" / "00002-2.png").unlink()
    with (tmp_path / "out" / "predictions.jsonl").open("a") as lines:
        lines.write('{"file": "images/000')  # half a line, as a full disk leaves it
    date = (tmp_path / "out" / "images" / "00000-0.png").stat().st_mtime_ns
    status, printed, _ = call(predict_main, *common, "resume=true")
    assert status == 0 and "1 of 3 images are there" in printed and same_images(made(tmp_path / "out"), before)
    assert (tmp_path / "out" / "images" / "00000-0.png").stat().st_mtime_ns == date  # not made twice
    assert [record["index"] for record in records(tmp_path / "out")] == [0, 1, 2]
    status, printed, _ = call(predict_main, *common, "resume=true")
    assert status == 0 and "3 of 3 images are there" in printed and len(records(tmp_path / "out")) == 3


@pytest.fixture(scope="module")
def finished_run(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    settings = ['prompt=["a","b"]', "steps=2", f"pretrained={checkpoint}", f"output_dir={folder / 'out'}"]
    run("predict", *settings, log=folder / "log")
    return folder / "out"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("steps=3", ["steps=2", "steps=3"]),
        ('prompt=["a","d"]', ["prompt='b'", "prompt='d'"]),
        ("seed=1", ["images/00000-0.png"]),
        ("prompt=a", ["images/00001-1.png"]),
        ("tome.ratio=0.5", ["tome=None", "ratio"]),
    ],
)
def test_a_run_with_other_settings_is_not_resumed(call, checkpoint, finished_run, change, words):
    out = finished_run
    common = [f"pretrained={checkpoint}", f"output_dir={out}"]
    before = (out / "config.yaml").read_text()
    given = [text for text in ('prompt=["a","b"]', "steps=2") if not change.startswith(text.partition("=")[0])]
    told(call(predict_main, *given, *common, change, "resume=true"), "resume=true", str(out), *words)
    assert (out / "config.yaml").read_text() == before


def test_two_processes_write_the_same_folder_as_one(checkpoint, tmp_path):
    common = [f"prompt={PROMPTS}", "num_images_per_prompt=3", "batch_size=2", "steps=2", f"pretrained={checkpoint}"]
    run("predict", *common, f"output_dir={tmp_path / 'one'}", log=tmp_path / "log")
    run_ranks("predict", *common, f"output_dir={tmp_path / 'two'}", log=tmp_path / "log")
    assert same_images(made(tmp_path / "two"), made(tmp_path / "one"))
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == sorted(
        path.name for path in (tmp_path / "one").iterdir()
    )
    assert [record["index"] for record in records(tmp_path / "two")] == list(range(9))


# ---------------------------------------------------------------------------------------------- from an image

KINDS = {
    "text-to-image": ["sampler=ddim_sd15", "guidance_scale=3", "negative_prompt=it's ${x}", "height=40", "seed=9"],
    "token merging": ["tome.ratio=0.5", "sampler=euler_a", "sampler.guidance_rescale=0.3"],
    "token merging in windows": ["tome=window", "tome.reuse_steps=2"],
    "token merging by tomesd": ["tome=tomesd"],
    "faster": ["speed=turbo", "speed.compile=none", "speed.guidance_interval=[0.1,0.8]"],
    "inpainting": ["model=inpaint", "mask=[4,4,20,30]", "only_masked=true", "padding=2", "mask_blur=1.5"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_made_again_to_the_pixel(call, checkpoint, tmp_path, kind):
    photo = tmp_path / "my photo, 1.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8)).save(photo)
    settings = [*KINDS[kind], f"prompt={PROMPTS}", "num_images_per_prompt=2", "steps=3", f"pretrained={checkpoint}"]
    settings += [f"image={photo}"] if kind == "inpainting" else []
    result = call(predict_main, *settings, f"output_dir={tmp_path / 'out'}")
    assert result[0] == 0, result
    photo.unlink()
    before = made(tmp_path / "out")
    assert len({array.tobytes() for array in before.values()}) == 6
    # of a full batch, or of the last and smaller one
    name, option = ("00003-", "from={}") if kind in ("faster", "inpainting") else ("00005-", "--from={}")
    [image] = (tmp_path / "out" / "images").glob(f"{name}*.png")
    status, _, complaint = call(predict_main, option.format(image), f"output_dir={tmp_path / 'once'}")
    assert (status, complaint) == (0, "")
    [again] = made(tmp_path / "once").values()
    assert np.array_equal(again, before[image.name])
    # and again from the copy
    [once] = (tmp_path / "once" / "images").iterdir()
    assert call(predict_main, f"from={once}", f"output_dir={tmp_path / 'twice'}")[0] == 0
    assert np.array_equal(next(iter(made(tmp_path / "twice").values())), before[image.name])


@pytest.fixture(scope="module")
def image(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("image")
    settings = ["prompt=a cat", "steps=2", "seed=3", f"pretrained={checkpoint}", f"output_dir={folder / 'first'}"]
    run("predict", *settings, log=folder / "log")
    return folder / "first" / "images" / "00000-3.png"


def test_settings_given_beside_an_image_win(call, image, tmp_path):
    changed = ["steps=1", "sampler=euler", 'prompt=["a dog","a cat"]', "num_images_per_prompt=2"]
    assert call(predict_main, f"from={image}", *changed, f"output_dir={tmp_path / 'out'}")[0] == 0
    found = [(r["prompt"], r["seed"], r["steps"], r["scheduler"]) for r in records(tmp_path / "out")]
    prompts = ["a dog", "a dog", "a cat", "a cat"]
    assert found == [(text, 3 + k, 1, "EulerDiscreteScheduler") for k, text in enumerate(prompts)]


def test_a_preset_beside_an_image_is_applied_completely(call, image, tmp_path):
    changed = ["speed=turbo", "speed.compile=none", "precision=32-true", "steps=3"]
    assert call(predict_main, f"from={image}", *changed, f"output_dir={tmp_path / 'out'}")[0] == 0
    [record] = records(tmp_path / "out")
    assert (record["seed"], record["steps"], record["scheduler"]) == (3, 3, "DPMSolverMultistepScheduler")
    assert record["tome"]["ratio"] == 0.5 and record["speed"]["channels_last"]


@pytest.mark.parametrize(
    ("of", "preset", "kept"), [("exact", "rounding", True), ("rounding", "exact", True), ("rounding", "fast", False)]
)
def test_a_preset_replaces_only_the_settings_of_an_image_that_it_sets(call, checkpoint, tmp_path, of, preset, kept):
    own = [f"speed={of}", "speed.compile=none", "precision=32-true"]
    own += ["sampler=euler", "steps=4", "tome.ratio=0.25", f"pretrained={checkpoint}"]
    assert call(predict_main, "prompt=a", *own, f"output_dir={tmp_path / 'first'}")[0] == 0
    changed = [f"speed={preset}", "speed.compile=none", "precision=32-true"]
    image = tmp_path / "first" / "images" / "00000-0.png"
    assert call(predict_main, "--from", image, *changed, f"output_dir={tmp_path / 'out'}")[0] == 0
    [record] = records(tmp_path / "out")
    found = (record["scheduler"], record["steps"], record["tome"]["ratio"])
    assert (found == ("EulerDiscreteScheduler", 4, 0.25)) == kept


def test_tomesd_cfg_replaces_the_token_merging_of_an_image(call, checkpoint, tmp_path):
    common = ["prompt=a", "steps=1", f"pretrained={checkpoint}"]
    assert call(predict_main, *common, "tome.ratio=0.5", f"output_dir={tmp_path / 'first'}")[0] == 0
    image = tmp_path / "first" / "images" / "00000-0.png"
    changed = ["tomesd_cfg={ratio: 0.25}", f"output_dir={tmp_path / 'out'}"]
    assert call(predict_main, f"from={image}", *changed)[0] == 0
    assert records(tmp_path / "out")[0]["tome"]["ratio"] == 0.25


@pytest.mark.parametrize("first", [True, False])
def test_a_sweep_over_an_image(call, image, tmp_path, first):
    line = ["--from", image, "steps=1,2", f"output_dir={tmp_path / 'out'}"]
    status, _, complaint = call(predict_main, *(["-m", *line] if first else [*line[:2], "-m", *line[2:]]))
    assert (status, complaint) == (0, "")
    assert [records(tmp_path / "out" / str(job))[0]["steps"] for job in (0, 1)] == [1, 2]


def test_images_of_an_earlier_run_are_moved_aside(call, checkpoint, tmp_path):
    out = tmp_path / "out"
    common = ["steps=1", f"pretrained={checkpoint}", f"output_dir={out}"]
    assert call(predict_main, 'prompt=["a","b"]', *common)[0] == 0
    first, lines = made(out), (out / "predictions.jsonl").read_text()
    for k in (1, 2):
        status, printed, _ = call(predict_main, f"prompt={'c' * k}", "seed=5", *common)
        assert status == 0 and f"images-{k}" in printed
        assert sorted(made(out)) == ["00000-5.png"] and len(records(out)) == 1
    assert sorted(file.name for file in (out / "images-1").iterdir()) == sorted(first)
    assert (out / "predictions-1.jsonl").read_text() == lines


def altered(original, path, **changes):
    """The same pixels with other metadata, as anybody could write it."""
    image, text = Image.open(original), PngInfo()
    for name, value in {**image.text, **changes}.items():
        if value is not None:
            text.add_itxt(name, value)
    image.save(path, pnginfo=text)
    return path


NASTY = "x' +hydra.run.dir=/ ${oc.env:HOME} [a] \\' \" {b: c}, null\n???"


@pytest.mark.parametrize("prompt", [NASTY, "null", "[a,b]", "???", ""])
def test_a_prompt_in_an_image_stays_text(call, image, tmp_path, prompt):
    changed = altered(image, tmp_path / "x.png", prompt=prompt, parameters="_target_: os.system")
    assert call(predict_main, f"from={changed}", f"output_dir={tmp_path / 'out'}")[0] == 0
    assert [record["prompt"] for record in records(tmp_path / "out")] == [prompt]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": None}, ["prompt", "predict wrote"]),
        ({"steps": "many"}, ["steps='many'"]),
        ({"steps": '{"_target_": "os.getcwd"}'}, ["steps="]),
        ({"scheduler_settings": '{"_target_": "os.getcwd"}'}, ["scheduler_settings="]),
        ({"scheduler_settings": '{"betas": {"_target_": "os.getcwd"}}'}, ["scheduler_settings="]),
        ({"scheduler": "os.getcwd"}, ["os.getcwd", "ddim"]),
        ({"tome": '{"ratio": 0.5, "engine": "os.getcwd"}'}, ["tome.engine=os.getcwd"]),
        ({"guidance_scale": "NaN"}, ["guidance_scale='NaN'"]),
        ({"model": "nothing_like_it"}, ["nothing_like_it"]),
    ],
)
def test_bad_metadata_is_reported(call, image, tmp_path, changes, words):
    path = altered(image, tmp_path / "x.png", **changes)
    told(call(predict_main, f"from={path}", f"output_dir={tmp_path / 'out'}"), *words)


@pytest.mark.parametrize("name", ["nothing.png", "text.png"])
def test_a_file_that_is_no_image_is_reported(call, tmp_path, name):
    (tmp_path / "text.png").write_text("no image")
    told(call(predict_main, "--from", tmp_path / name), f"from={tmp_path / name}", "predict wrote")


def test_an_inpainted_image_without_its_run_asks_for_image_and_mask(call, checkpoint, tmp_path):
    photo = tmp_path / "photo.png"
    Image.new("RGB", (32, 32), "red").save(photo)
    settings = ["model=inpaint", f"image={photo}", "mask=[0,0,16,16]", "prompt=a", "steps=1"]
    assert call(predict_main, *settings, f"pretrained={checkpoint}", f"output_dir={tmp_path / 'out'}")[0] == 0
    moved = (tmp_path / "out" / "images" / "00000-0.png").rename(tmp_path / "moved.png")
    told(call(predict_main, f"from={moved}", f"output_dir={tmp_path / 'x'}"), "image=…", "mask=…")
    again = [f"from={moved}", f"image={photo}", "mask=[0,0,16,16]", f"output_dir={tmp_path / 'again'}"]
    assert call(predict_main, *again)[0] == 0
    assert np.array_equal(pixels(tmp_path / "again" / "images" / "00000-0.png"), pixels(moved))
