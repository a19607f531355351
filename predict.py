"""Sample: ``python predict.py prompt="a red circle on a blue background"``; see ``--help``."""

from sdmodule.cli.main import predict_main

if __name__ == "__main__":
    predict_main()
