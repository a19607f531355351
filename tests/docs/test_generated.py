"""What is generated for the documentation is complete, and the README's figures are those of the benchmarks."""

import json
import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import sdmodule

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs"))  # as Sphinx finds them

from _ext.api import PAGES, api_pages  # noqa: E402
from _ext.benchmarks import benchmark_pages, readme_table, stale_because  # noqa: E402
from _ext.configuration import WITHOUT_A_SCRIPT, configuration_pages  # noqa: E402

from sdmodule.cli.config_files import read_config  # noqa: E402

pytestmark = pytest.mark.docs


def leaves(value, prefix=""):
    """The dotted names of all values of a configuration."""
    if not isinstance(value, dict) or not value:
        return {prefix}
    return {leaf for key, inner in value.items() for leaf in leaves(inner, f"{prefix}.{key}" if prefix else str(key))}


@pytest.mark.parametrize("path", sorted((ROOT / "conf").rglob("*.yaml")), ids=lambda path: path.stem)
def test_the_configuration_reference_has_every_key_of_a_file(path):
    content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    content.pop("defaults", None)
    rows = {row.name for row in read_config(path).keys}
    wanted = {key for key in leaves(content) if key}
    flow = {key for key in wanted if any(key.startswith(f"{row}.") for row in rows)}  # {a: 1} on one line is one row
    assert wanted - flow <= rows


def test_every_group_has_a_page_and_every_file_a_section():
    pages = configuration_pages(ROOT / "conf")
    text = "\n".join(pages.values())
    for path in (ROOT / "conf").rglob("*.yaml"):
        group = path.parent.relative_to(ROOT / "conf").as_posix().replace("/", "-")
        command = WITHOUT_A_SCRIPT.get(path.stem, f"{path.stem}.py")
        assert (f"(conf-{group}-{path.stem})=" if group != "." else f"# `{command}`") in text, path


def test_a_key_has_its_comment():
    pages = configuration_pages(ROOT / "conf")
    row = next(line for line in pages["tuning.md"].splitlines() if line.startswith("| `tuning.rank`"))
    comment = row.split("|")[3].strip()
    assert comment and comment.replace("\\", "") in (ROOT / "conf" / "tuning" / "lora.yaml").read_text(encoding="utf-8")


def test_the_api_reference_has_the_public_names():
    pages = api_pages(ROOT / "sdmodule")
    text = "\n".join(pages.values())
    assert set(PAGES) == {name.removesuffix(".md") for name in pages} - {"index"}
    for package in ("sdmodule", "sdmodule.callbacks", "sdmodule.data", "sdmodule.evaluation"):
        names = getattr(__import__(package, fromlist=["__all__"]), "__all__", [])
        for name in names:
            if not name.startswith("__"):
                assert f"## {name}\n" in text, f"{package}.{name} is in no page of docs/_ext/api.py"


def test_every_result_is_on_a_page_with_its_origin():
    results = ROOT / "benchmarks" / "results"
    notes = tomllib.loads((ROOT / "docs" / "benchmarks.toml").read_text(encoding="utf-8"))
    pages = benchmark_pages(results, notes, sdmodule.__version__)
    text = "\n".join(pages.values())
    for path in results.glob("*.json"):
        if "rows" in json.loads(path.read_text(encoding="utf-8")):
            assert text.count(f"`benchmarks/results/{path.name}`") >= 1, path.name
    assert {f"{name}.json" for name in notes} <= {path.name for path in results.glob("*.json")}
    for note in notes.values():
        assert not note.get("plot") or (results / note["plot"]).is_file()
    assert text.count("\n- date: 20") == text.count("\n- command: ")


def test_a_card_has_its_page_with_a_table_for_each_section(tmp_path):
    rows = [{"section": name, "what": "a check", "passed": True} for name in ("correctness", "correctness", "syncs")]
    content = {"command": "python benchmarks/gpu.py", "date": "2026-12-01", "rows": rows}
    (tmp_path / "gpu_t4.json").write_text(json.dumps(content), encoding="utf-8")
    pages = benchmark_pages(tmp_path, {}, sdmodule.__version__)
    assert pages["gpu.md"].count("| section | what | passed |") == 2 and "No GPU" not in pages["index.md"]


def test_a_benchmark_that_checks_itself_shows_the_checks_where_asked(tmp_path):
    share = {"right": 0, "counted": 9, "rate": 0.0}
    content = {"command": "python benchmarks/prompt_following.py", "rows": [{"all": share}]}
    content["wrong"] = [{"change": "a speck", "called right": share}]
    (tmp_path / "prompt.json").write_text(json.dumps(content), encoding="utf-8")
    for asked in (True, False):
        notes = {"prompt": {"page": "prompt_following", "checks": asked}}
        pages = benchmark_pages(tmp_path, notes, sdmodule.__version__)
        assert ("| a speck | 0.0% of 9 |" in pages["prompt_following.md"]) == asked


def test_a_result_is_stale_when_superseded_or_of_an_older_minor_version():
    content = {"versions": {"sdmodule": "0.1.3"}}
    assert stale_because(content, {}, "0.1.9") is None
    assert stale_because(content, {}, "0.2.0") == "measured with sdmodule 0.1.3"
    assert stale_because(content, {"superseded": "another method"}, "0.1.9") == "another method"


def test_the_readme_is_short_and_has_the_figures_of_the_benchmark():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 150
    shown = re.search(r"<!-- table: sampling_speed.json -->\n(.*?)\n<!-- end of table -->", readme, re.DOTALL)
    assert shown is not None and shown[1] == readme_table(ROOT / "benchmarks" / "results")


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "examples/README.md"])
def test_links_to_files_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+?)(?:#[\w-]+)?\)", text):
        if not target.startswith("http"):
            assert ((ROOT / page).parent / target).exists(), target
