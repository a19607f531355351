"""The page of a run or a sweep, opened in a browser, and the other reports of a sweep."""

import csv
import shutil
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image

from benchmarks.forked import run
from sdmodule.cli.main import predict_main
from sdmodule.io import sweep_report
from sdmodule.io.html_report import Job, write_page
from sdmodule.io.run_folder import RECORDS, to_line
from tests.chromium import PROGRAM, Page

pytestmark = pytest.mark.slow  # runs a sweep and a browser


@pytest.fixture(scope="session")
def checkpoint(small_checkpoint):
    return small_checkpoint


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
    """The folder of a sweep over three ratios of token merging, with two prompts of two seeds each."""
    out = tmp_path_factory.mktemp("my runs #1") / "a sweep? 50%"
    settings = ["-m", "tome.ratio=0,0.5,0.75", f"pretrained={checkpoint}", f"output_dir='{out}'", "steps=2"]
    settings += [f"prompts='{out.parent / 'prompts.txt'}'", "num_images_per_prompt=2", "progress=false"]
    (out.parent / "prompts.txt").write_text(f"a red circle\n{EVIL}\n", encoding="utf-8")
    run("predict", *settings, log=out.parent / "log")
    return out


def loaded(browser):
    """Natural widths of all images on the page, loaded even if they are out of view."""
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
    assert heads[0] == "a red circle · seed 0" and heads[2].startswith("a <b>star</b> </script>") and len(heads) == 4
    bars = "document.querySelectorAll('.bar').length"
    assert browser.run(bars) == 3 and "images/s" in browser.run("document.querySelector('.bars').textContent")

    # the filter
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

    # comparison of two images, by keyboard alone
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

    # a gallery instead of the table
    browser.run("document.querySelector('#table').click()")
    assert browser.run("document.querySelectorAll('figure').length") == 12
    assert "0.75" in browser.run("[...document.querySelectorAll('figure')].at(-1).querySelector('dl').textContent")
    assert browser.messages == []


def settled(browser):
    """Wait for what the page is about to show; returns the count in its header."""
    waiting = "new Promise((done) => { const look = () => find('#images').ariaBusy === 'true' ? setTimeout(look, 5)"
    return browser.run(f"{waiting} : done(find('#count').textContent); look(); }})")


def test_the_page_of_many_images_loads_them_as_needed(browser, tmp_path):
    for job, count in (("0", 2300), ("1", 2200)):
        (tmp_path / "run" / job / "images").mkdir(parents=True)
        with (tmp_path / "run" / job / RECORDS).open("w", encoding="utf-8") as lines:
            for k in range(count):
                Image.new("1", (8, 8)).save(tmp_path / "run" / job / "images" / f"{k}.png")
                record = {"file": f"images/{k}.png", "index": k, "prompt": f"star {k} {EVIL}", "seed": k, "steps": 2}
                lines.write(to_line(record))
    run = tmp_path / "run" / "0"
    write_page(run, "many", [Job(run)])
    browser.open((run / "index.html").as_uri())
    assert settled(browser) == "2300 of 2300 images" and browser.run("document.scripts.length") == 3
    first = "document.querySelector('figcaption').textContent"
    assert browser.run("document.querySelectorAll('figure').length") == 200 and "star 0 a <b>" in browser.run(first)
    metadata = browser.run("document.querySelector('dl').textContent")
    assert "steps2" in metadata and "fileimages/0.png" in metadata
    assert browser.run("[...document.images].every((image) => image.loading === 'lazy')")

    browser.run("find('#forth').focus()")
    browser.press("Enter")
    settled(browser)
    assert "star 200 " in browser.run(first) and browser.run("find('#page').value") == "2"
    browser.run("find('#page').value = 99; find('#page').dispatchEvent(new Event('change'))")
    settled(browser)
    assert "star 2200 " in browser.run(first) and browser.run("document.querySelectorAll('figure').length") == 100
    assert browser.run("find('#forth').disabled && find('#page').value === '12' && find('#last').textContent") == "12"
    assert browser.run("document.scripts.length") == 4  # the first and the last file of records

    browser.run("find('#filter').focus()")
    browser.type("star 22")
    assert settled(browser) == "140 of 2300 images" and "star 22 " in browser.run(first)  # and 122, …, 2200 to 2299
    assert browser.run("find('#pages').hidden && find('#page').value") == "1"
    browser.run("document.querySelector('button[aria-pressed=false]:not(#table)').click()")
    browser.run("[...document.querySelectorAll('figure button[aria-pressed=false]')].at(-1).click()")
    assert browser.run("document.querySelectorAll('.pair img').length") == 2

    # a sweep, side by side
    sweep_report.summarize(tmp_path / "run", [(tmp_path / "run" / job, [f"steps={job}"]) for job in ("0", "1")])
    browser.open((tmp_path / "run" / "index.html").as_uri())
    assert settled(browser) == "4500 of 4500 images"
    assert browser.run("document.querySelectorAll('tbody tr').length") == 200
    browser.run("find('#page').value = 12; find('#page').dispatchEvent(new Event('change'))")
    settled(browser)
    assert browser.run("document.querySelectorAll('tbody tr').length") == 100
    assert browser.run("document.querySelectorAll('tbody img').length") == 100
    assert browser.messages == []

    # without its folder of records
    shutil.rmtree(tmp_path / "run" / "pages")
    browser.run("location.reload()")
    browser.open((tmp_path / "run" / "index.html").as_uri())
    wait = "new Promise((done) => { const look = () => find('#count').textContent.includes('cannot') ? done(1)"
    browser.run(f"{wait} : setTimeout(look, 5); look(); }})")
    assert "keep the folder pages beside this page" in browser.run("find('#count').textContent")


