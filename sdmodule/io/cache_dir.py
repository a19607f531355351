"""The folder in which what can be computed again is kept from run to run."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """``$XDG_CACHE_HOME/sdmodule``, by default ``~/.cache/sdmodule``; it may not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sdmodule"
