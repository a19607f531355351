"""Weights & Biases: online with an API key, offline without one, and with nothing private in the run."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import requests.utils
import wandb
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from sdmodule.errors import SettingsError, check_choice
from sdmodule.io.redact import redact, shorten_home

MODES = ("online", "offline", "disabled", "shared")
"""What W&B's environment variable ``WANDB_MODE`` may say."""


class PrivateWandbLogger(WandbLogger):
    """Lightning's `WandbLogger` without what W&B collects about the machine: paths, host, command line, source code.

    Args:
        project: W&B project of the run.
        save_dir: folder of the run; W&B makes ``wandb/`` in it.
        log_model: true logs checkpoints and exports as artifacts at the end, ``all`` each checkpoint as it is saved.
        group: W&B group of the run; the runs of a sweep get one.
        settings: of ``wandb.Settings``.
        others: of ``wandb.init``, such as ``name``, ``entity`` and ``tags``.
    """

    def __init__(
        self,
        project: str = "sdmodule",
        save_dir: str = ".",
        log_model: Literal["all"] | bool = False,
        group: str | None = None,
        settings: Mapping[str, Any] | None = None,
        **others: Any,
    ) -> None:
        # W&B reads its environment once per process, so pass on what has changed since
        mode = others.pop("mode", None) or os.environ.get("WANDB_MODE")
        if mode is not None:
            check_choice("WANDB_MODE", mode, MODES)
            if mode == "online" and not has_key(settings or {}):
                raise SettingsError(
                    "logger=wandb: found no key of W&B; run wandb login, or set WANDB_API_KEY, or WANDB_MODE=offline."
                )
        self.keyless = mode is None and not has_key(settings or {})
        private = {
            "silent": True,
            "console": "off",
            "disable_git": True,
            "save_code": False,
            "symlink": False,
            "x_disable_meta": True,
            "x_disable_machine_info": True,
            "x_save_requirements": False,
        }
        super().__init__(
            project=project,
            save_dir=save_dir,
            log_model=log_model,
            group=group,
            settings=wandb.Settings(**{**private, **(settings or {})}),
            mode="offline" if self.keyless else mode,
            **redact(others),
        )
        self._wandb_init.pop("anonymous", None)  # W&B warns about this argument

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The W&B run, begun when it is first asked for.

        Raises:
            SettingsError: if W&B refuses it, for want of a key or for its settings.
        """
        try:
            return super().experiment
        except (wandb.errors.Error, ValueError) as error:  # pydantic's errors are ValueErrors
            reason = " ".join(str(error).split())[:200]
            raise SettingsError(
                f"logger=wandb: W&B refuses the run ({reason}); run wandb login, or set WANDB_API_KEY to a key of "
                "yours, or WANDB_MODE=offline."
            ) from error

    def location(self) -> str:
        """Where to find the run, in one line."""
        run = self.experiment
        if not getattr(run, "offline", False):
            return f"W&B: {run.url}" if getattr(run, "url", None) else ""
        reason = " (no key was found; wandb login stores one)" if self.keyless else ""
        return f"W&B is offline{reason}; upload the run with: wandb sync {Path(run.dir).parent}"

    @rank_zero_only
    def log_folder(self, folder: Path, name: str) -> None:
        """Log a folder as an artifact, if ``log_model`` asks for it."""
        if not self._log_model:
            return
        artifact = wandb.Artifact(f"{name}-{self.experiment.id}", type="model")
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            artifact.add_file(str(file), str(file.relative_to(folder)))
        self.experiment.log_artifact(artifact)


def has_key(settings: Mapping[str, Any]) -> bool:
    """Whether W&B will find a key: in its settings, in the environment, or where ``wandb login`` stores it."""
    named = settings.get("api_key") or os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE")
    server = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    return bool(named or requests.utils.get_netrc_auth(server))


@contextmanager
def wandb_run(output_dir: Path) -> Iterator[None]:
    """Finish the W&B run when the block ends, and leave nothing of it in the process.

    The files of artifacts are staged in the output folder instead of the home folder.
    """
    before = os.environ.get("WANDB_DATA_DIR")
    if before is None:
        os.environ["WANDB_DATA_DIR"] = artifact_staging_dir(output_dir.absolute())
    try:
        yield
    finally:
        if before is None:
            del os.environ["WANDB_DATA_DIR"]
        if "wandb" in sys.modules and wandb.run is not None:
            folder = Path(wandb.run.dir).parent
            wandb.run.finish()
            wandb.teardown()  # finish() returns before W&B's own process has written the last of an offline run
            hide_home(folder)


def artifact_staging_dir(output_dir: Path) -> str:
    """Folder in which the files of artifacts wait for their upload.

    W&B writes its path into the run file. On Linux a path relative to the current folder keeps the home folder out of
    it; ``wandb sync`` must then be called from the folder that the run was started in.
    """
    if Path("/proc/self/cwd").exists() and output_dir.is_relative_to(Path.cwd()):
        return f"/proc/self/cwd/{output_dir.relative_to(Path.cwd())}/wandb"
    return str(output_dir / "wandb")


def hide_home(folder: Path) -> None:
    """Remove the home folder from the paths in W&B's own logs of a run."""
    for file in folder.glob("logs/*.log"):
        text = file.read_text(encoding="utf-8", errors="replace")
        if (short := shorten_home(text)) != text:
            file.write_text(short, encoding="utf-8")
