"""The page of a training, opened in a browser: curves, images, settings, warnings, and trainings side by side."""

import json
import shutil
import subprocess
import sys
import warnings

import pytest
from PIL import Image

from sdmodule.cli.main import train_main
from sdmodule.cli.report import report_main
from sdmodule.io.metrics_file import read_curves, thinned
from sdmodule.io.training_report import short_names
from tests.chromium import PROGRAM, Page

EVIL = "<b>odd</b></script><script>document.title='broken'</script>"
LEVELS = ["val/loss_0_249", "val/loss_250_499", "val/loss_500_749", "val/loss_750_999"]


def page_data(folder, name="index.html"):
    """What a page shows."""
    text = (folder / name).read_text(encoding="utf-8")
    return json.loads(text.partition('id="data">')[2].partition("</script>")[0])


def steps_of(curve):
    return [step for step, _ in curve]


@pytest.fixture(scope="module")
def trained(checkpoint, tmp_path_factory):
    """A training that was resumed, and another; with the page of the first before it was resumed."""
    folder = tmp_path_factory.mktemp("trained")
    photos = folder / "photos"
    photos.mkdir()
    for k, colour in enumerate(("red", "green", "blue", "black", "white", "gray")):
        Image.new("RGB", (32, 32), colour).save(photos / f"{k}.png")
    (photos / "metadata.jsonl").write_text(
        "".join(json.dumps({"file_name": f"{k}.png", "text": f"{EVIL} {k}"}) + "\n" for k in range(6))
    )
    common = [
        f"data.root={photos}",
        f"pretrained={checkpoint}",
        "resolution=32",
        "data.batch_size=2",
        "data.val_fraction=0.4",
    ]
    common += ["trainer.val_check_interval=2", "trainer.log_every_n_steps=1", "callbacks.ema.start_step=1", "steps=1"]
    common = [f"+{setting}" if setting == "steps=1" else setting for setting in common]

    def train(name, *settings):
        before, sys.argv = sys.argv, ["train", *common, f"output_dir={folder / name}", *settings]
        try:
            train_main()
        finally:
            sys.argv = before

    train("one", "trainer.max_steps=4", "validate_first=true")
    shutil.copy(folder / "one" / "index.html", folder / "first.html")
    train("one", "trainer.max_steps=6", "ckpt_path=last")
    train("two", "trainer.max_steps=2", "model.optimizer.lr=0.002", "callbacks=[ema,samples,report]")
    return folder


@pytest.fixture
def browser(tmp_path):
    if PROGRAM is None:
        pytest.skip("there is no Chromium here; apt-get install chromium")
    page = Page(tmp_path / "profile")
    yield page
    page.close()


@pytest.mark.slow
def test_the_page_keeps_what_was_before_a_resume(trained):
    (before,), (run,) = (page_data(trained, "first.html")["runs"], page_data(trained / "one")["runs"])
    assert before["state"].startswith("finished: 4 of 4 steps") and run["state"].startswith("finished: 6 of 6 steps")
    curves = run["curves"]
    assert steps_of(before["curves"]["train/loss"]) == [1, 2, 3, 4] and steps_of(curves["train/loss"]) == [*range(1, 7)]
    for key in ("val/loss", *LEVELS):
        assert steps_of(before["curves"][key]) == [0, 2, 4] and steps_of(curves[key]) == [0, 2, 4, 6]
    assert curves["val/loss_raw"] and curves["train/samples_per_second"]
    assert curves["train/lr"][0][1] == pytest.approx(1e-5) and steps_of(curves["train/lr"]) == [*range(1, 7)]
    assert steps_of(run["sheets"]) == [0, 2, 4, 6] and run["sheets"][0][1].startswith("data:image/webp;base64,")
    assert "resumed at step 4" in run["figures"]["started"] and run["figures"]["precision"] == "32-true"
    assert run["chosen"]["data.batch_size"] == "2" and run["settings"]["trainer.max_steps"] == "6"


@pytest.mark.slow
def test_the_page_of_a_training_in_a_browser(browser, trained, tmp_path):
    page = shutil.copy(trained / "one" / "index.html", tmp_path / "alone.html")  # it needs no file beside it
    browser.open(page.as_uri())
    texts = "[...document.querySelectorAll('#curves > .wide h3')].map((title) => title.textContent)"
    assert browser.run(texts)[:2] == ["loss", "validation loss by timesteps"] and "learning rate" in browser.run(texts)
    lines = "document.querySelectorAll('#curves > .wide .card:nth-child({}) path').length"
    assert browser.run(lines.format(1)) == 3 and browser.run(lines.format(2)) == 4
    assert browser.run("getComputedStyle(document.querySelector('path')).stroke").startswith("rgb(")

    shown = "document.querySelector('#shown').textContent"
    source = "document.querySelector('#images img').src"
    assert browser.run(shown) == "step 6, 4 of 4"
    last = browser.run(source)
    browser.run("document.querySelector('#step').focus()")
    for _ in range(3):
        browser.press("ArrowLeft")
    assert browser.run(shown) == "step 0, 1 of 4" and browser.run(source) != last
    ends = browser.run("[...document.querySelectorAll('#ends img')].map((image) => image.src)")
    assert ends == [browser.run(source), last]
    assert browser.run(
        "Promise.all([...document.images].map(async (one) => { await one.decode(); return one.naturalWidth; }))"
    )

    browser.run("document.querySelector('#log').click()")
    browser.run(
        "{ const chart = document.querySelector('svg'), box = chart.getBoundingClientRect(); chart.dispatchEvent("
        "new PointerEvent('pointermove', { clientX: box.right - 12, clientY: box.top + 9 })); }"
    )
    assert "step 6" in browser.run("document.querySelector('#curves output').textContent")
    assert "pretrained" in browser.run("document.querySelector('#settings').innerText")
    assert browser.run("document.title") == "one" and browser.messages == []


