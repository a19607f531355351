"""Records of a run: merged from several processes, sorted, with half-written lines skipped."""

from __future__ import annotations

import json

from sdmodule.io.html_report import Job, write_page
from sdmodule.io.index_set import IndexSet
from sdmodule.io.run_folder import RECORDS, append_record, gather_records, keep_records, read_records, to_line


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


def test_records_of_any_number_of_files_are_merged(tmp_path):
    files = [tmp_path / f"{k}.jsonl" for k in range(200)]
    for k, file in enumerate(files):
        write(file, k, k + 200)
    merged = tmp_path / RECORDS
    assert len(gather_records(files, keep=range(390), target=merged)) == 390
    assert [record["index"] for record in read_records(merged)] == list(range(390))


def test_a_resumed_run_keeps_the_records_of_all_processes_for_its_images(tmp_path):
    write(tmp_path / RECORDS, 4, 0, end='{"index": 9, "prom')
    write(tmp_path / "predictions.1.jsonl", 1, 3)
    recorded = keep_records(tmp_path, IndexSet([0, 3, 4, 7]))
    assert list(recorded) == [0, 3, 4] and len(recorded) == 3 and 1 not in recorded
    append_record(tmp_path / RECORDS, {"index": 7})
    assert [record["index"] for record in read_records(tmp_path / RECORDS)] == [0, 3, 4, 7]
    assert [path.name for path in tmp_path.iterdir()] == [RECORDS]


def test_a_run_without_images_has_no_records(tmp_path):
    gather_records([tmp_path / RECORDS])
    assert (tmp_path / RECORDS).read_text() == "" and list(read_records(tmp_path / "none.jsonl")) == []


def test_a_page_of_many_images_has_its_records_in_files_beside_it(tmp_path):
    for name, count in (("a", 2345), ("b", 1)):
        (tmp_path / name).mkdir()
        write(tmp_path / name / RECORDS, *range(count), steps=3)
    jobs = [Job(tmp_path / name, name, name) for name in ("a", "b")]
    write_page(tmp_path, "many", jobs)
    data = json.loads((tmp_path / "index.html").read_text().partition('id="data">')[2].partition("</script>")[0])
    assert [(one["job"], one["first"], one["images"]) for one in data["files"]] == [
        (0, 0, 1000),
        (0, 1000, 1000),
        (0, 2000, 345),
        (1, 2345, 1),
    ]
    assert all(job["records"] == [] for job in data["jobs"])
    number, text = (
        (tmp_path / "pages" / "2.js").read_text().removeprefix("receive(").removesuffix(");\n").split(", ", 1)
    )
    content = json.loads(json.loads(text))
    assert number == "2" and content["shared"] == {"steps": 3}
    assert content["own"][-1] == {"index": 2344, "prompt": "é 2344"}

    write_page(tmp_path, "fewer", [jobs[1], Job(tmp_path / "a", "a", "a")])
    assert len(list((tmp_path / "pages").iterdir())) == 4
    write_page(tmp_path, "few", jobs[1:])
    assert not (tmp_path / "pages").exists()


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
