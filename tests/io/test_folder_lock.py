"""The lock of an output folder ends with its run, whatever the run has started."""

from __future__ import annotations

import os
import signal
import time

import pytest

from sdmodule.errors import SettingsError
from sdmodule.io.folder_lock import folder_locked


def test_a_worker_that_outlives_a_killed_run_does_not_hold_its_folder(tmp_path):
    read, write = os.pipe()
    run = os.fork()
    if run == 0:
        with folder_locked(tmp_path):
            worker = os.fork()
            if worker == 0:
                time.sleep(60)
                os._exit(0)
            os.write(write, str(worker).encode())
            time.sleep(60)
        os._exit(0)
    worker = int(os.read(read, 20))
    try:
        with pytest.raises(SettingsError, match="another run is writing to this folder"), folder_locked(tmp_path, 0.2):
            pass
        os.kill(run, signal.SIGKILL)
        os.waitpid(run, 0)
        os.kill(worker, 0)  # it is still there
        with folder_locked(tmp_path, 0.2):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)
        os.close(read)
        os.close(write)
