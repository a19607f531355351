"""The script for whoever has a GPU, walked through on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks import gpu, gpu_syncs
from tests.isolation import restored_messages

ROOT = Path(__file__).parents[2]


def test_the_whole_script_walks_on_a_cpu(tmp_path):
    file = tmp_path / "gpu.json"
    with restored_messages():
        result = gpu.run(["--dry-run", "--json", str(file)])
    written = json.loads(file.read_text())
    assert written["rows"] == result["rows"] and written["dry_run"] and written["failed"] == []
    assert not [row for row in written["rows"] if "skipped" in row]
    sections = {name: [row for row in written["rows"] if row["section"] == name] for name in gpu.SECTIONS}
    checked = {row["what"] for row in sections["correctness"] if row.get("passed")}
    assert {"equal to diffusers, ddim", "attention sdpa, float32", "tuning lora", "from= with tome=exact"} <= checked
    assert all(row["it_per_second"] > 0 for row in sections["sampling"][:-1])
    assert all(row["images_per_second"] > 0 for row in sections["training"][:-1])
    assert {row.get("published_rtx_3090") for row in sections["table"]} >= {542.20, 427.65, 393.05}


def test_a_section_that_fails_is_a_row_and_what_does_not_fit_is_skipped_with_a_line(tmp_path, monkeypatch):
    def broken(run):
        raise ValueError("what is wrong")

    monkeypatch.setattr(gpu_syncs, "syncs", broken)
    monkeypatch.setitem(gpu.SECTIONS, "table", 1)
    result = gpu.run(["--dry-run", "--only", "syncs,table"])
    assert result["failed"] == ["syncs: section"]
    assert "ValueError: what is wrong" in result["rows"][0]["error"]
    assert "takes 5 s" in next(row["skipped"] for row in result["rows"] if row["section"] == "table")


def test_without_a_gpu_it_says_so_in_one_line():
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.splitlines() == [gpu.NO_GPU]
