"""Fine-tune: ``python train.py experiment=... data.root=...``; see ``--help``."""

import sys

try:
    from sdmodule.cli.main import train_main
except ModuleNotFoundError as error:
    sys.exit(f"error: {sys.executable} has no {error.name}; use .venv/bin/python train.py (make demo makes .venv).")

if __name__ == "__main__":
    train_main()
