"""The benchmark of a streamed set measures real starts, and what it reports adds up."""

import pytest

from benchmarks.streaming import real_shard, row, run
from sdmodule.errors import SettingsError


def test_a_start_over_http_is_measured(tmp_path):
    measured = row(tmp_path, real_shard(tmp_path / "shard"), samples=2000, buckets=True, batch=4)
    assert (measured["samples"], measured["shards"], measured["buckets"]) == (2000, 2, 3)
    assert 0 < measured["ready_seconds"] < measured["first_batch_seconds"] and 0 < measured["memory_mb"] < 200
    with pytest.raises(SettingsError, match="--samples 0: must be at least 1"):
        run(["--samples", "0"])
