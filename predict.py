"""Sample: ``python predict.py prompt="a red circle on a blue background"``; see ``--help``."""

import sys

try:
    from sdmodule.cli.main import predict_main
except ModuleNotFoundError as error:
    sys.exit(f"error: {sys.executable} has no {error.name}; use .venv/bin/python predict.py (make demo makes .venv).")

if __name__ == "__main__":
    predict_main()
