"""Row 39: of a cache of many files only some are open at a time."""

from __future__ import annotations

import torch

from sdmodule.data.cache import tensor_store
from sdmodule.data.cache.tensor_store import TensorStore


def maps(folder) -> int:
    """Files of a folder that this process has mapped."""
    with open("/proc/self/maps") as lines:
        return len({line.split()[-1] for line in lines if str(folder) in line})


def test_a_store_of_many_files_keeps_few_open(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_store, "MAX_OPEN_FILES", 4)
    monkeypatch.setattr(tensor_store, "MEMORY_BYTES", 0)
    store = TensorStore(tmp_path)
    for k in range(20):
        store.add({f"key {k}": torch.full((64,), float(k))})
    for _ in range(2):
        for k in (*range(20), 0, 1, 19):
            assert torch.equal(store[f"key {k}"], torch.full((64,), float(k)))
        assert maps(tmp_path) <= 4
