"""The start of the commands is measured, printed and written."""

import json

from benchmarks import startup


def test_the_report_has_each_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(startup, "COMMANDS", ("predict.py --version", "predict.py stepz=20"))
    result = startup.run(["--quick", "--json", str(tmp_path / "x.json")])
    assert json.loads((tmp_path / "x.json").read_text()) == result
    assert [row["command"] for row in result["rows"]] == ["python predict.py --version", "python predict.py stepz=20"]
    assert (
        all(0 < row["processor_seconds"] < 60 for row in result["rows"]) and "wall_seconds" in capsys.readouterr().out
    )
