"""The folder that the embedded model of things is trained from: parts that fit each other, small enough for git."""

from __future__ import annotations

import runpy

from sdmodule.components.checkpoint import load_components
from sdmodule.components.source import ASSETS
from tests.docs.test_pages import ROOT


def test_its_parts_fit_and_are_small(tmp_path):
    make = runpy.run_path(str(ROOT / "examples" / "embedded" / "make_base.py"))["main"]
    make(ASSETS / "tiny" / "tokenizer", ASSETS / "tiny" / "vae", tmp_path / "base")
    parts = load_components(str(tmp_path / "base"), scratch=["unet", "text_encoder"])
    assert parts.text_encoder.config.hidden_size == parts.unet.config.cross_attention_dim
    assert parts.text_encoder.config.vocab_size == len(parts.tokenizer)
    megabytes = {name: 2e-6 * sum(p.numel() for p in network.parameters()) for name, network in parts.networks.items()}
    assert sum(megabytes.values()) + megabytes["unet"] < 40  # with another UNet, for inpainting


def test_the_things_are_those_that_two_styles_share():
    names = (ROOT / "examples" / "embedded" / "things.txt").read_text().splitlines()
    assert len(names) >= 100 and names == sorted(set(names))
