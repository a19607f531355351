"""What a process finds of attention implementations; in a file of its own, as importing the tests compiles already."""

from __future__ import annotations

import torch

from sdmodule.speed.cpu.autotune import autotune_cache_dir
from sdmodule.speed.cpu.kernels import attentions


def print_attentions() -> None:
    """Print the implementations that are there, the norms of what they give, and the number of compiled libraries."""
    query = torch.ones(1, 2, 32, 8).bfloat16()
    ways = attentions(query, query, query)
    print(sorted(ways), [round(float(way(query, query, query).float().norm()), 1) for way in ways.values()])
    print(len(list(autotune_cache_dir().glob("*.so"))))
