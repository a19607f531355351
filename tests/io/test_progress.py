"""Progress of a task where the output is no terminal."""

import re

from sdmodule.io.progress import Progress, progress


def test_time_is_left_until_all_is_done_and_unknown_before_anything_is(capsys):
    bar = Progress("counting", 3, "things", every=0)
    for done in (0, 0.5, 1, 2, 3):
        bar.update(done, lambda: {"loss": "1"})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "counting: 0 of 3 things, loss 1, ? left" and lines[-1].endswith(
        "3 of 3 things, loss 1, 00:00 left"
    )
    assert [re.sub(r"\D.*", "", line.removeprefix("counting: ")) for line in lines] == ["0", "0", "1", "2", "3"]
    assert all(re.search(r"\d\d:\d[1-9] left", line) for line in lines[1:-1])


def test_what_was_done_before_has_no_share_in_the_pace(capsys):
    bar = Progress("counting", 10, done=8, every=0)
    bar.update(8)
    assert capsys.readouterr().out == "counting: 8 of 10, ? left\n"


def test_figures_are_asked_for_only_when_they_are_shown(capsys):
    def fail():
        raise AssertionError

    Progress("counting", 2, every=1000).update(1, fail)
    Progress("counting", 2, every=0, show=False).update(1, fail)
    assert capsys.readouterr().out == ""


def test_a_short_task_with_a_delay_says_nothing_and_another_one_its_end(capsys):
    with progress(2, "waiting", delay=1000) as on_done:
        on_done(2)
    assert capsys.readouterr().out == ""
    with progress(1200, "counting") as on_done:
        on_done(1200)
    assert capsys.readouterr().out == "counting: 1,200\ncounting: 1,200 of 1,200\n"
    with progress(2, "slowly", delay=1e-9) as on_done:
        on_done(1)
    assert re.fullmatch(r"slowly: 1 of 2, \d\d:\d\d left\nslowly: 1 of 2\n", capsys.readouterr().out)
