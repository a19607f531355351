"""Train a small CLIP tokenizer on any texts: byte-pair encoding that falls back to single bytes for unknown words.

``python -m sdmodule.data.toy.tokenizer FOLDER CAPTIONS...`` made that of the embedded model, from the captions of
scenes and the lines of the given text files.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from sdmodule.data.toy.scenes import caption, sample_scene

BEGIN, END = "<|startoftext|>", "<|endoftext|>"


def write_tokenizer(folder: str | Path, texts: Iterable[str], size: int = 2048, length: int = 77) -> None:
    """Train byte-pair merges on texts and write a folder that ``CLIPTokenizer.from_pretrained`` reads.

    Args:
        folder: where to write ``vocab.json``, ``merges.txt`` and ``tokenizer_config.json``.
        texts: the training texts; the more often a word occurs, the earlier it is merged.
        size: size of the vocabulary, with the two special tokens.
        length: tokens per chunk of text, with the begin and end tokens.
    """
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    endings = [f"{letter}</w>" for letter in alphabet]
    trainer = trainers.BpeTrainer(
        vocab_size=size - 2,
        special_tokens=endings,  # numbered as they occur otherwise, in another order each time, which breaks ties
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    learner.train_from_iterator((text.lower() for text in texts), trainer)
    merges = [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]
    entries = dict.fromkeys([*alphabet, *endings, *("".join(merge) for merge in merges)])
    vocabulary = {token: number for number, token in enumerate([*entries, BEGIN, END])}

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False, indent=0))
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": length,
        "bos_token": BEGIN,
        "eos_token": END,
        "pad_token": END,
        "unk_token": END,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def scene_captions(count: int = 2000) -> list[str]:
    """Captions of ``count`` scenes."""
    rng = random.Random(0)
    return [caption(sample_scene(rng, held_out=None)) for _ in range(count)]


if __name__ == "__main__":
    target, *files = sys.argv[1:]
    lines = [line for file in files for line in Path(file).read_text().splitlines()]
    write_tokenizer(target, [*scene_captions(), *lines])
