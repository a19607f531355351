"""The benchmark of a streamed set measures real starts, and what it reports adds up."""

import json

import pytest

from benchmarks.streaming import run
from sdmodule.errors import SettingsError


def test_a_start_over_http_is_measured(tmp_path):
    result = run(["--samples", "2000", "--json", str(tmp_path / "streaming.json")])
    assert json.loads((tmp_path / "streaming.json").read_text())["rows"] == result["rows"]
    assert [(row["samples"], row["shards"], row["buckets"]) for row in result["rows"]] == [(2000, 2, 1), (2000, 2, 3)]
    for row in result["rows"]:
        assert 0 < row["ready_seconds"] < row["first_batch_seconds"] and 0 < row["memory_mb"] < 200
    with pytest.raises(SettingsError, match="--samples 0: must be at least 1"):
        run(["--samples", "0"])
