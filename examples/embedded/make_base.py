"""Write the folder that the embedded model of things is trained from: its architecture, a tokenizer and an autoencoder.

The UNet and the text encoder have configurations only; ``scratch=[unet,text_encoder]`` draws their weights::

    python examples/embedded/make_base.py outputs/tokenizer outputs/autoencoder/export/vae outputs/base
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from transformers import CLIPTokenizer

from sdmodule.components.source import ASSETS

CHANNELS, HEADS = [64, 128, 160], [2, 4, 5]
"""Of each level of the UNet; heads have 32 channels. With an inpainting UNet beside it, float16 takes 39 MB."""


def rewrite(file: Path, **changes: Any) -> None:
    """Change settings of a configuration."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes, indent=2) + "\n")


def main(tokenizer: Path, vae: Path, target: Path) -> None:
    """Write the folder."""
    for folder, file in ((tokenizer, "vocab.json"), (vae, "config.json")):
        if not (folder / file).is_file():
            sys.exit(f"{folder}: has no {file}; give what make_tokenizer.py or a training of a VAE has made.")
    if target.exists():
        sys.exit(f"{target}: exists; give a folder to make.")
    shutil.copytree(ASSETS / "tiny", target, ignore=shutil.ignore_patterns("*.safetensors", "tokenizer", "vae"))
    shutil.copytree(tokenizer, target / "tokenizer")
    shutil.copytree(vae, target / "vae")
    words = CLIPTokenizer.from_pretrained(target / "tokenizer")
    numbers = {f"{name}_token_id": getattr(words, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    rewrite(target / "text_encoder" / "config.json", vocab_size=len(words), **numbers)
    rewrite(target / "unet" / "config.json", block_out_channels=CHANNELS, attention_head_dim=HEADS)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("Give the folders of the tokenizer and of the VAE, and the folder to write to.")
    main(*map(Path, sys.argv[1:]))
