"""The token merging benchmark on a small model: its report, not its figures."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from PIL import Image

from benchmarks import tome_runs, tome_speed
from sdmodule import SettingsError


@pytest.fixture(scope="session")
def checkpoint(small_checkpoint):
    return small_checkpoint


@pytest.mark.slow
def test_rows_have_speed_error_and_label(checkpoint, tmp_path):
    file, plot = tmp_path / "speed.json", tmp_path / "speed.png"
    given = ["--pretrained", str(checkpoint), "--forward-only", "--size", "32", "64", "--rounds", "1"]
    tome_speed.run([*given, "--precision", "float32", "--json", str(file), "--plot", str(plot)])
    written = json.loads(file.read_text())
    assert {"command", "hardware", "versions", "rows", "protocol"} <= written.keys()
    assert "the second call of the UNet" in written["protocol"] and str(tmp_path) not in file.read_text()
    rows = written["rows"]
    modes = ("eager", "rounding")
    assert len(rows) == 2 * len(modes) * (1 + 2 * len(tome_speed.ENGINES))
    for size, mode in itertools.product((32, 64), modes):
        of = {(r["engine"], r["ratio"]): r for r in rows if (r["size"], r["mode"]) == (size, mode)}
        assert of["none", 0.0]["error"] < (1e-5 if mode == "rounding" else 1e-30)
        for ratio in (0.5, 0.75):
            assert of["tomesd", ratio]["label"] == of["exact", ratio]["label"] == "lossy"
            assert of["exact", ratio]["error"] == pytest.approx(of["tomesd", ratio]["error"], rel=1e-2)
            for engine in tome_speed.ENGINES:
                speeds = of[engine, ratio]
                wanted = of["tomesd", ratio]["seconds"] / speeds["seconds"]
                assert speeds["over_tomesd"] == pytest.approx(wanted, rel=0.3)
    assert of["tomesd", 0.5]["published_speed_up"] == 1.268
    assert Image.open(plot).size == (2 * 620, len(modes) * 440)


@pytest.mark.slow
def test_a_shortened_protocol_says_so(checkpoint):
    given = ["--pretrained", str(checkpoint), "--size", "32", "--precision", "float32", "--quick"]
    result = tome_speed.run(given)
    assert "shortened: images 1 of 100, steps 2 of 50" in result["protocol"]
    rows = {row["engine"]: row for row in result["rows"] if row["mode"] == "eager"}
    assert rows["none"]["psnr_db"] is None
    assert all(math.isfinite(rows[engine]["psnr_db"]) and rows[engine]["error"] > 0 for engine in tome_speed.ENGINES)


@pytest.mark.slow
def test_compiled_variants_have_their_own_rows(checkpoint, monkeypatch):
    monkeypatch.setattr(tome_runs, "BACKEND", "eager")  # compiled code is tested with the engines
    torch._dynamo.reset()
    given = ["--pretrained", str(checkpoint), "--forward-only", "--size", "32", "--precision", "float32"]
    rows = tome_speed.run([*given, "--quick", "--compile"])["rows"]
    torch._dynamo.reset()
    eager = {row["engine"]: row["error"] for row in rows if row["mode"] == "eager"}
    compiled = {row["engine"]: row for row in rows if row["mode"] == "compiled"}
    assert eager.keys() == compiled.keys()
    assert compiled["none"]["label"] in {"exact", "rounding"}
    for engine in tome_speed.ENGINES:
        assert compiled[engine]["error"] == pytest.approx(eager[engine], rel=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps 0: must be at least 1"),
        (["--ratios", "0.9"], r"to 0\.75"),
        (["--clock", "cpu"], "add --forward-only"),
        (["--engines", "fast"], "Unrecognized arguments: --engines fast"),
    ],
)
def test_a_bad_argument_is_one_sentence(arguments, message):
    with pytest.raises(SettingsError, match=message):
        tome_speed.run(arguments)
