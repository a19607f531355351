"""The start of a command."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref

import pytest

from sdmodule.cli.main import predict_main, train_main
from sdmodule.cli.startup import gc_paused, gc_resume


def test_garbage_collection_resumes_after_the_block():
    with gc_paused():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(RuntimeError), gc_paused():
        raise RuntimeError
    assert gc.isenabled()


def test_objects_of_an_earlier_job_can_be_collected():
    class Cycle:
        pass

    collected = []
    with gc_paused():
        gc_resume()
        cycle = Cycle()
        cycle.itself = cycle
        weakref.finalize(cycle, collected.append, True)
        del cycle
        gc_resume()  # the next job of a sweep
    gc.collect()
    assert collected


WITHOUT_A_MODEL = """
import sys
from contextlib import suppress
from sdmodule.cli.main import predict_main
shown = (["--version"], ["--help"], ["--help", "sampler"], ["--cfg", "job"])
for arguments in (*shown, ["stepz=3"], ["sampler=foo"], ["prompts=a(b", "x"]):
    sys.argv[1:] = arguments
    with suppress(SystemExit):
        predict_main()
print(sorted({"torch", "lightning", "diffusers", "transformers", "wandb", "numpy"} & set(sys.modules)))
"""


def test_help_settings_and_typos_import_nothing_slow():
    done = subprocess.run([sys.executable, "-c", WITHOUT_A_MODEL], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
    assert "sampler=ddim  " in done.stdout and "did you mean steps?" in done.stderr


@pytest.mark.parametrize("mode", ["-m", "hydra.mode=MULTIRUN"])
def test_a_sweep_is_asked_for_in_either_way(call, checkpoint, tmp_path, mode):
    settings = ["prompt=a", "steps=1,2", f"pretrained={checkpoint}", f"output_dir={tmp_path / 'out'}"]
    assert call(predict_main, mode, *settings)[0] == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir()) == ["0", "1"]


@pytest.mark.parametrize("main", [train_main, predict_main])
def test_version_names_what_the_package_is_built_on(call, main):
    status, printed, complaint = call(main, "--version")
    names = [entry.split()[0] for entry in printed.split(", ")]
    assert (status, complaint, names) == (0, "", ["sdmodule", "torch", "lightning", "diffusers"])
