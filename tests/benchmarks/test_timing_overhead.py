"""The overhead of the timing callback is measured, printed and written."""

import json

import pytest

from benchmarks.timing_overhead import run


@pytest.mark.slow
def test_the_report_has_the_overhead(tmp_path, capsys):
    result = run(["--quick", "--json", str(tmp_path / "x.json")])
    assert json.loads((tmp_path / "x.json").read_text()) == result
    assert [row["batch_size"] for row in result["rows"]] == [1, 4] and "cost_percent" in capsys.readouterr().out
    assert all(0 < row["cost_percent"] < 100 for row in result["rows"])
