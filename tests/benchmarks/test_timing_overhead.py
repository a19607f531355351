"""What the timing of a training costs is measured, and printed as it is written."""

import json

from benchmarks.timing_overhead import run


def test_the_report_says_what_the_timing_costs(tmp_path, capsys):
    result = run(["--quick", "--json", str(tmp_path / "x.json")])
    assert json.loads((tmp_path / "x.json").read_text()) == result
    assert [row["batch_size"] for row in result["rows"]] == [1, 4] and "cost_percent" in capsys.readouterr().out
    assert all(0 < row["cost_percent"] < 100 for row in result["rows"])
