"""``python -m sdmodule.evaluate run=FOLDER scorer=FOLDER``: score images; see ``--help``."""

from sdmodule.cli.main import evaluate_main

if __name__ == "__main__":
    evaluate_main()
