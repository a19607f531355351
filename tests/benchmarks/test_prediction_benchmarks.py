"""Runs of many images, and runs in parts, are measured, printed and written."""

import json

from benchmarks import growing_pages, prediction_parts


def test_killed_parts_make_the_run_of_one_process(checkpoint, tmp_path, capsys):
    arguments = ["--quick", "--parts=2", "--killed=1", f"--pretrained={checkpoint}", "--json", str(tmp_path / "x.json")]
    [row] = prediction_parts.measure(arguments)["rows"]
    assert json.loads((tmp_path / "x.json").read_text())["rows"] == [row]
    assert row["images"] == 80 and not any(row[name] for name in ("missing", "pixels_differ", "metadata_differ"))
    assert "merge_seconds" in capsys.readouterr().out


def test_the_cost_of_many_images_is_reported(tmp_path, capsys):
    [row] = growing_pages.run(["--images", "1200", "--json", str(tmp_path / "x.json")])["rows"]
    assert json.loads((tmp_path / "x.json").read_text())["rows"] == [row]
    assert row["images"] == 1200 and row["page_mb"] > 0 and "resume_seconds" in capsys.readouterr().out
