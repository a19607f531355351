"""What a command's start leaves behind."""

from __future__ import annotations

import gc
import weakref

import pytest

from sdmodule.cli.startup import gc_paused, gc_resume


def test_garbage_is_collected_again_afterwards():
    with gc_paused():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(RuntimeError), gc_paused():
        raise RuntimeError
    assert gc.isenabled()


def test_what_is_left_behind_after_the_first_job_can_be_found():
    class Left:
        pass

    gone = []
    with gc_paused():
        gc_resume()
        left = Left()
        left.itself = left
        weakref.finalize(left, gone.append, True)
        del left
        gc_resume()  # the next job of a sweep
    gc.collect()
    assert gone
