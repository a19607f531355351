"""Fine-tune: ``python train.py experiment=... data.root=...``; see ``--help``."""

from sdmodule.cli.main import train_main

if __name__ == "__main__":
    train_main()
