"""What every command does first, done once in the process that commands are forked from; see `benchmarks.forked`.

Parsers and regular expressions that are built on first use are part of that, as the imports are.
"""

from __future__ import annotations

import gc

import torch
from hydra import compose, initialize_config_module

from sdmodule.cli.overrides import quote_overrides
from sdmodule.components.checkpoint import load_components

torch.set_num_threads(1)  # a process with more threads cannot be forked
with initialize_config_module("sdmodule.conf", version_base="1.3"):
    compose("predict", quote_overrides(["prompt=a cat, (fluffy:1.2)", "steps=2"]))
    compose("train", quote_overrides(["data.root=photos", "trainer.max_steps=2", "callbacks=[checkpoint,export]"]))
load_components("tiny")
gc.freeze()