def test_a_narrow_page_cuts_nothing_and_enlarges_an_image(browser, sweep):
    browser.call("Emulation.setDeviceMetricsOverride", width=500, height=900, deviceScaleFactor=1, mobile=False)
    browser.open((sweep / "index.html").as_uri())
    edges = browser.run("[...document.querySelectorAll('td img')].map((image) => image.getBoundingClientRect().right)")
    assert len(edges) == 12 and max(edges) <= 500
    assert browser.run("document.documentElement.scrollWidth") <= 500
    assert browser.run("document.querySelector('.scroll').scrollWidth <= document.querySelector('.scroll').clientWidth")
    names = "[...document.querySelectorAll('td')].map((cell) => getComputedStyle(cell, '::before').content)"
    assert browser.run(names)[1:4] == ['"tome.ratio=0"', '"tome.ratio=0.5"', '"tome.ratio=0.75"']

    small = browser.run("document.querySelector('td img').getBoundingClientRect().width")
    browser.run("document.querySelector('td a').focus()")
    browser.press("Enter")
    assert len(loaded(browser)) == 14 and browser.run("document.querySelector('dialog').open")
    large = browser.run("document.querySelector('dialog img').getBoundingClientRect().width")
    assert small < 200 and 400 < large <= 500
    assert "seed 0" in browser.run("document.querySelector('dialog p').textContent")
    browser.run("document.querySelector('dialog').click()")
    assert not browser.run("document.querySelector('dialog').open") and browser.messages == []


def test_the_page_of_an_inpaint_run_shows_before_and_after(browser, call, checkpoint, tmp_path):
    photo = tmp_path / "photo.png"
    Image.new("RGB", (40, 30), "red").save(photo)
    settings = ["prompt=a star", "model=inpaint", f"image={photo}", "mask=[0,0,20,20]", "steps=1"]
    assert call(predict_main, *settings, f"pretrained={checkpoint}", f"output_dir={tmp_path / 'out'}")[0] == 0
    (tmp_path / "out").rename(tmp_path / "moved")
    browser.open((tmp_path / "moved" / "index.html").as_uri())
    assert loaded(browser) == [40] and browser.run("document.querySelector('#table').hidden")
    browser.run("[...document.querySelectorAll('button')].find((b) => b.textContent === 'before | after').click()")
    assert loaded(browser) == [40, 40, 40] and browser.messages == []


def test_a_sweep_has_a_table_a_contact_sheet_and_a_plot(sweep):
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
    texts = [text.text for text in plot.iter("{http://www.w3.org/2000/svg}text")]
    assert {"0", "0.5", "0.75", "tome.ratio", "seconds per image"} <= {*texts}
    assert sum(text.endswith(" s") for text in texts) == 3


def test_a_sweep_without_matplotlib_has_no_plot_and_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sweep_report, "find_spec", lambda name: None)
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / RECORDS).touch()
    sweep_report.summarize(tmp_path, [(tmp_path / "0", ["steps=1"])])
    assert capsys.readouterr().out.splitlines() == [
        "seconds.svg was not drawn: matplotlib is missing; pip install 'sdmodule[plots]'"
    ]
    assert sorted(path.name for path in tmp_path.glob("*.*")) == ["index.html", "summary.csv"]
    assert '"plot": null' in (tmp_path / "index.html").read_text()


def test_the_plot_takes_any_label_and_no_timings(tmp_path):
    jobs = [
        Job(tmp_path, f"job {k}", str(k), {"prompt": text}) for k, text in enumerate(("a $x_$ <b>", "日本 🌵", "c"))
    ]
    for job in jobs[:2]:
        job.timings["images_per_second"] = 2.0
    sweep_report.plot(jobs, tmp_path / "a.svg")
    texts = [text.text for text in ElementTree.parse(tmp_path / "a.svg").iter("{http://www.w3.org/2000/svg}text")]
    assert {"a $x_$ <b>", "日本 🌵", "prompt"} <= {*texts} and texts.count("0.5 s") == 2 and "c" not in texts
    sweep_report.plot(jobs[2:], tmp_path / "b.svg")
    assert "prompt" in (tmp_path / "b.svg").read_text()


def test_an_interrupted_sweep_reports_its_finished_jobs(call, checkpoint, tmp_path):
    settings = ["-m", "prompt=a", "steps=1,2,5000", f"pretrained={checkpoint}", f"output_dir={tmp_path / 'out'}"]
    status, _, complaint = call(predict_main, *settings)
    assert status == 1 and "steps=5000" in complaint
    assert [row["steps"] for row in csv.DictReader((tmp_path / "out" / "summary.csv").open())] == ["1", "2"]
    assert (tmp_path / "out" / "index.html").is_file()
