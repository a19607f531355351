"""The page of a run, opened in a browser, and what a sweep leaves."""

import csv
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image

from benchmarks.forked import run
from sdmodule.cli.main import predict_main
from tests.chromium import PROGRAM, Page

EVIL = "a <b>star</b> </script><script>document.title='broken'</script> <!-- \"'&amp; \u2028"


@pytest.fixture
def browser(tmp_path):
    if PROGRAM is None:
        pytest.skip("there is no Chromium here; apt-get install chromium")
    page = Page(tmp_path / "profile")
    yield page
    page.close()


@pytest.fixture(scope="module")
def sweep(checkpoint, tmp_path_factory):
    """The folder of a sweep over three values of token merging, of two prompts with two seeds each."""
    out = tmp_path_factory.mktemp("my runs #1") / "a sweep? 50%"
    settings = ["-m", "tome.ratio=0,0.5,0.75", f"pretrained={checkpoint}", f"output_dir='{out}'", "steps=2"]
    settings += [f"prompts='{out.parent / 'prompts.txt'}'", "num_images_per_prompt=2", "progress=false"]
    (out.parent / "prompts.txt").write_text(f"a red circle\n{EVIL}\n", encoding="utf-8")
    run("predict", *settings, log=out.parent / "log")
    return out


def loaded(browser):
    """Whether every image on the page has loaded, those that are out of sight too."""
    return browser.run(
        "Promise.all([...document.images].map(async (image) => { image.loading = 'eager'; await image.decode();"
        " return image.naturalWidth; }))"
    )


def test_the_page_of_a_sweep_in_a_browser(browser, sweep):
    browser.open((sweep / "index.html").as_uri())
    assert loaded(browser) == [32] * 12 + [640]  # images of 32 pixels, and the plot
    assert browser.run("document.title") == "a sweep? 50%"
    assert browser.run("[...document.querySelectorAll('thead th')].map((head) => head.textContent)") == [
        "tome.ratio=0",
        "tome.ratio=0.5",
        "tome.ratio=0.75",
    ]
    heads = browser.run("[...document.querySelectorAll('tbody th')].map((head) => head.textContent)")
    assert heads[0] == "a red circle · 0" and heads[2].startswith("a <b>star</b> </script>") and len(heads) == 4
    bars = "document.querySelectorAll('.bar').length"
    assert browser.run(bars) == 3 and "images/s" in browser.run("document.querySelector('.bars').textContent")

    # the filter filters
    browser.run("document.querySelector('#filter').focus()")
    browser.type("CIRCLE red")
    assert browser.run("document.querySelectorAll('tbody tr').length") == 2
    assert browser.run("document.querySelector('#count').textContent") == "6 of 12 images"
    browser.type(" nothing like it")
    assert browser.run("document.querySelectorAll('tbody tr').length") == 0
    browser.run(
        "{ const filter = document.querySelector('#filter'); filter.value = ''; filter.oninput?.();"
        " filter.dispatchEvent(new Event('input')); }"
    )
    assert browser.run("document.querySelectorAll('tbody tr').length") == 4

    # the slider moves, by keys alone
    for _ in range(2):
        browser.run("document.querySelector('td button[aria-pressed=false]').focus()")
        browser.press("Enter")
    assert browser.run("document.querySelectorAll('.pair img').length") == 2
    assert len(loaded(browser)) == 15 and not browser.run("document.querySelector('#compare').hidden")
    edge = "document.querySelector('.pair img + img').style.clipPath"
    assert "50%" in browser.run(edge)
    browser.run("document.querySelector('#slide').focus()")
    browser.press("ArrowRight")
    assert "51%" in browser.run(edge)
    browser.press("End")
    assert "100%" in browser.run(edge)

    # one after the other instead of side by side
    browser.run("document.querySelector('#table').click()")
    assert browser.run("document.querySelectorAll('figure').length") == 12
    assert "0.75" in browser.run("[...document.querySelectorAll('figure')].at(-1).querySelector('dl').textContent")
    assert browser.messages == []


def test_the_page_of_one_run_shows_what_was_repainted(browser, call, checkpoint, tmp_path):
    photo = tmp_path / "photo.png"
    Image.new("RGB", (40, 30), "red").save(photo)
    settings = ["prompt=a star", "model=inpaint", f"image={photo}", "mask=[0,0,20,20]", "steps=1"]
    assert call(predict_main, *settings, f"pretrained={checkpoint}", f"output_dir={tmp_path / 'out'}")[0] == 0
    (tmp_path / "out").rename(tmp_path / "moved")
    browser.open((tmp_path / "moved" / "index.html").as_uri())
    assert loaded(browser) == [40] and browser.run("document.querySelector('#table').hidden")
    browser.run("[...document.querySelectorAll('button')].find((b) => b.textContent === 'before | after').click()")
    assert loaded(browser) == [40, 40, 40] and browser.messages == []


def test_a_sweep_ends_with_a_table_a_sheet_and_a_plot(sweep):
    rows = list(csv.DictReader((sweep / "summary.csv").open(encoding="utf-8")))
    assert [(row["job"], row["tome.ratio"], row["images"]) for row in rows] == [
        ("0", "0", "4"),
        ("1", "0.5", "4"),
        ("2", "0.75", "4"),
    ]
    assert all(float(row[name]) > 0 for row in rows for name in ("seconds_per_image", "seconds_denoise"))
    sheet = np.asarray(Image.open(sweep / "sheet.png"))
    assert sheet.shape[0] > 4 * 160 and sheet.shape[1] > 3 * 160 and len(np.unique(sheet.reshape(-1, 3), axis=0)) > 500
    plot = ElementTree.parse(sweep / "seconds.svg")
    assert len(plot.findall(".//{http://www.w3.org/2000/svg}circle")) == 3
    assert "tome.ratio" in "".join(plot.getroot().itertext())


def test_a_sweep_that_breaks_off_shows_what_was_done(call, checkpoint, tmp_path):
    settings = ["-m", "prompt=a", "steps=1,2,5000", f"pretrained={checkpoint}", f"output_dir={tmp_path / 'out'}"]
    status, _, complaint = call(predict_main, *settings)
    assert status == 1 and "steps=5000" in complaint
    assert [row["steps"] for row in csv.DictReader((tmp_path / "out" / "summary.csv").open())] == ["1", "2"]
    assert (tmp_path / "out" / "index.html").is_file()
