"""What a command's start leaves behind."""

from __future__ import annotations

import gc

import pytest

from sdmodule.startup import imported, importing


def test_garbage_is_collected_again_once_everything_is_imported():
    with importing():
        assert not gc.isenabled()
        imported()
        assert gc.isenabled() and gc.get_freeze_count() > 0
    gc.unfreeze()


def test_garbage_is_collected_again_after_a_failure():
    with pytest.raises(RuntimeError), importing():
        raise RuntimeError
    assert gc.isenabled()
