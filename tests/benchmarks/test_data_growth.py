"""Starts with data of each kind are measured."""

import pytest

from benchmarks import data_growth
from sdmodule.errors import SettingsError


def test_a_start_is_measured(tmp_path):
    source = data_growth.make("tar", 12, tmp_path / "images")
    row = data_growth.start("tar", source, tmp_path / "cache")
    assert row.keys() == {"seconds", "processor_seconds", "worker_mb", "memory_mb", "own_memory_mb"}
    assert row["seconds"] > 0 and len(list((tmp_path / "cache").rglob("*.arrow"))) == 1


@pytest.mark.parametrize(
    ("arguments", "says"), [(["--kinds", "zip"], "folder, tar and parquet"), (["--counts", "0"], "1")]
)
def test_wrong_arguments_are_refused(arguments, says):
    with pytest.raises(SettingsError, match=says):
        data_growth.run(arguments)