@pytest.mark.slow
def test_trainings_side_by_side(call, browser, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, printed, _ = call(report_main, str(trained / "one"), str(trained / "two"), str(trained / "one") + "/")
    assert (status, printed) == (0, "Wrote report.html\n")
    browser.call("Emulation.setDeviceMetricsOverride", width=500, height=900, deviceScaleFactor=1, mobile=False)
    browser.open((tmp_path / "report.html").as_uri())
    assert browser.run("document.documentElement.scrollWidth") <= 500
    assert browser.run("document.querySelector('#state').textContent") == "2 trainings"
    assert browser.run("document.querySelectorAll('#curves > .wide .card:nth-child(1) path').length") == 2
    captions = "[...document.querySelectorAll('#images figcaption')].map((caption) => caption.textContent)"
    assert browser.run(captions) == ["one · step 6", "two · step 2"]
    differing = browser.run("document.querySelector('#settings > .scroll').innerText")
    assert "model.optimizer.lr" in differing and "0.002" in differing and "resolution" not in differing
    assert browser.messages == []


@pytest.mark.slow
def test_a_page_is_not_written_over_another_file(call, trained, tmp_path):
    other = tmp_path / "notes.html"
    other.write_text("mine")
    run = str(trained / "one")
    for arguments, told in {
        (run, str(tmp_path / "none")): "is no folder",
        (run, str(tmp_path)): "holds no training",
        (run, "--output", str(other)): "is another file",
        (run, "--output", str(tmp_path / "no" / "page.html")): "cannot be written",
    }.items():
        status, _, error = call(report_main, *arguments)
        assert status == 1 and told in error and error.startswith("error: ") and error.count("\n") == 1
    assert other.read_text() == "mine" and [path.name for path in tmp_path.iterdir()] == ["notes.html"]
    made = subprocess.run([sys.executable, "-m", "sdmodule.report", run], capture_output=True, text=True, check=True)
    assert made.stdout == f"Wrote {run}/index.html\n" and page_data(trained / "one")["runs"][0]["sheets"]


@pytest.mark.slow
def test_a_training_that_fails_says_so_and_shows_its_warnings(call, checkpoint, photos, tmp_path):
    shown = warnings.showwarning
    out = tmp_path / "out"
    settings = [f"data.root={photos}", f"pretrained={checkpoint}", f"output_dir={out}", "resolution=32"]
    settings += [
        "data.batch_size=16",
        "model.optimizer.lr=1e30",
        "trainer.max_steps=9",
        "callbacks=[report]",
        "logger=none",
    ]
    with pytest.warns(UserWarning):
        status, _, error = call(train_main, *settings)
    (run,) = page_data(out)["runs"]
    assert status == 1 and run["state"].startswith("failed (") and "NaN" in run["state"], error
    assert any("the batch size is 5" in text for text in run["warnings"])
    assert run["curves"] == {} and "logger=[csv" in run["notes"][0]
    assert warnings.showwarning is shown


def test_curves_of_several_parts_and_of_a_training_set_aside(tmp_path):
    (tmp_path / "checkpoints-1").mkdir()  # of the training that was set aside
    for name, rows in {
        "metrics-1.csv": ["0,0,9,", "0,1,9,"],
        "metrics-2.csv": ["0,0,,5", "0,0,1,", ",1,2,", "0,1,3,6", "0,2,nan,", "0,3"],  # killed while writing
        "metrics.csv": ["0,1,4,", "0,2,inf,7", ",9,x,"],
    }.items():
        (tmp_path / name).write_text("epoch,step,train/loss,val/loss\n" + "".join(f"{row}\n" for row in rows))
    assert read_curves(tmp_path) == {
        "train/loss": [(1, 2.0), (2, 4.0), (3, None)],
        "val/loss": [(0, 5.0), (2, 6.0), (3, 7.0)],
    }


def test_long_curves_are_thinned_to_means():
    points = [(step, float(step)) for step in range(1, 11)]
    assert thinned(points, 10) == points
    assert thinned(points, 4) == [(3, 2.0), (6, 5.0), (9, 8.0), (10, 10.0)]
    assert thinned([(1, 1.0), (2, None)], 1) == [(2, None)]


def test_names_are_as_short_as_they_can_be(tmp_path):
    assert short_names([tmp_path / "a" / "x", tmp_path / "b" / "x"]) == ["a/x", "b/x"]
    assert short_names([tmp_path / "a"]) == ["a"]
