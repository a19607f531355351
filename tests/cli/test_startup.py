"""What a command's start leaves behind."""

from __future__ import annotations

import gc
import weakref

import pytest

from sdmodule.cli.startup import imported, importing


def test_garbage_is_collected_again_afterwards():
    with importing():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(RuntimeError), importing():
        raise RuntimeError
    assert gc.isenabled()


def test_what_is_left_behind_after_the_first_job_can_be_found():
    class Left:
        pass

    gone = []
    with importing():
        imported()
        left = Left()
        left.itself = left
        weakref.finalize(left, gone.append, True)
        del left
        imported()  # the next job of a sweep
    gc.collect()
    assert gone
