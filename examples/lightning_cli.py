"""Lightning's own command line for the module and its data; needs ``pip install 'jsonargparse[signatures]'``.

Example::

    python examples/lightning_cli.py fit --data.root my_photos --model.tuning.kind lora --trainer.max_steps 100
"""

from __future__ import annotations

from lightning.pytorch.cli import LightningCLI

from sdmodule import StableDiffusionModule
from sdmodule.data import ImageFolderDataModule

if __name__ == "__main__":
    LightningCLI(StableDiffusionModule, ImageFolderDataModule)
