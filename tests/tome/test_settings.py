"""Token merging by tomesd: checked settings, off again without a trace, the same picture for the same seed."""

from __future__ import annotations

import pytest
import torch

from sdmodule import SettingsError, StableDiffusionModule
from sdmodule.tome.settings import TokenMerging


def picture(checkpoint, **tome):
    module = StableDiffusionModule.from_pretrained(str(checkpoint), tome=tome)
    return lambda: module.infer("a red circle", num_inference_steps=3, seed=1, return_type="tensor")["samples"]


def test_merging_changes_the_picture_and_the_seed_still_names_it(checkpoint):
    plain, merged = picture(checkpoint), picture(checkpoint, ratio=0.5)
    before = torch.get_rng_state()
    first = merged()
    torch.rand(3)
    assert torch.equal(first, merged())
    torch.set_rng_state(before)
    assert not torch.equal(first, plain())


def test_ratio_zero_and_removal_are_exactly_off(checkpoint):
    plain = picture(checkpoint)()
    assert torch.equal(plain, picture(checkpoint, ratio=0.0)())
    module = StableDiffusionModule.from_pretrained(str(checkpoint))
    with TokenMerging(ratio=0.5).applied(module.unet, seed=0):
        pass
    again = module.infer("a red circle", num_inference_steps=3, seed=1, return_type="tensor")["samples"]
    assert torch.equal(plain, again)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": 0.8}, r"to 0\.75"),
        ({"ratio": -1}, "from 0"),
        ({"ratio": 0.5, "sx": 0}, "at least 1"),
        ({"ratio": 0.5, "max_downsample": 3}, "1, 2, 4 or 8"),
        ({"ratio": 0.5, "merge_attn": False}, "merges nothing"),
        ({"ratio": 0.5, "engine": "fast"}, "give tomesd"),
    ],
)
def test_what_tomesd_takes_without_a_word_is_refused(settings, message):
    with pytest.raises(SettingsError, match=message):
        TokenMerging(**settings)
