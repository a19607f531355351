"""Files of words learned by textual inversion, read and written.

For a model of one text encoder a file holds one set of vectors. Its key is the word, or ``emb_params`` in files of the
web UI, which names a word after the file. For a model of two it holds a set for each, ``clip_l`` and ``clip_g``; the
word is ``placeholder`` of our header, or the name of the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from sdmodule.components.checkpoint import Components
from sdmodule.components.learned_words import add_word
from sdmodule.errors import SettingsError
from sdmodule.families.recognize import FAMILIES

UNNAMED_WORD = "emb_params"
"""Key of a learned word in AUTOMATIC1111's web UI, which names the word after the file."""

PLACEHOLDER = "placeholder"
"""Entry of the header with the word, for a file whose keys do not say it."""

MAX_VECTORS = 75
"""A word has at most as many vectors as a chunk of a prompt has tokens."""


def write_word(placeholder: str, parts: Components, file: Path, dtype: str) -> None:
    """Write the vectors of a learned word as ``dtype``.

    Args:
        placeholder: the word.
        parts: the model, to which the word was added last; see `add_word`.
        file: a ``.safetensors`` file.
        dtype: of the vectors, such as ``float16``.
    """
    keys = parts.family.word_keys or dict.fromkeys(parts.family.text_encoders.values(), placeholder)
    tensors = {}
    for name, key in keys.items():
        learned = getattr(parts, name).get_input_embeddings().learned.detach().cpu()
        tensors[key] = learned.to(getattr(torch, dtype)).contiguous()
    save_file(tensors, file, metadata={"format": "pt", PLACEHOLDER: placeholder} if parts.family.word_keys else None)


def use_word(
    parts: Components, tensors: Mapping[str, Tensor], header: Mapping[str, str], file: Path, path: str
) -> None:
    """Add the learned word of a file to a model, in place.

    Args:
        parts: the model.
        tensors: tensors of the file.
        header: its header.
        file: the file.
        path: how it was given, for messages.

    Raises:
        SettingsError: if it holds something else, or a word of another family or architecture.
    """
    _check_family(parts, tensors, path)
    if parts.family.word_keys:
        word = header.get(PLACEHOLDER, file.stem)
        sets = {name: tensors[key] for name, key in parts.family.word_keys.items()}
    else:
        [(key, vectors)] = tensors.items()
        word = file.stem if key == UNNAMED_WORD else key
        sets = dict.fromkeys(parts.family.text_encoders.values(), vectors)
    for tokenizer, encoder in parts.family.text_encoders.items():
        network = getattr(parts, encoder)
        width = network.config.hidden_size
        _check_shape(sets[encoder], width, path)
        vectors = sets[encoder].float().reshape(-1, width)
        add_word(word, vectors, getattr(parts, tokenizer), network).requires_grad_(False)


def _check_family(parts: Components, tensors: Mapping[str, Tensor], path: str) -> None:
    """Check that a file has a set of vectors for each text encoder of a model.

    Raises:
        SettingsError: if it is no learned word, or one of another family.
    """
    single = len(tensors) == 1 and all(tensor.ndim in (1, 2) for tensor in tensors.values())
    keys = parts.family.word_keys.values()
    if (single and not keys) or (keys and tensors.keys() == set(keys)):
        return
    others = [family for family in FAMILIES if family.word_keys and tensors.keys() == set(family.word_keys.values())]
    if not single and not others:
        raise SettingsError(
            f"adapters={path}: neither a low-rank adapter (keys such as unet.… or lora_unet_…) nor a learned word "
            "(one tensor, or clip_l and clip_g); give one of these."
        )
    found = f"for {others[0].title} (keys {' and '.join(sorted(tensors))})" if others else "of one set of vectors"
    wanted = f"with vectors for each text encoder (keys {' and '.join(keys)})" if keys else "of one set of vectors"
    raise SettingsError(
        f"adapters={path}: is a learned word {found}, and pretrained={parts.source} is of {parts.family.title}, which "
        f"takes one {wanted}; give one that was learned on a model of this family."
    )


def _check_shape(vectors: Tensor, width: int, path: str) -> None:
    rows = len(vectors) if vectors.ndim == 2 else 1
    if vectors.ndim not in (1, 2) or vectors.shape[-1] != width or not 1 <= rows <= MAX_VECTORS:
        raise SettingsError(
            f"adapters={path}: the learned word has the shape {tuple(vectors.shape)}, and this model takes 1 to "
            f"{MAX_VECTORS} vectors of {width}; give one that was learned on a model of this architecture."
        )
