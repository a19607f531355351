"""Token merging: checked settings, no trace afterwards, and one image for a seed in any batch."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from peft import LoraConfig

from sdmodule import SettingsError, StableDiffusionModule
from sdmodule.tome.apply import apply_merging
from sdmodule.tome.token_merging import ENGINES, TokenMerging
from tests.tome.conftest import small_unet, tomesd_applied

OURS = ("exact", "window")


def image(checkpoint, prompt="a red circle", steps=3, **tome):
    """A function that samples an image with these settings."""
    module = StableDiffusionModule.from_pretrained(str(checkpoint), tome=tome)

    def sample(**settings):
        named = {"num_inference_steps": steps, "seed": 1, "return_type": "tensor", **settings}
        return module.infer(prompt, **named)["samples"]

    return sample


@pytest.mark.parametrize("engine", ENGINES)
def test_merging_changes_the_image_and_keeps_it_reproducible(checkpoint, engine):
    plain, merged = image(checkpoint), image(checkpoint, ratio=0.5, engine=engine)
    before = torch.get_rng_state()
    first = merged()
    torch.rand(3)
    assert torch.equal(first, merged())
    torch.set_rng_state(before)
    assert not torch.equal(first, plain())


def test_it_can_be_switched_for_each_call(checkpoint):
    off, on = image(checkpoint), image(checkpoint, ratio=0.5)
    assert torch.equal(off(tome={"ratio": 0.5}), on())
    assert torch.equal(on(tome={"ratio": 0}), off())
    with pytest.raises(SettingsError, match=r"to 0\.75"):
        off(tome={"ratio": 0.9})


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("engine", ENGINES)
def test_an_image_does_not_depend_on_its_batch(checkpoint, engine, guidance):
    sample = image(checkpoint, ratio=0.5, engine=engine, max_downsample=2)
    together = sample(num_images_per_prompt=3, guidance_scale=guidance)
    for k in range(3):
        alone = sample(seed=1 + k, guidance_scale=guidance)
        assert torch.allclose(together[k], alone[0], atol=1e-4)


def test_each_image_has_its_own_draws(checkpoint):
    """With the same noise, images of two seeds differ by their destinations, and not at all without ``use_rand``."""
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1, 1)
    for use_rand in (True, False):
        sample = image(checkpoint, ratio=0.5, use_rand=use_rand)
        first, second = sample(num_images_per_prompt=2, latents=noise)
        assert torch.allclose(first, second, atol=1e-5) is not use_rand


@pytest.mark.parametrize("engine", ENGINES)
def test_ratio_zero_and_removal_are_exactly_off(unet, inputs, engine):
    with torch.no_grad():
        plain = unet(*inputs).sample
        with apply_merging(unet, TokenMerging(ratio=0.0, engine=engine)):
            assert torch.equal(plain, unet(*inputs).sample)
        with pytest.raises(KeyboardInterrupt), apply_merging(unet, TokenMerging(engine=engine)):
            assert not torch.equal(plain, unet(*inputs).sample)
            raise KeyboardInterrupt
        assert torch.equal(plain, unet(*inputs).sample)
    blocks = [module for module in unet.modules() if isinstance(module, BasicTransformerBlock)]
    assert all(type(block) is BasicTransformerBlock and "merging" not in vars(block) for block in blocks)


def test_the_state_dict_does_not_change(unet):
    before = list(unet.state_dict())
    with apply_merging(unet, TokenMerging()):
        assert list(unet.state_dict()) == before


@pytest.mark.parametrize("engine", OURS)
def test_the_result_depends_on_seed_and_step_and_not_on_earlier_calls(unet, inputs, engine):
    def run(seed, steps):
        with apply_merging(unet, TokenMerging(engine=engine), [seed], steps=3) as start_step, torch.no_grad():
            for step in steps:
                start_step(step)
                output = unet(*inputs).sample
            return output

    assert torch.equal(run(1, [0, 1, 2]), run(1, [0, 0, 2]))
    assert not torch.equal(run(1, [2]), run(1, [1]))
    assert not torch.equal(run(1, [2]), run(2, [2]))


@pytest.mark.parametrize("engine", OURS)
def test_a_plan_is_kept_for_reuse_steps(unet, inputs, engine):
    latents, timestep, text = inputs
    other = latents.flip(-1)

    def run(reuse_steps, planned_for):
        merging = TokenMerging(engine=engine, reuse_steps=reuse_steps)
        with apply_merging(unet, merging, steps=3) as start_step, torch.no_grad():
            unet(planned_for, timestep, text)
            start_step(1)
            second = unet(latents, timestep, text).sample
            start_step(2)
            return second, unet(latents, timestep, text).sample

    kept, anew = run(2, other)
    assert not torch.equal(kept, run(2, latents)[0])  # matched on the first step's latents
    assert torch.equal(run(1, other)[0], run(1, latents)[0])
    assert torch.equal(anew, run(1, latents)[1])


@pytest.mark.parametrize("engine", OURS)
def test_it_merges_with_keyword_arguments(unet, inputs, engine):
    latents, timestep, text = inputs
    with apply_merging(unet, TokenMerging(engine=engine)), torch.no_grad():
        named = unet(sample=latents, timestep=timestep, encoder_hidden_states=text).sample
        assert torch.equal(named, unet(*inputs).sample)


@pytest.mark.parametrize("engine", OURS)
def test_it_works_with_lora(unet, inputs, engine):
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    adapted = unet(*inputs).sample
    with apply_merging(unet, TokenMerging(engine=engine)):
        merged = unet(*inputs).sample
        unet.disable_adapters()
        assert not torch.equal(merged, unet(*inputs).sample)
        unet.enable_adapters()
        merged.sum().backward()
    assert all(p.grad is not None for name, p in unet.named_parameters() if "lora" in name)
    assert torch.equal(adapted, unet(*inputs).sample)


@pytest.mark.parametrize("engine", OURS)
def test_it_works_under_autocast(unet, inputs, engine):
    with torch.no_grad(), apply_merging(unet, TokenMerging(engine=engine)):
        wanted = unet(*inputs).sample
        with torch.autocast("cpu", torch.bfloat16):
            found = unet(*inputs).sample
    assert (found - wanted).norm() < 0.05 * wanted.norm()


def test_controlnet_residuals_match_tomesd(unet, inputs):
    shapes = [(32, 16), (32, 16), (32, 8), (64, 8)]
    generator = torch.Generator().manual_seed(4)
    down = [torch.randn(2, channels, side, side, generator=generator) for channels, side in shapes]
    residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": down[-1]}
    with torch.no_grad():
        plain = unet(*inputs).sample
        with tomesd_applied(unet, seed=3, ratio=0.5):
            wanted = unet(*inputs, **residuals).sample
        with apply_merging(unet, TokenMerging(), [3]):
            found = unet(*inputs, **residuals).sample
    assert torch.allclose(found, wanted, atol=1e-4) and not torch.allclose(found, plain, atol=0.1)


def test_lora_matches_tomesd(unet, inputs):
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    with torch.no_grad():
        with tomesd_applied(unet, seed=3, ratio=0.5):
            wanted = unet(*inputs).sample
        with apply_merging(unet, TokenMerging(), [3]):
            assert torch.allclose(unet(*inputs).sample, wanted, atol=1e-5)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("engine", OURS)
def test_gradient_checkpointing_changes_no_gradient(inputs, engine, whole):
    grads = []
    for checkpointed in (False, True):
        unet = small_unet().train()
        if checkpointed:
            unet.enable_gradient_checkpointing()
        with apply_merging(unet, TokenMerging(engine=engine, merge_crossattn=whole, merge_mlp=whole)):
            unet(*inputs).sample.square().mean().backward()
        grads.append(torch.cat([p.grad.flatten() for p in unet.parameters()]))
    assert torch.allclose(*grads, rtol=1e-5, atol=1e-7)
    assert grads[0].abs().sum() > 0


@pytest.mark.parametrize("engine", OURS)
def test_a_merged_unet_can_be_pickled_and_copied(unet, inputs, engine):
    with apply_merging(unet, TokenMerging(engine=engine)), torch.no_grad():
        merged = unet(*inputs).sample
        assert torch.equal(merged, pickle.loads(pickle.dumps(unet))(*inputs).sample)
        assert torch.equal(merged, copy.deepcopy(unet)(*inputs).sample)
    again = pickle.loads(pickle.dumps(unet))
    with apply_merging(again, TokenMerging(engine=engine)), torch.no_grad():
        assert torch.equal(merged, again(*inputs).sample)


def test_latents_of_another_size_are_an_error(unet, inputs):
    latents, timestep, text = inputs
    with (
        apply_merging(unet, TokenMerging()),
        pytest.raises(SettingsError, match="16 by 16 = 256 tokens, and a block got 512"),
    ):
        unet(torch.cat([latents, latents], dim=-1), timestep, text)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": 0.8}, r"to 0\.75"),
        ({"ratio": 0.7, "sx": 1}, r"to 0\.5"),
        ({"ratio": -1}, "from 0"),
        ({"sx": 0}, "at least 1"),
        ({"reuse_steps": 0}, "at least 1"),
        ({"max_downsample": 3}, "1, 2, 4 or 8"),
        ({"merge_attn": False}, "merges nothing"),
        ({"merge_mlp": "yes"}, "true or false"),
        ({"engine": "fast"}, "exact, tomesd, window"),
        ({"engine": "tomesd", "reuse_steps": 2}, "must be 1"),
        ({"engine": "window", "ratio": 0.3}, r"give 0\.25 or 0\.3125"),
    ],
)
def test_an_impossible_value_is_an_error(settings, message):
    with pytest.raises(SettingsError, match=message):
        TokenMerging(**settings)


@pytest.mark.parametrize("engine", ENGINES)
def test_settings_that_do_not_fit_the_unet_are_an_error(engine):
    unet = small_unet(
        (32, 32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )
    with pytest.raises(SettingsError, match=r"set tome\.max_downsample=2"):
        TokenMerging(engine=engine, max_downsample=1).check(unet, (16, 16))
    TokenMerging(engine=engine).check(unet, (16, 16))
    TokenMerging(engine=engine, max_downsample=2).check(unet, (16, 16))
    with pytest.raises(SettingsError, match=r"those of this UNet have other norms, position embeddings"):
        TokenMerging(engine=engine).check(small_unet(attention_type="gated"), (16, 16))
    with pytest.raises(SettingsError, match=r"tome.sy=9: must be from 1 to 8, the tokens"):
        TokenMerging(engine=engine, max_downsample=2, sy=9).check(unet, (16, 32))


def test_a_module_checks_its_settings_at_once(checkpoint):
    with pytest.raises(SettingsError, match=r"tome.sx=9: must be from 1 to 8"):
        StableDiffusionModule.from_pretrained(str(checkpoint), tome={"ratio": 0.5, "sx": 9})
    with pytest.raises(SettingsError, match=r"tome.strength: unknown; tome has engine"):
        StableDiffusionModule.from_pretrained(str(checkpoint), tome={"strength": 0.5})


def test_sizes_that_tomesd_cannot_handle_are_an_error():
    unet = small_unet((32, 32, 32, 32))
    with pytest.raises(SettingsError, match="fails for latents of 33 by 36"):
        TokenMerging(engine="tomesd", max_downsample=8).check(unet, (33, 36))
    TokenMerging(engine="tomesd", max_downsample=8).check(unet, (64, 64))
    for engine in OURS:
        with apply_merging(unet, TokenMerging(engine=engine, max_downsample=8), size=(33, 36)), torch.no_grad():
            assert unet(torch.zeros(1, 4, 33, 36), 0, torch.zeros(1, 7, 32)).sample.isfinite().all()
