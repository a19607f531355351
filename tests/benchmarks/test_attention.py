"""Attention is measured with time and error side by side."""

import json

import pytest

from benchmarks import attention
from sdmodule.errors import SettingsError


def test_the_report_has_time_and_error_of_each(monkeypatch, tmp_path):
    monkeypatch.setattr(attention, "SHAPES", ((64, 16),))
    result = attention.run(["--rounds", "1", "--json", str(tmp_path / "x.json")])
    assert json.loads((tmp_path / "x.json").read_text()) == result
    assert {row["attention"] for row in result["rows"]} >= {"torch", "tiles"}
    assert all(row["milliseconds"] > 0 and 0 < row["error"] < 0.02 for row in result["rows"])


def test_no_round_is_an_error():
    with pytest.raises(SettingsError, match="--rounds 0 is too small"):
        attention.run(["--rounds", "0"])
