"""The soak test counts what it did, and loses nothing."""

import json

import pytest

from benchmarks.soak import growth, run


@pytest.mark.slow
def test_a_few_seconds_lose_nothing(tmp_path, capsys):
    [row] = run(["--quick", "--json", str(tmp_path / "soak.json")])["rows"]
    assert json.loads((tmp_path / "soak.json").read_text())["rows"] == [row]
    assert "kills" in capsys.readouterr().out
    lost = [name for name in ("images differing", "trainings differing", "files lost", "failures") if row[name]]
    assert not lost and row["kills"] + row["bad files offered"] > 0


def test_growth_leaves_out_the_warm_up():
    warm_up = [(float(k), 10 * k) for k in range(25)]
    steady = [(float(k), 1000 + (k % 7)) for k in range(25, 100)]
    assert abs(growth(warm_up + steady)) < 15
    leaking = [(float(k), 1000 + k) for k in range(25, 100)]
    assert 300 < growth(warm_up + leaking) < 400
    assert growth(steady[:5]) is None
