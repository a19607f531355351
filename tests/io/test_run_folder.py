"""Records of a run: merged from several processes, sorted, with half-written lines skipped."""

from __future__ import annotations

import json

from sdmodule.io.html_report import Job, write_page
from sdmodule.io.run_folder import RECORDS, gather_records, read_records, to_line


def write(file, *indices, end="", **metadata):
    file.write_text("".join(to_line({"index": k, "prompt": f"é {k}", **metadata}) for k in indices) + end)


def test_records_of_several_processes_are_merged_in_order(tmp_path):
    first, second, none = tmp_path / RECORDS, tmp_path / "predictions.1.jsonl", tmp_path / "predictions.2.jsonl"
    write(first, 4, 0, 2, end='{"index": 9, "prom')  # killed while writing
    write(second, 1, 3, 2, prompt="later\u2028<b>")
    gather_records([first, second, none])
    assert [record["index"] for record in read_records(first)] == [0, 1, 2, 3, 4]
    assert [record["prompt"] for record in read_records(first)][1:3] == ["later\u2028<b>"] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [second.name, RECORDS]


def test_a_run_without_images_has_no_records(tmp_path):
    gather_records([tmp_path / RECORDS])
    assert (tmp_path / RECORDS).read_text() == "" and list(read_records(tmp_path / "none.jsonl")) == []


def test_a_page_contains_the_records_as_data(tmp_path):
    write(tmp_path / RECORDS, 0, 1, prompt="</script>")
    write_page(tmp_path, "a run", [Job(tmp_path), Job(tmp_path, "again", "x", {"steps": "3"})], "plot.svg")
    text = (tmp_path / "index.html").read_text()
    data = json.loads(text.partition('id="data">')[2].partition("</script>")[0])
    assert (data["title"], data["plot"]) == ("a run", "plot.svg")
    assert [(job["name"], job["folder"], job["swept"], job["timings"]) for job in data["jobs"]] == [
        ("", "", {}, {}),
        ("again", "x", {"steps": "3"}, {}),
    ]
    assert [[r["index"] for r in job["records"]] for job in data["jobs"]] == [[0, 1]] * 2
    assert data["jobs"][0]["records"][0]["prompt"] == "</script>"
