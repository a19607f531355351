"""Make the tokenizer of the embedded models: every word of the captions of `data=emoji_scenes` is one token.

The words are those of the names of all sprites, of the styles, and of the grammar of things and of shapes; the folder
lists them in ``words.txt``. Other words are read in pieces. ``CLIPTokenizer`` reads every digit alone, so `3d` is two
tokens::

    python examples/embedded/make_tokenizer.py outputs/sprites outputs/tokenizer
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from transformers import CLIPTokenizer

from sdmodule.data.toy.scenes import COLOURS, PLACES, RELATIONS, SHAPES
from sdmodule.data.toy.tokenizer import write_tokenizer
from sdmodule.evaluation.clip_folder import write_words

GRAMMAR = ("a", "an", "small", "large", "on", "background", ",", "style", *COLOURS, *SHAPES, *PLACES, *RELATIONS)
"""What captions say beside the names of things and styles; None is the place that is not named."""

NO_LIMIT = 1_000_000
"""A size of the vocabulary that no set of words reaches, so that merging ends with whole words."""


def words_of(sprites: Path) -> list[str]:
    """All words of captions, sorted."""
    texts = [text for file in sprites.glob("*/*.png") for text in (file.stem, file.parent.name)]
    return sorted({word for text in (*texts, *filter(None, GRAMMAR)) for word in text.split()})


def main(sprites: Path, target: Path) -> None:
    """Write the tokenizer."""
    words = words_of(sprites)
    if len(words) < 100:
        sys.exit(f"{sprites}: has no sprites; make them with python examples/embedded/make_sprites.py {sprites}.")
    split = sorted({piece for word in words for piece in re.findall(r"[a-z]+|[^a-z]", word)})  # as CLIPTokenizer splits
    write_tokenizer(target, split, NO_LIMIT)
    write_words(target, [word for word in words if word != ","])
    tokenizer = CLIPTokenizer.from_pretrained(target)
    if broken := [word for word in split if len(tokenizer.tokenize(word)) != 1]:
        sys.exit(f"{target}: reads {broken} in pieces.")
    print(f"{len(words)} words, each one of {len(tokenizer)} tokens, in {target}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("Give the folder of sprites and the folder to write to.")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
