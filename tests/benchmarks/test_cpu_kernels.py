"""Kernels are measured with time and error side by side."""

import json

import pytest

from benchmarks import attention, layers
from sdmodule.errors import SettingsError


def test_the_report_has_time_and_error_of_each_attention_kernel(monkeypatch, tmp_path):
    monkeypatch.setattr(attention, "SHAPES", ((64, 16),))
    result = attention.run(["--quick", "--json", str(tmp_path / "x.json")])
    assert result["quick"] and json.loads((tmp_path / "x.json").read_text()) == result
    assert {row["attention"] for row in result["rows"]} >= {"torch", "tiles"}
    assert all(row["milliseconds"] > 0 and 0 < row["error"] < 0.02 for row in result["rows"])


@pytest.mark.parametrize(("precision", "tolerance"), [("bfloat16", 0.02), ("float32", 1e-5)])
def test_the_report_has_time_and_error_of_each_layer(monkeypatch, tmp_path, precision, tolerance):
    for name, shape in (
        ("CONVOLUTION_SHAPES", (16, 16, 32)),
        ("LINEAR_SHAPES", (16, 8, 4)),
        ("GEGLU_SHAPES", (16, 8, 4)),
    ):
        monkeypatch.setattr(layers, name, (shape,))
    result = layers.run(["--quick", "--precision", precision, "--json", str(tmp_path / "x.json")])
    assert json.loads((tmp_path / "x.json").read_text()) == result
    assert {row["kernel"] for row in result["rows"]} >= {"torch", "packed", "winograd"}
    assert all(row["milliseconds"] > 0 and row["error"] < tolerance for row in result["rows"])
    assert all(row["over_torch"] == 1 for row in result["rows"] if row["kernel"] == "torch")


def test_zero_rounds_is_an_error():
    with pytest.raises(SettingsError, match="--rounds 0: must be at least 1"):
        attention.run(["--rounds", "0"])
