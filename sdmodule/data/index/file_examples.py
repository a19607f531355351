"""Examples of which no index is kept, such as images that are still to be made."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdmodule.data.example import Examples
from sdmodule.io.fingerprint import file_fingerprint
from sdmodule.io.image_files import upright_size


class FileExamples:
    """Examples whose sizes and contents are read from their files when they are first asked for."""

    def __init__(self, examples: Examples) -> None:
        self.examples = examples
        self._contents: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Any:
        return self.examples[index]

    def size(self, row: int) -> tuple[int, int]:
        """Width and height of an image, upright."""
        return upright_size(self.examples[row].path)

    def sizes(self) -> NDArray[np.int32]:
        """Width and height of all images, upright, ``[N, 2]``."""
        return np.array([self.size(row) for row in range(len(self))], np.int32).reshape(-1, 2)

    def content(self, row: int) -> str:
        """The fingerprint of an image's bytes."""
        if row not in self._contents:
            self._contents[row] = file_fingerprint(self.examples[row].path)
        return self._contents[row]
